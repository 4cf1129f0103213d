"""How many jobs run at a time: by cores, GPUs, memory, and what the user asks for."""

from __future__ import annotations

import pytest

from trainkit.core.errors import ConfigError
from trainkit.sweeps import resources
from trainkit.sweeps.resources import MemoryGuard, measure_capacity


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 8 cores and no GPU."""
    monkeypatch.setattr(resources, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    ("n_jobs", "jobs", "slots", "threads"),
    [("auto", 100, 8, 1), ("auto", 3, 3, 2), ("auto", 1, 1, 8), (2, 100, 2, 4), (16, 100, 16, 1), (4, 2, 2, 4)],
)
def test_the_cores_are_divided_among_the_jobs(n_jobs: object, jobs: int, slots: int, threads: int) -> None:
    capacity = measure_capacity(n_jobs, 1, jobs, "auto")
    assert (capacity.slots, capacity.threads) == ([None] * slots, threads)


def test_the_threads_that_the_user_sets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    capacity = measure_capacity("auto", 1, 100, "auto")
    assert (len(capacity.slots), capacity.threads) == (2, 4)


@pytest.mark.parametrize(
    ("shared", "n_jobs", "slots", "jobs"),
    [(1, "auto", ["0", "2"], 2), (2, "auto", ["0", "2", "0", "2"], 4), (2, 3, ["0", "2", "0", "2"], 3)],
)
def test_each_job_gets_a_gpu_and_gpus_are_shared_only_if_asked(
    shared: int, n_jobs: object, slots: list[str], jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    capacity = measure_capacity(n_jobs, shared, 100, "auto")
    assert (capacity.slots, capacity.jobs) == (slots, jobs)
    assert measure_capacity("auto", shared, 100, "cpu").slots == [None] * 8


@pytest.mark.parametrize(
    ("gpus", "devices", "shared", "jobs", "slots"),
    [
        ("0,1,2,3", 2, 1, 100, [["0", "1"], ["2", "3"]]),
        ("0,1,2,3", 2, 1, 1, [["0", "1"]]),
        ("0,1,2", 2, 1, 100, [["0", "1"]]),
        ("0,1", 2, 2, 100, [["0", "1"], ["0", "1"]]),
        ("0,1", 4, 1, 100, [["0", "1"]]),
        ("", 2, 1, 100, [[None, None]] * 4),
        ("", 16, 1, 100, [[None] * 8]),
    ],
)
def test_a_job_takes_a_slot_for_each_of_its_devices(
    gpus: str, devices: int, shared: int, jobs: int, slots: list[list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    capacity = measure_capacity("auto", shared, jobs, "auto", devices)
    free, taken = list(capacity.slots), list[list[str | None]]()
    while len(taken) < capacity.jobs and (found := capacity.take(free, devices)):
        taken.append(found)
    assert taken == slots


def test_the_threads_are_divided_among_all_processes_of_all_jobs() -> None:
    assert measure_capacity(2, 1, 100, "auto", devices=2).threads == 2
    assert measure_capacity("auto", 1, 1, "auto", devices=2).threads == 4
    assert measure_capacity("auto", 1, 100, "auto", devices=3).threads == 1


def test_the_processes_of_a_job_never_share_a_gpu_and_wait_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    capacity = measure_capacity("auto", 2, 100, "auto", devices=2)
    free: list[str | None] = ["0", "0"]
    assert capacity.take(free, 2) == []
    assert free == ["0", "0"]
    assert capacity.take(free, 1) == ["0"]


@pytest.mark.parametrize("wrong", [0, -1, "many", 1.5, True, None])
def test_a_wrong_number_of_jobs_is_a_config_error(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"hydra.launcher.n_jobs=.*expected a whole number"):
        measure_capacity(wrong, 1, 10, "auto")
    with pytest.raises(ConfigError, match=r"hydra.launcher.jobs_per_gpu=.*expected a whole number"):
        measure_capacity("auto", wrong, 10, "auto")


def test_a_further_job_starts_only_if_it_fits_beside_jobs_that_still_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    used = {1: 3 * gib, 2: gib}
    monkeypatch.setattr(resources, "resident_memory", lambda pid: used[pid])
    guard = MemoryGuard()
    # Job 1 shows that a job needs 3 GiB, so job 2 will take 2 GiB more, and a third job 3 GiB.
    for free, fits in ((4.9, False), (5.1, True)):
        monkeypatch.setattr(resources, "free_host_memory", lambda free=free: int(free * gib))
        assert guard.allows([[1], [2]]) is fits
