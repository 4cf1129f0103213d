"""How many processes train together on a machine, for each value of `devices` and `device`."""

from __future__ import annotations

import pytest

from trainkit.core.errors import ConfigError
from trainkit.core.machine import number_of_processes, processes_to_start, unused_gpus_note, visible_gpus


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that torchrun did not start."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def torchrun(monkeypatch: pytest.MonkeyPatch, size: int, local: int) -> None:
    """Set the variables that torchrun sets."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))


@pytest.mark.parametrize(
    ("value", "gpus"), [("", []), ("-1", []), ("0", ["0"]), ("1, 3", ["1", "3"]), ("GPU-8932f937", ["GPU-8932f937"])]
)
def test_the_visible_gpus_are_those_of_the_environment(
    value: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == gpus


@pytest.mark.parametrize(
    ("gpus", "devices", "device", "number"),
    [
        ("0,1,2", "all", "auto", 3),
        ("0,1,2", 2, "cuda", 2),
        ("0", "all", "auto", 1),
        ("0,1", 5, "cpu", 5),
        ("", 5, "auto", 5),
        ("", 1, "cuda:0", 1),
    ],
)
def test_there_is_a_process_for_each_device(
    gpus: str, devices: object, device: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert number_of_processes(devices, device) == number  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "devices", "cause"),
    [
        ("", "all", "devices=all: this machine has no NVIDIA GPU"),
        ("0,1", 3, "devices=3: this machine has 2 GPUs"),
        ("7", 2, "devices=2: this machine has 1 GPU"),
    ],
)
def test_more_devices_than_gpus_are_a_config_error(
    gpus: str, devices: object, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    with pytest.raises(ConfigError) as caught:
        number_of_processes(devices, "auto")  # type: ignore[arg-type]
    assert caught.value.problems[0].cause == cause


@pytest.mark.parametrize("devices", [1, 4, 8, "all"])
def test_a_rank_of_torchrun_starts_no_processes(devices: object, monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun(monkeypatch, size=8, local=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert processes_to_start(devices, "auto") == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("devices", "size"), [(2, 1), (2, 4), ("all", 1)])
def test_another_number_than_that_of_torchrun_is_a_config_error(
    devices: object, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun(monkeypatch, size=size, local=size)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match=f"devices={devices}: torchrun has started {size} process"):
        processes_to_start(devices, "auto")  # type: ignore[arg-type]


def test_a_note_says_how_to_use_all_gpus_only_where_some_are_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    note = "note: this machine has 4 GPUs, and 1 is used; devices=all uses them all"
    assert [unused_gpus_note(device) for device in ("auto", "cuda")] == [note, note]
    assert [unused_gpus_note(device) for device in ("cpu", "cuda:1", "mps")] == [None] * 3
    torchrun(monkeypatch, size=2, local=2)
    assert unused_gpus_note("auto") is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert unused_gpus_note("auto") is None
