"""Compare trainkit with the tutorial's loop, Lightning, Accelerate, Ignite and skorch: samples per second and losses.

    uv pip install --group peers
    python -m benchmarks.peers [--models toy_cnn resnet18 char_gpt] [--epochs 6] [--scale 1.0] [--data FILE.npz]

The models are the toy CNN on 5,000 images of 32x32 pixels with SGD, ResNet-18 on 640 images of 64x64 with SGD and
momentum, and a GPT of 4 layers, 128 wide, on 1,200 windows of 64 characters with AdamW. The batches have 32, 32 and 12
samples. `--scale` changes the numbers of samples.

All loops train the same job on the CPU: data set, order of samples, initial weights, optimizer, and the exact mean
loss of each epoch. Each peer is used as in its documentation, without logger, checkpoints and progress bar. trainkit
keeps its metrics, history and checkpoints; a second row is without checkpoints. The loops take turns, an epoch each. A
ratio compares a loop with the tutorial's in the same turn; the table has the median and the quartiles. A peer that is
not installed is skipped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import loops
from benchmarks.interleave import (
    Entry,
    Job,
    Loop,
    Reporter,
    describe_machine,
    make_images_file,
    markdown_table,
    run_interleaved,
)


def lightning(job: Job, report: Reporter) -> None:
    """Train with Lightning's Trainer; `self.log` computes the mean."""
    import logging
    import warnings

    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import LambdaCallback
    from torch import nn

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_fn = loops.make_model(job), nn.CrossEntropyLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Any:  # noqa: ARG002
            inputs, targets = batch
            loss = self.loss_fn(self.model(inputs), targets)
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(inputs))
            return loss

        def configure_optimizers(self) -> Any:
            return loops.make_optimizer(job, self.parameters())

    # Lightning warns about the number of workers and lists the hardware.
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    report_epochs = LambdaCallback(
        on_train_start=lambda trainer, module: report(),  # noqa: ARG005
        on_train_epoch_end=lambda trainer, module: report(trainer.callback_metrics["loss"].item()),  # noqa: ARG005
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=job.epochs,
        callbacks=[report_epochs],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loops.make_loader(job))


def accelerate(job: Job, report: Reporter) -> None:
    """Train with the tutorial's loop and the changes that Accelerate asks for."""
    from accelerate import Accelerator
    from torch import nn

    accelerator = Accelerator(cpu=True)
    model, loss_fn = loops.make_model(job), nn.CrossEntropyLoss()
    optimizer = loops.make_optimizer(job, model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loops.make_loader(job))
    report()
    for _ in range(job.epochs):
        total = 0.0
        for inputs, targets in loader:
            loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            total += loss.item() * len(inputs)
        report(total / len(loader.dataset))


def ignite(job: Job, report: Reporter) -> None:
    """Train with Ignite's supervised trainer and a handler that computes the mean."""
    from ignite.engine import Events, create_supervised_trainer
    from torch import nn

    model, loader = loops.make_model(job), loops.make_loader(job)
    optimizer = loops.make_optimizer(job, model.parameters())
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

    def report_epoch() -> None:
        nonlocal total
        report(total / len(loader.dataset))
        total = 0.0

    trainer.add_event_handler(Events.STARTED, lambda: report())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, add)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, report_epoch)
    trainer.run(loader, max_epochs=job.epochs)


def skorch(job: Job, report: Reporter) -> None:
    """Train with the classifier of skorch; its history has the mean."""
    import torch
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback
    from torch import nn

    class ReportEpochs(Callback):
        def on_train_begin(self, net: Any, **kwargs: Any) -> None:  # noqa: ARG002
            report()

        def on_epoch_end(self, net: Any, **kwargs: Any) -> None:  # noqa: ARG002
            report(float(net.history[-1, "train_loss"]))

    data, (optimizer, options) = loops.make_dataset(job), loops.OPTIMIZERS[job.model]
    net = NeuralNetClassifier(
        loops.make_model(job),  # skorch trains an instance without resetting its weights
        criterion=nn.CrossEntropyLoss,  # the default is NLLLoss, for models that end in a softmax
        optimizer=getattr(torch.optim, optimizer),
        **{f"optimizer__{key}": value for key, value in {"lr": job.lr, **options}.items()},
        batch_size=job.batch_size,
        max_epochs=job.epochs,
        iterator_train__sampler=loops.TrainkitSampler(len(data), job.seed),
        train_split=None,
        callbacks=[ReportEpochs()],
        verbose=0,
    )
    net.fit(data, y=None)


LOOPS: dict[str, tuple[Loop, str]] = {  # name -> the loop and the distribution that it needs
    "the tutorial's loop": (loops.tutorial, "torch"),
    "trainkit": (loops.trainkit, "trainkit"),
    "trainkit, checkpoint=off": (loops.trainkit_without_checkpoints, "trainkit"),
    "Lightning": (lightning, "lightning"),
    "Accelerate": (accelerate, "accelerate"),
    "Ignite": (ignite, "pytorch-ignite"),
    "skorch": (skorch, "skorch"),
}

# model -> samples, and samples of a batch
SIZES = {"toy_cnn": (5000, 32), "resnet18": (640, 32), "char_gpt": (1200, 12)}


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--data", help="an .npz file with X (N, 3, 32, 32) uint8 and y")
    args = parser.parse_args()
    versions, missing = {}, []
    for name, (_, distribution) in LOOPS.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            missing.append(distribution)
    if missing:
        print(
            f"skipped, because they are not installed: {', '.join(missing)} (uv pip install --group peers)",
            file=sys.stderr,
        )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            samples, batch_size = max(2 * SIZES[model][1], round(args.scale * SIZES[model][0])), SIZES[model][1]
            job = Job(_data_of(model, samples, args.data, Path(folder)), batch_size, args.epochs, model=model)
            entries = run_interleaved(Entry(name, LOOPS[name][0], job) for name in versions)
            reference = entries["the tutorial's loop"]
            for name, entry in entries.items():
                speed, difference = f"{samples / entry.median:,.0f}", f"{entry.loss_difference(reference):.1e}"
                rows.append([model, name, versions[name], speed, entry.ratio(reference), difference])
    print(f"{describe_machine()}; {args.epochs} epochs\n")
    print(markdown_table(["model", "loop", "version", "samples/s", "ratio", "loss differs by"], rows))


def _data_of(model: str, samples: int, data: str | None, folder: Path) -> str:
    if model == "char_gpt":
        return str(samples)
    return make_images_file(
        samples, data and str(Path(data).resolve()), folder, enlarge=2 if model == "resnet18" else 1
    )


if __name__ == "__main__":
    main()
