"""Every file under conf/ composes, builds and trains."""

from __future__ import annotations

import gzip
import importlib.util
import inspect
import math
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.lr_scheduler import LRScheduler

from tests.helpers import compose_settings
from trainkit import compose, train
from trainkit.build import session as build
from trainkit.config.schema import UNNAMED
from trainkit.config.search_path import CONF
from trainkit.training.loop import fit

# tests/test_debugging.py trains the choices of debug, which refuse the overrides of these tests.
CHOICES = sorted(f"{file.parent.name}={file.stem}" for file in CONF.glob("*/*.yaml") if file.parent.name != "debug")
OPTIMIZERS = [choice for choice in CHOICES if choice.startswith("optim=")]
GAN = ["model=dcgan", "loss=bce", "optim=gan", "training_step=trainkit.steps.gan", "data.split=off"]
LOSSES = {  # the overrides that each loss needs
    "cross_entropy": [],
    "nll": [],
    "mse": ["data=line", "model=linear"],
    "l1": ["data=line", "model=linear"],
    "smooth_l1": ["data=line", "model=linear"],
    "bce": ["data=line", "data.train.slope=0.2", "model=linear"],
    "identity": ["data=line", "model=polynomial"],
    "nt_xent": ["model=simclr", "training_step=trainkit.steps.two_views", "evaluation_step=${training_step}"],
    "from_model": ["data=line", "model=confrates.Own", "data.inputs=[0,1]", "data.targets=1"],
}
DATA = {  # the overrides that each data set needs
    "line": ["model=linear", "loss=mse"],
    "arrays": ["data.file=arrays.npz", "model=mlp"],
    "image_folder": ["data.root=images"],
    "table": ["data.file=package:diabetes.csv", "data.target=progression", "model=mlp", "loss=mse"],
    "text": ["model=lstm_lm"],
    "shapes": ["model=unet"],
    "boxes": ["experiment=detection"],
    "huggingface": ["data.path=table.jsonl", "data.target=y", "model=linear", "loss=mse"],
}
MODELS = {
    "linear": ["data=line", "loss=mse"],
    "polynomial": ["data=line", "loss=identity"],
    "unet": ["data=shapes"],
    "vae": ["loss=bce", "training_step=trainkit.steps.vae", "evaluation_step=${training_step}"],
    "dcgan": GAN,
    "faster_rcnn": ["experiment=detection"],
    "simclr": ["loss=nt_xent", *LOSSES["nt_xent"]],
    "lstm_lm": ["data=text", "data.sampler=contiguous"],
    "gpt": ["data=text"],
    "torchvision": ["model.name=squeezenet1_1"],
    "timm": ["model.name=resnet10t"],
    "lora": ["model.model={_target_: trainkit.models.ToyCNN}"],
    "huggingface": [
        "data=huggingface",
        "data.path=tokens.jsonl",
        "data.target=labels",
        "data.classes=2",
        "model.config={model_type: bert, vocab_size: 9, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2}",
        "loss=from_model",
    ],
}
COMPANIONS = {
    "metrics": {"regression": ["data=line", "model=linear", "loss=mse"]},
    "loss": LOSSES,
    "data": DATA,
    "model": MODELS,
    "optim": {"muon": ["model=mlp", "model.bias=false"], "gan": GAN},
    "scheduler": {name: ["scheduler.lr_lambda=confrates.same"] for name in ("lambda", "multiplicative")},
}


EXTRAS = {  # the packages that choices need
    "data=huggingface": "datasets",
    "model=huggingface": "transformers",
    "model=timm": "timm",
    "experiment=vit": "timm",
}
CODE = """
import torch

def same(step): return 1.0

class Own(torch.nn.Linear):
    def __init__(self): super().__init__(1, 1)
    def forward(self, x, y): return {"loss": (super().forward(x) - y).square().mean()}
"""


def idx(array: np.ndarray[Any, Any]) -> bytes:
    """Return an array in the compressed file format of MNIST."""
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def downloads(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a cache folder with a few samples in the formats that torchvision downloads."""
    from torchvision import datasets

    monkeypatch.setenv("TRAINKIT_CACHE", str(here))
    for name, url in (("MNIST", datasets.MNIST), ("FashionMNIST", datasets.FashionMNIST)):
        raw = here / name / "raw"
        raw.mkdir(parents=True)
        for part, (images, labels) in zip(("train", "test"), (url.resources[:2], url.resources[2:]), strict=True):
            count = 20 if part == "train" else 10
            pixels = np.arange(count * 28 * 28, dtype=np.uint8).reshape(count, 28, 28)
            for (file, _), array in ((images, pixels), (labels, np.arange(count, dtype=np.uint8) % 10)):
                (raw / file.removesuffix(".gz")).write_bytes(gzip.decompress(idx(array)))
    checks = "torchvision.datasets.cifar.check_integrity"
    monkeypatch.setattr(checks, lambda *_: True)  # the checksums belong to the real files
    for cls, key in ((datasets.CIFAR10, "labels"), (datasets.CIFAR100, "fine_labels")):
        top = here / cls.base_folder
        top.mkdir()
        for file, _ in (*cls.train_list, *cls.test_list):
            batch = {"data": np.arange(10 * 3072, dtype=np.uint8).reshape(10, 3072), key: list(range(10))}
            (top / file).write_bytes(pickle.dumps(batch))
        names = {cls.meta["key"]: [f"class{i}" for i in range(100 if key == "fine_labels" else 10)]}
        (top / cls.meta["filename"]).write_bytes(pickle.dumps(names))
    return here


@pytest.fixture
def all_data(downloads: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder with the files that the shipped configs read."""
    (downloads / "confrates.py").write_text(CODE)
    (downloads / "table.jsonl").write_text('{"x": [0.5], "y": [1.0]}\n' * 30)
    (downloads / "tokens.jsonl").write_text('{"input_ids": [3, 4], "labels": 1}\n{"input_ids": [5], "labels": 0}\n' * 9)
    monkeypatch.setenv("HF_HOME", str(downloads / "hf"))
    rng = np.random.default_rng(0)
    np.savez(downloads / "arrays.npz", X=rng.normal(size=(30, 4)), y=np.arange(30) % 3)
    for part, name, shade in (("train", "a", 10), ("train", "b", 200), ("val", "a", 20), ("val", "b", 210)):
        folder = downloads / "images" / part / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 50), (shade, number, 0)).save(folder / f"{number}.png")
    return downloads


def with_marks(choice: str) -> Any:
    """Return a choice as a parameter: those that need an extra are slow, and skipped without it."""
    package = EXTRAS.get(choice)
    missing = package is not None and importlib.util.find_spec(package) is None
    marks = [pytest.mark.slow, pytest.mark.skipif(missing, reason=f"needs {package}")] if package else []
    return pytest.param(choice, marks=marks)


@pytest.mark.parametrize("choice", [*map(with_marks, CHOICES)])
def test_every_config_composes_builds_and_trains(choice: str, all_data: Path) -> None:  # noqa: ARG001
    group, name = choice.split("=")
    companions = COMPANIONS.get(group, {}).get(name, [])
    if choice == "experiment=distillation":
        teacher = compose(["model=mlp", "data=digits", "epochs=1", "limit_batches=1", "progress=off"])
        train(teacher, directory="runs/teacher")
    settings = compose_settings(
        [
            choice,
            *companions,
            "steps=1" if name == "char_gpt" else "epochs=1",
            "limit_batches=1",
            "device=cpu",
            "data.num_workers=0",
        ]
    )
    session = build.build_session(settings)
    fit(session.state, session.train, session.val, [*session.hooks.values()])
    assert session.state.progress.step == 1
    assert session.state.progress.best is not None
    assert math.isfinite(session.state.progress.best["train/loss"])


@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_every_optimizer_has_the_defaults_of_torch_and_takes_a_step(choice: str) -> None:
    companions = COMPANIONS["optim"].get(choice.removeprefix("optim="), ["model=mlp"])
    settings = compose_settings([choice, *companions, "epochs=1", "limit_batches=1"])
    session = build.build_session(settings)
    before = [p.detach().clone() for p in session.state.objects.model.parameters()]
    fit(session.state, session.train, session.val)
    for old, new in zip(before, session.state.objects.model.parameters(), strict=True):
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)

    if UNNAMED not in settings.optim:  # several optimizers do not use the defaults of torch
        return
    defaults = inspect.signature(type(session.state.objects.optimizer)).parameters
    for option, value in settings.optim[UNNAMED].items():
        if option not in ("_target_", "lr"):
            default = defaults[str(option)].default
            assert (tuple(value) if isinstance(default, tuple) else value) == default, option
    if choice != "optim=sgd":  # torch's 0.001 is small without momentum
        assert settings.lr == defaults["lr"].default


def test_every_dense_optimizer_of_torch_has_a_config() -> None:
    found = {name for name, cls in vars(torch.optim).items() if inspect.isclass(cls)}
    found -= {"Optimizer", "SparseAdam"}
    single = [choice for choice in OPTIMIZERS if choice not in ("optim=muon_sgd", "optim=gan")]
    shipped = {str(compose([choice]).optim["_target_"]).rpartition(".")[2] for choice in single}
    assert shipped == {name for name in found if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)}


def test_every_config_begins_with_a_description() -> None:
    for file in CONF.glob("*/*.yaml"):
        lines = [line for line in file.read_text().splitlines() if line != "# @package _global_"]
        assert lines[0].startswith("# "), file


def test_every_experiment_contains_its_command() -> None:
    for file in (CONF / "experiment").glob("*.yaml"):
        assert file.stem == "none" or f"# Command: trainkit experiment={file.stem}\n" in file.read_text(), file


def test_every_scheduler_of_torch_has_a_config() -> None:
    found = {name for name, cls in vars(torch.optim.lr_scheduler).items() if inspect.isclass(cls)}
    found = {name for name in found if issubclass(getattr(torch.optim.lr_scheduler, name), LRScheduler)}
    text = "".join(file.read_text() for file in (CONF / "scheduler").glob("*.yaml"))
    missing = {name for name in found if f"torch.optim.lr_scheduler.{name}\n" not in text}
    assert missing == {"LRScheduler", "_LRScheduler"}
