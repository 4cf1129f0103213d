"""Estimate the time of a step on several devices, and what bounds it: computing, the loader or the network.

The batch is divided among the devices, so computing and loading take less time with more devices, and the network takes
more. The estimates are lower bounds: a link has its nominal rate, and the delay of each message is left out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

DEVICES = (1, 2, 4, 8)
# Links between GPUs, and the bytes per second that each device sends over them while it receives as many.
LINKS = {"NVLink": 450e9, "InfiniBand": 50e9, "PCIe": 32e9, "100 GbE": 12.5e9, "10 GbE": 1.25e9}
GPU_NOTE = "note: each link has its nominal rate; NVLink and PCIe connect the GPUs of one machine"
CPU_NOTE = (
    "note: without the network, and for a machine like this one for each device: ranks of one machine share its cores"
)


@dataclass
class Costs:
    """What a step of the whole batch on one device costs.

    Attributes:
        compute: seconds of a step, without its wait for the loader.
        loader: seconds that the loader takes for a batch if nothing else runs.
        reads_ahead: whether processes read the next batches during a step.
        read_bytes: of a sample, from files; 0 if samples are held in memory; None: unknown.
        gradients: bytes of the gradients.
        gathered: bytes that are gathered for a forward and a backward pass if the weights are divided.
        on_gpu: whether the device is a GPU, for which links are estimated.
    """

    compute: float = 0.0
    loader: float = 0.0
    reads_ahead: bool = False
    read_bytes: float | None = None
    gradients: int = 0
    gathered: int = 0
    on_gpu: bool = False


@dataclass
class Bound:
    """A lower bound for the time of a step.

    Attributes:
        network: seconds of the network.
        step: seconds of the step.
        part: the part that takes longest: `compute`, `loader` or `network`.
    """

    network: float
    step: float
    part: str


@dataclass
class Estimate:
    """The estimate for a number of devices.

    Attributes:
        devices: the number.
        samples: of the largest share of a batch.
        sent: bytes that each device sends in a step, and receives.
        compute: seconds of the computing.
        loader: seconds of the loader.
        without_network: the bound if the network takes no time.
        over: link -> the bound, if its slowest link is this one.
    """

    devices: int
    samples: int
    sent: float
    compute: float
    loader: float
    without_network: Bound
    over: dict[str, Bound] = field(default_factory=dict)


@dataclass
class Scaling:
    """The estimates for several numbers of devices.

    Attributes:
        batch_size: of the config.
        distributed: how the ranks sum gradients, as in the config.
        links: the names of `LINKS` and their bytes per second; empty if the devices are CPUs.
        costs: on one device.
        estimates: by number of devices.
        notes: what the estimates assume.
    """

    batch_size: int
    distributed: str
    links: dict[str, float]
    costs: Costs
    estimates: list[Estimate]
    notes: list[str]

    def as_dict(self) -> dict[str, object]:
        """Return the estimates in plain containers."""
        return asdict(self)


def sent_bytes(devices: int, scattered: float, gathered: float) -> float:
    """Return the bytes that each device sends over a ring, and receives, in a reduce-scatter and an all-gather.

    After a reduce-scatter, each device has the sum of its part of the gradients: it has sent all parts but one. In an
    all-gather the parts of all devices are collected, and again each device sends all parts but one. Both together,
    of the same bytes, are an all-reduce.

    Args:
        devices: the number of devices.
        scattered: the bytes that are summed.
        gathered: the bytes that are collected.
    """
    return (devices - 1) / devices * (scattered + gathered)


def estimate_scaling(
    costs: Costs, batch_size: int, micro_batch: int | None = None, distributed: str = "auto"
) -> Scaling:
    """Return the estimates for the numbers of `DEVICES`.

    Args:
        costs: of a step on one device.
        batch_size: the number of samples of a step.
        micro_batch: the maximum number of samples of a forward pass; None: no maximum.
        distributed: `auto` sums the gradients after the backward pass, `ddp` during it; `fsdp` also divides the weights
            among the devices, and gathers them in each pass.
    """
    sharded, overlaps = distributed == "fsdp", distributed in ("ddp", "fsdp")
    links = LINKS if costs.on_gpu else {}
    estimates = []
    for devices in DEVICES:
        samples = -(-batch_size // devices)
        part = samples / batch_size
        passes = -(-samples // (micro_batch or samples)) if sharded else 1
        sent = passes * sent_bytes(devices, costs.gradients, costs.gathered if sharded else costs.gradients)
        compute, loader = part * costs.compute, part * costs.loader

        def bound(network: float, compute: float = compute, loader: float = loader) -> Bound:
            return find_bound(compute, loader, network, reads_ahead=costs.reads_ahead, overlaps=overlaps)

        over = {name: bound(sent / rate) for name, rate in links.items()}
        estimates.append(Estimate(devices, samples, sent, compute, loader, bound(0.0), over))
    return Scaling(batch_size, distributed, dict(links), costs, estimates, [GPU_NOTE if links else CPU_NOTE])


def find_bound(compute: float, loader: float, network: float, *, reads_ahead: bool, overlaps: bool) -> Bound:
    """Return the bound for a step.

    Args:
        compute: its seconds.
        loader: its seconds.
        network: its seconds.
        reads_ahead: whether the loader works during the rest of the step.
        overlaps: whether the network works during the computing; otherwise it begins after the backward pass.
    """
    parts = {"compute": compute, "loader": loader, "network": network}
    rest = max(compute, network) if overlaps else compute + network
    step = max(rest, loader) if reads_ahead else rest + loader
    return Bound(network, step, max(parts, key=lambda name: parts[name]))
