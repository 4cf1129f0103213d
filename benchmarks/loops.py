"""The loops that are raced: by hand as tutorials have it, by hand as fast as a bare script goes, and trainkit."""

from __future__ import annotations

from typing import Any

from benchmarks.contest import Job, Lap

_lap: Any = None  # of this process, for the hook that trainkit builds from its config


def pictures(job: Job) -> Any:
    """The data set of the tutorials: an image of PIL at a time, and `ToTensor`."""
    import numpy as np
    from PIL import Image
    from torch.utils.data import Dataset
    from torchvision.transforms import ToTensor

    with np.load(job.data) as arrays:
        x, y = arrays["X"].transpose(0, 2, 3, 1).copy(), arrays["y"]

    class Pictures(Dataset[Any]):
        to_tensor = ToTensor()

        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, index: int) -> Any:
            return self.to_tensor(Image.fromarray(x[index])), int(y[index])

    return Pictures()


class Shuffled:
    """trainkit's order of each epoch, so that losses can be compared."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed, self.epoch = samples, seed, 0

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Any:
        from trainkit.data.loaders import epoch_order

        order = epoch_order(self.samples, self.seed, self.epoch)
        self.epoch += 1
        return iter(order.tolist())


def toy_cnn(job: Job) -> Any:
    """The model, with trainkit's initial weights."""
    import torch

    from trainkit.models import ToyCNN

    torch.manual_seed(job.seed)
    return ToyCNN()


def tutorial(job: Job, lap: Lap) -> None:
    """The loop of every tutorial: DataLoader, PIL, ToTensor, `.item()` each step."""
    from torch.utils.data import DataLoader

    data = pictures(job)
    by_hand(job, lap, toy_cnn(job), DataLoader(data, job.batch_size, sampler=Shuffled(len(data), job.seed)))


def by_hand(job: Job, lap: Lap, model: Any, loader: Any) -> None:
    """The loop itself."""
    import torch
    from torch import nn

    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=job.lr)
    lap()
    for _ in range(job.epochs):
        total = 0.0
        for inputs, targets in loader:
            loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(targets)
        lap(total / len(loader.dataset))


def bare(job: Job, lap: Lap) -> None:
    """What a bare script reaches: uint8 in memory, batches sliced, channels_last, fused SGD, sums in tensors."""
    import contextlib

    import numpy as np
    import torch
    from torch import nn

    from trainkit.data.loaders import epoch_order

    with np.load(job.data) as arrays:
        x, y = torch.from_numpy(arrays["X"].transpose(0, 2, 3, 1).copy()), torch.from_numpy(arrays["y"])
    model, loss_fn = toy_cnn(job).to(memory_format=torch.channels_last), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=job.lr, fused=True)
    bf16 = torch.autocast("cpu", torch.bfloat16) if job.precision == "bf16" else contextlib.nullcontext()
    lap()
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
        lap(total.item() / len(x))


def same_parts(job: Job, lap: Lap) -> None:
    """The loader, model and optimizer of trainkit in a bare loop: what the rest of it costs is the difference."""
    from trainkit.build import session as build

    session = build.build_session(config(job))
    state, loader = session.state, session.train
    model, loss_fn, optimizer = state.objects.model, state.objects.loss_fn, state.objects.optimizer
    model.train()
    lap()
    for epoch in range(job.epochs):
        state.begin_epoch()
        for inputs, targets in loader.batches(epoch):
            with state.objects.autocast:
                loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state.progress.loss.update(loss, weight=len(inputs))
        lap(state.progress.loss.item())


def trainkit(job: Job, lap: Lap) -> None:
    """The whole of trainkit from a config, with metrics, history, checkpoints and a line an epoch."""
    import trainkit

    global _lap
    _lap = lap
    trainkit.train(config(job, "+hooks.lap._target_=benchmarks.loops.Announce"))


def config(job: Job, *overrides: str) -> Any:
    """The config of the job."""
    import trainkit

    keys = {"batch_size": job.batch_size, "epochs": job.epochs, "precision": job.precision, "lr": job.lr}
    chosen = [
        "model=toy_cnn",
        "optim=sgd",
        "data=arrays",
        "data.split=off",
        f"data.file={job.data}",
        f"seed={job.seed}",
    ]
    return trainkit.compose([*chosen, *(f"{key}={value}" for key, value in keys.items()), *overrides])


class Announce:
    """The hook that tells the race of each epoch."""

    def on_start(self, state: Any) -> None:  # noqa: ARG002
        """Ready."""
        _lap()

    def on_epoch(self, state: Any, metrics: dict[str, Any]) -> None:  # noqa: ARG002
        """An epoch is over; its checkpoint belongs to the next, and the last one's to none."""
        _lap(metrics["train/loss"])
