"""The loops that are compared: by hand as in tutorials, by hand as fast as possible, and trainkit."""

from __future__ import annotations

from typing import Any

from benchmarks.interleave import Job, Reporter

OVERRIDES = {
    "toy_cnn": ["model=toy_cnn"],
    "resnet18": ["model=torchvision", "model.name=resnet18"],
    "char_gpt": ["model=gpt"],
}
# model -> the class of its optimizer in torch.optim, and its options: what the model is usually trained with
OPTIMIZERS: dict[str, tuple[str, dict[str, float]]] = {
    "toy_cnn": ("SGD", {}),
    "resnet18": ("SGD", {"momentum": 0.9}),
    "char_gpt": ("AdamW", {"lr": 0.001, "weight_decay": 0.01}),
}
_reporter: Any = None  # of this process; trainkit builds `ReportEpochs` from the config, without arguments


def pil_images(job: Job) -> Any:
    """Return the data set of the tutorials: PIL images and `ToTensor`, sample by sample."""
    import numpy as np
    from PIL import Image
    from torch.utils.data import Dataset
    from torchvision.transforms import ToTensor

    with np.load(job.data) as arrays:
        x, y = arrays["X"].transpose(0, 2, 3, 1).copy(), arrays["y"]

    class PilImages(Dataset[Any]):
        to_tensor = ToTensor()

        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, index: int) -> Any:
            return self.to_tensor(Image.fromarray(x[index])), int(y[index])

    return PilImages()


class TrainkitSampler:
    """Samples in trainkit's order of each epoch, so that losses can be compared."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed, self.epoch = samples, seed, 0

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Any:
        from trainkit.data.loaders import epoch_order

        order = epoch_order(self.samples, self.seed, self.epoch)
        self.epoch += 1
        return iter(order.tolist())


def windows(number: int) -> Any:
    """Return the first windows of 64 characters of a text."""
    from trainkit.data import text

    data = text("package:coriolanus.txt", stride=32)
    data.tensors = tuple(tensor[:number] for tensor in data.tensors)
    data.lengths = data.lengths[:number]
    return data


def make_dataset(job: Job) -> Any:
    """Return the data set of the loops by hand."""
    return windows(int(job.data)) if job.model == "char_gpt" else pil_images(job)


def make_model(job: Job) -> Any:
    """Return the model with trainkit's initial weights."""
    import torch

    from trainkit.models import GPT, ToyCNN

    torch.manual_seed(job.seed)
    if job.model == "resnet18":
        import torchvision

        return torchvision.models.resnet18(num_classes=10)
    return ToyCNN() if job.model == "toy_cnn" else GPT(len(windows(2).classes), context=64)


def make_optimizer(job: Job, params: Any) -> Any:
    """Return the optimizer of the loops by hand."""
    import torch

    name, options = OPTIMIZERS[job.model]
    return getattr(torch.optim, name)(params, **{"lr": job.lr, **options})


def make_loader(job: Job) -> Any:
    """Return the `DataLoader` of the tutorials, in trainkit's order."""
    from torch.utils.data import DataLoader

    data = make_dataset(job)
    return DataLoader(data, job.batch_size, sampler=TrainkitSampler(len(data), job.seed))


def tutorial(job: Job, report: Reporter) -> None:
    """Train with the loop of most tutorials: DataLoader, PIL, ToTensor, `.item()` at each step."""
    train_by_hand(job, report, make_model(job), make_loader(job))


def train_by_hand(job: Job, report: Reporter, model: Any, loader: Any) -> None:
    """Train with the usual optimizer and cross entropy, and read the loss at each step."""
    from torch import nn

    loss_fn = nn.CrossEntropyLoss()
    optimizer = make_optimizer(job, model.parameters())
    report()
    for _ in range(job.epochs):
        total = 0.0
        for inputs, targets in loader:
            loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(targets)
        report(total / len(loader.dataset))


def bare_script(job: Job, report: Reporter) -> None:
    """Train as fast as a script can: uint8 in memory, sliced batches, channels_last, fused SGD, sums in tensors."""
    import contextlib

    import numpy as np
    import torch
    from torch import nn

    from trainkit.data.loaders import epoch_order

    with np.load(job.data) as arrays:
        x, y = torch.from_numpy(arrays["X"].transpose(0, 2, 3, 1).copy()), torch.from_numpy(arrays["y"])
    model, loss_fn = make_model(job).to(memory_format=torch.channels_last), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=job.lr, fused=True)
    bf16 = torch.autocast("cpu", torch.bfloat16) if job.precision == "bf16" else contextlib.nullcontext()
    report()
    for epoch in range(job.epochs):
        total = torch.zeros((), dtype=torch.float64)
        for indices in epoch_order(len(x), job.seed, epoch).split(job.batch_size):
            inputs, targets = x[indices].permute(0, 3, 1, 2).to(torch.float32).div_(255), y[indices]
            with bf16:
                loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(inputs)
        report(total.item() / len(x))


def trainkit_objects(job: Job, report: Reporter) -> None:
    """Train with trainkit's loader, model and optimizer in a bare loop; the difference is the cost of the rest."""
    from trainkit.build.session import build_session

    session = build_session(compose(job).settings)
    state, loader = session.state, session.train
    model, loss_fn, optimizer = state.objects.model, state.objects.loss_fn, state.objects.optimizer
    model.train()
    report()
    for epoch in range(job.epochs):
        state.begin_epoch()
        for inputs, targets in loader.batches(epoch):
            with state.objects.autocast:
                loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state.progress.loss.update(loss, weight=len(inputs))
        report(state.progress.loss.item())


def trainkit(job: Job, report: Reporter, *overrides: str) -> None:
    """Train with all of trainkit, with metrics, history, checkpoints and a line for each epoch."""
    import trainkit

    set_reporter(report)
    trainkit.train(compose(job, "+hooks.report._target_=benchmarks.loops.ReportEpochs", *overrides))


def trainkit_without_checkpoints(job: Job, report: Reporter) -> None:
    """Train with trainkit as the other libraries train in a comparison: without checkpoints."""
    trainkit(job, report, "checkpoint=off")


def compose(job: Job, *overrides: str) -> Any:
    """Return the composed config of a job, with its settings."""
    from trainkit.config.compose import compose_run

    name, options = OPTIMIZERS[job.model]
    chosen = [f"optim={name.lower()}", "data.split=off", *OVERRIDES[job.model]]
    if job.model == "char_gpt":
        chosen += [
            "data=text",
            "data.val=null",
            f"data.train={{_target_: benchmarks.loops.windows, number: {job.data}}}",
        ]
    else:
        chosen += ["data=arrays", f"data.file={job.data}"]
    keys = {
        "batch_size": job.batch_size,
        "epochs": job.epochs,
        "precision": job.precision,
        "seed": job.seed,
        **{f"optim.{key}": value for key, value in {"lr": job.lr, **options}.items()},
    }
    return compose_run([*chosen, *(f"{key}={value}" for key, value in keys.items()), *overrides])


def set_reporter(report: Reporter) -> None:
    """Set the reporter that `ReportEpochs` uses in this process."""
    global _reporter
    _reporter = report


class ReportEpochs:
    """A hook that reports each epoch. A checkpoint counts for the next epoch, and the last checkpoint is not timed."""

    def on_start(self, state: Any) -> None:  # noqa: ARG002
        """Report that the training is ready."""
        _reporter()

    def on_epoch(self, state: Any, metrics: dict[str, Any]) -> None:  # noqa: ARG002
        """Report the loss of the epoch."""
        _reporter(metrics["train/loss"])
