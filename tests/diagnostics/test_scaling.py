"""The estimates of `check` for several devices: compared with a ring that moves numbers, and with schedules."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.conftest import Command
from trainkit.cli.commands.check import scaling_lines
from trainkit.config.repair import compose_and_repair
from trainkit.data.batch_order import BatchOrder, Share
from trainkit.data.loaders import Loader, SlicingLoader, StreamingLoader
from trainkit.data.prepare import Prepare
from trainkit.data.store import Store
from trainkit.diagnostics.check.costs import bytes_of_files, gathered_bytes, seconds_of_loading
from trainkit.diagnostics.check.run import check
from trainkit.diagnostics.check.scaling import (
    DEVICES,
    LINKS,
    Costs,
    estimate_scaling,
    find_bound,
    sent_bytes,
)


def ring(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Return the sums of a reduce-scatter, those of an all-gather, and the numbers that a device sends in each.

    Args:
        parts: (devices, devices, length): the parts that each device has at the beginning.
    """
    held, devices = parts.copy(), len(parts)
    sent = [0, 0]
    for step in range(devices - 1):  # each device sends one part to the next, which adds it to its own
        messages = [((i - step) % devices, held[i, (i - step) % devices].copy()) for i in range(devices)]
        sent[0] += messages[0][1].size
        for i, (part, values) in enumerate(messages):
            held[(i + 1) % devices, part] += values
    scattered = np.stack([held[i, (i + 1) % devices] for i in range(devices)])
    for step in range(devices - 1):  # each device sends one finished part to the next
        messages = [((i + 1 - step) % devices, held[i, (i + 1 - step) % devices].copy()) for i in range(devices)]
        sent[1] += messages[0][1].size
        for i, (part, values) in enumerate(messages):
            held[(i + 1) % devices, part] = values
    return scattered, held, sent[0], sent[1]


@pytest.mark.parametrize("devices", DEVICES)
def test_a_device_sends_the_bytes_of_a_ring(devices: int) -> None:
    parts = np.random.default_rng(0).normal(size=(devices, devices, 5))
    scattered, gathered, of_scatter, of_gather = ring(parts)
    sums = parts.sum(0)
    assert np.allclose(scattered, np.roll(sums, -1, 0))
    assert np.allclose(gathered, sums)
    size = sums.size * 8.0
    assert sent_bytes(devices, size, 0) == pytest.approx(8 * of_scatter)
    assert sent_bytes(devices, 0, size) == pytest.approx(8 * of_gather)
    assert sent_bytes(devices, size, size) == pytest.approx(8 * (of_scatter + of_gather))


def seconds_of_many_steps(compute: float, loader: float, network: float, *, ahead: bool, overlaps: bool) -> float:
    """Return the seconds of a step by a schedule of 200 steps, whose reader is one batch ahead at most."""
    read, trained, steps = 0.0, [0.0], 200
    for step in range(steps):
        # The reader waits for the end of the step before the last, whose batch makes room for this one.
        start = max(read, trained[max(0, step - 1)]) if ahead else trained[-1]
        read = start + loader
        begin = max(read, trained[-1])
        trained.append(begin + (max(compute, network) if overlaps else compute + network))
    return (trained[-1] - trained[steps // 2]) / (steps - steps // 2)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("times", list(itertools.permutations((0.1, 0.35, 1.0))))
def test_the_time_of_a_step_is_that_of_a_schedule(
    times: tuple[float, float, float], *, ahead: bool, overlaps: bool
) -> None:
    bound = find_bound(*times, reads_ahead=ahead, overlaps=overlaps)
    assert bound.step == pytest.approx(seconds_of_many_steps(*times, ahead=ahead, overlaps=overlaps))
    assert bound.part == ("compute", "loader", "network")[times.index(1.0)]


def test_each_device_gets_the_largest_share_of_a_batch() -> None:
    costs = Costs(compute=0.3, loader=0.03, gradients=4000, on_gpu=True)
    scaling = estimate_scaling(costs, 10)
    for row in scaling.estimates:
        shares = [Share(rank, row.devices).size(10) for rank in range(row.devices)]
        assert row.samples == max(shares)
        assert row.compute == pytest.approx(0.3 * max(shares) / 10)
        assert row.loader == pytest.approx(0.03 * max(shares) / 10)
        for link, rate in LINKS.items():
            seconds = row.sent / rate
            assert row.over[link].network == pytest.approx(seconds)
            assert row.over[link].step == pytest.approx(row.compute + row.loader + seconds)
        assert row.without_network.step == pytest.approx(row.compute + row.loader)


def test_the_part_that_takes_longest_is_named_for_each_link() -> None:
    # 1 GB of gradients: two devices send 1 GB, which takes 0.8 s over 10 GbE and 0.08 s over 100 GbE.
    scaling = estimate_scaling(Costs(compute=1.0, gradients=10**9, on_gpu=True), 64)
    two, eight = scaling.estimates[1], scaling.estimates[3]
    assert {link for link, bound in two.over.items() if bound.part == "network"} == {"10 GbE"}
    assert {link for link, bound in eight.over.items() if bound.part == "network"} == {"10 GbE", "100 GbE"}
    lines = scaling_lines(scaling.as_dict())
    assert lines[1].split("  ")[-1] == "bound by"
    assert lines[2].endswith("compute")
    assert lines[3].endswith("compute; network over 10 GbE")
    assert lines[5].endswith("compute; network over 100 GbE, 10 GbE")


def test_a_slow_loader_bounds_the_step() -> None:
    scaling = estimate_scaling(Costs(compute=0.1, loader=0.4, reads_ahead=True, read_bytes=2**20), 32)
    assert {row.without_network.part for row in scaling.estimates} == {"loader"}
    assert [row.without_network.step for row in scaling.estimates] == [0.4, 0.2, 0.1, 0.05]
    assert "so 8 devices read up to 640.0 MiB a second" in "\n".join(scaling_lines(scaling.as_dict()))


def test_divided_weights_are_gathered_in_each_pass_and_overlap_the_computing() -> None:
    costs = Costs(compute=0.8, gradients=3000, gathered=7000, on_gpu=True)
    scaling = estimate_scaling(costs, 32, micro_batch=6, distributed="fsdp")
    assert [row.sent for row in scaling.estimates] == [
        0,
        3 * 1 / 2 * 10_000,  # 16 samples in three passes
        2 * 3 / 4 * 10_000,  # 8 samples
        1 * 7 / 8 * 10_000,  # 4 samples
    ]
    assert scaling.estimates[1].over["PCIe"].step == pytest.approx(0.4)


def test_ddp_sends_the_bytes_of_auto_during_the_computing() -> None:
    costs = Costs(compute=1.0, gradients=10**9, on_gpu=True)
    auto, ddp = (estimate_scaling(costs, 64, distributed=chosen).estimates[1] for chosen in ("auto", "ddp"))
    assert ddp.sent == auto.sent == 10**9
    assert auto.over["10 GbE"].step == pytest.approx(0.5 + 0.8)
    assert ddp.over["10 GbE"].step == pytest.approx(0.8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)


class Stack(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.Sequential(Block(), Block(), Block()), nn.Linear(8, 2))


def test_the_weights_of_blocks_are_gathered_twice() -> None:
    outside, blocks = 4 * 8 + 8 + 8 * 2 + 2, 3 * 2 * (8 * 8 + 8)
    assert gathered_bytes(Stack()) == 4 * (outside + 2 * blocks)
    assert gathered_bytes(nn.Linear(3, 2)) == 4 * (3 * 2 + 2)


def test_the_page_shows_the_estimates_for_a_resnet50() -> None:
    costs = Costs(compute=0.21, loader=256 / 1600, reads_ahead=True, read_bytes=110_000, on_gpu=True)
    costs.gradients = 4 * 25_557_032
    lines = scaling_lines(estimate_scaling(costs, 256).as_dict())
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert "\n".join(lines) in page
    for link, rate in LINKS.items():
        assert re.search(rf"\| {link}\b.* \| {rate / 1e9:g} \|", page), link


# ------------------------------------------------------------------------------------ what is measured


def a_clock(seconds: list[float]) -> Callable[[], float]:
    """Return a clock that shows the sum of the seconds of all work so far."""
    return lambda: sum(seconds)


@pytest.mark.parametrize("skipped", [1, 3])
def test_the_first_batches_of_a_loader_do_not_count(skipped: int) -> None:
    work: list[float] = []

    def batches(seconds: float) -> int:
        work.append(seconds)
        return 0

    slow_start = (batches(5.0 if number < skipped else 0.125) for number in range(100))
    assert seconds_of_loading(slow_start, skipped, a_clock(work), limit=1000.0) == pytest.approx(0.125)


def test_the_measurement_of_a_slow_loader_ends_at_the_limit() -> None:
    work: list[float] = []

    def batches() -> Iterator[int]:
        for number in itertools.count():
            work.append(2.0)
            yield number

    assert seconds_of_loading(batches(), 5, a_clock(work), limit=3.0) == pytest.approx(2.0)
    assert len(work) == 2


class Files:
    """Samples of 10,000 bytes in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for index in range(40):
            (folder / str(index)).write_bytes(bytes(10_000))

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor(list((self.folder / str(index)).read_bytes()[:4])), 0


def test_the_bytes_of_a_sample_are_those_of_its_file(tmp_path: Path) -> None:
    prepare = Prepare(torch.device("cpu"))
    order = BatchOrder(40, 8, None, 0)
    loader: Loader = StreamingLoader(Files(tmp_path), order, prepare)
    assert bytes_of_files(loader) == pytest.approx(10_000, rel=0.05)
    held = Store.of(TensorDataset(torch.zeros(40, 3), torch.zeros(40)))
    assert bytes_of_files(SlicingLoader(held, order, prepare)) == 0


def test_the_bytes_of_unreadable_samples_are_unknown(tmp_path: Path) -> None:
    dataset = Files(tmp_path)
    (tmp_path / "0").unlink()
    assert bytes_of_files(StreamingLoader(dataset, BatchOrder(40, 8, None, 0), Prepare(torch.device("cpu")))) is None


@pytest.mark.parametrize(
    "overrides", [["limit_batches=4"], ["limit_batches=4", "data.cache=none", "data.num_workers=1"]]
)
@pytest.mark.usefixtures("here")
def test_check_measures_the_costs_of_a_step(overrides: list[str]) -> None:
    report = check(compose_and_repair(["model=mlp", "model.hidden=[8]", *overrides]), 0.3)
    assert report.error() is None
    assert report.scaling is not None
    costs = report.scaling.costs
    trained = 3 * 32 * 32 * 8 + 8 + 8 * 10 + 10
    assert costs.gradients == 4 * trained
    assert costs.reads_ahead is ("data.num_workers=1" in overrides)
    assert costs.compute > 0
    assert costs.loader > 0
    assert costs.read_bytes == 0
    assert report.scaling.batch_size == 32
    assert report.scaling.links == {}  # of CPUs


def test_the_command_prints_the_estimates_for_several_devices(forked: Command) -> None:
    argv = ["check", "limit_batches=2", "--seconds", "0.1"]
    content = json.loads(forked(*argv, "--json").stdout)
    rows = content["scaling"]["estimates"]
    assert [row["devices"] for row in rows] == [1, 2, 4, 8]
    assert [row["samples"] for row in rows] == [32, 16, 8, 4]
    shown = forked(*argv).stdout
    assert "a step with batch_size=32 on several devices takes at least:" in shown
    assert [line.split()[0] for line in shown.splitlines() if line.endswith("compute")] == ["1", "2", "4", "8"]
    assert json.loads(forked("check", "limit_batches=2", "--seconds", "0", "--json").stdout)["scaling"] is None
