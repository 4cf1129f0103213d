"""The tutorial's loop against trainkit, Lightning, Accelerate, Ignite and skorch: samples a second and losses.

    uv pip install --group peers
    python -m benchmarks.peers [--samples 5000] [--epochs 6] [--batch-size 32] [--data FILE.npz]

All train the same job on the CPU: data set, order of samples, initial weights, SGD, and the exact mean loss of
each epoch. Each peer is used as its documentation has it, without logger, checkpoints and progress bar; trainkit
keeps its metrics, history and checkpoints. They take turns, an epoch each; ratios are of the medians. A peer that
is not installed is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import loops
from benchmarks.contest import Job, Lane, Lap, Loop, images, machine, race, table


def loader_of(job: Job) -> Any:
    """The tutorial's DataLoader."""
    from torch.utils.data import DataLoader

    data = loops.pictures(job)
    return DataLoader(data, job.batch_size, sampler=loops.Shuffled(len(data), job.seed))


def lightning(job: Job, lap: Lap) -> None:
    """Lightning's Trainer; `self.log` takes the mean."""
    import logging
    import warnings

    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import LambdaCallback
    from torch import nn

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_fn = loops.toy_cnn(job), nn.CrossEntropyLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Any:  # noqa: ARG002
            inputs, targets = batch
            loss = self.loss_fn(self.model(inputs), targets)
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(inputs))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=job.lr)

    # Advice on workers, and what hardware there is.
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    announce = LambdaCallback(
        on_train_start=lambda trainer, module: lap(),  # noqa: ARG005
        on_train_epoch_end=lambda trainer, module: lap(trainer.callback_metrics["loss"].item()),  # noqa: ARG005
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=job.epochs,
        callbacks=[announce],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader_of(job))


def accelerate(job: Job, lap: Lap) -> None:
    """The tutorial's loop with what Accelerate asks to change in it."""
    import torch
    from accelerate import Accelerator
    from torch import nn

    accelerator = Accelerator(cpu=True)
    model, loss_fn = loops.toy_cnn(job), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=job.lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader_of(job))
    lap()
    for _ in range(job.epochs):
        total = 0.0
        for inputs, targets in loader:
            loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            total += loss.item() * len(inputs)
        lap(total / len(loader.dataset))


def ignite(job: Job, lap: Lap) -> None:
    """Ignite's supervised trainer, and a handler that takes the mean."""
    import torch
    from ignite.engine import Events, create_supervised_trainer
    from torch import nn

    model, loader = loops.toy_cnn(job), loader_of(job)
    optimizer = torch.optim.SGD(model.parameters(), lr=job.lr)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        output_transform=lambda x, y, y_pred, loss: loss.item() * len(x),  # noqa: ARG005
    )
    total = 0.0

    def add(engine: Any) -> None:
        nonlocal total
        total += engine.state.output

    def announce() -> None:
        nonlocal total
        lap(total / len(loader.dataset))
        total = 0.0

    trainer.add_event_handler(Events.STARTED, lambda: lap())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, add)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, announce)
    trainer.run(loader, max_epochs=job.epochs)


def skorch(job: Job, lap: Lap) -> None:
    """The classifier of skorch; its history has the mean."""
    import torch
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback
    from torch import nn

    class Announce(Callback):
        def on_train_begin(self, net: Any, **kwargs: Any) -> None:  # noqa: ARG002
            lap()

        def on_epoch_end(self, net: Any, **kwargs: Any) -> None:  # noqa: ARG002
            lap(float(net.history[-1, "train_loss"]))

    data = loops.pictures(job)
    net = NeuralNetClassifier(
        loops.toy_cnn(job),  # an instance is trained as it is, with its weights
        criterion=nn.CrossEntropyLoss,  # the default is NLLLoss, for models that end in a softmax
        optimizer=torch.optim.SGD,
        lr=job.lr,
        batch_size=job.batch_size,
        max_epochs=job.epochs,
        iterator_train__sampler=loops.Shuffled(len(data), job.seed),
        train_split=None,
        callbacks=[Announce()],
        verbose=0,
    )
    net.fit(data, y=None)


RACED: dict[str, tuple[Loop, str]] = {  # and the distribution that a loop needs
    "the tutorial's loop": (loops.tutorial, "torch"),
    "trainkit": (loops.trainkit, "trainkit"),
    "Lightning": (lightning, "lightning"),
    "Accelerate": (accelerate, "accelerate"),
    "Ignite": (ignite, "pytorch-ignite"),
    "skorch": (skorch, "skorch"),
}


def main() -> None:
    """Race, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--data", help="an .npz file with X (N, 3, 32, 32) uint8 and y")
    args = parser.parse_args()
    versions, missing = {}, []
    for name, (_, distribution) in RACED.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            missing.append(distribution)
    if missing:
        print(f"Left out, not installed: {', '.join(missing)} (uv pip install --group peers)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        data = images(args.samples, args.data and str(Path(args.data).resolve()), Path(folder))
        job = Job(data, args.batch_size, args.epochs)
        lanes = race(Lane(name, RACED[name][0], job) for name in versions)
    first = lanes["the tutorial's loop"]
    rows = []
    for name, lane in lanes.items():
        off = max(abs(mine - its) / its for mine, its in zip(lane.losses, first.losses, strict=True))
        speed = f"{args.samples / lane.median:,.0f}"
        rows.append([name, versions[name], speed, f"{first.median / lane.median:.2f}", f"{off:.1e}"])
    print(f"{machine()}; {args.samples:,} images, batches of {args.batch_size}, {args.epochs} epochs\n")
    print(table(["loop", "version", "samples/s", "ratio", "loss differs by"], rows))


if __name__ == "__main__":
    main()
