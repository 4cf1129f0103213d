"""Runs of a VAE, a GAN and SimCLR: what they report, and that a killed run resumes to the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.engine.test_length import final
from tests.helpers import KILL_MODULE, read_history
from tests.processes import Forks

DIGITS = """
import trainkit.data

class Stream:
    def __iter__(self):
        yield from trainkit.data.digits()
"""
BASE = ["limit_batches=3", "batch_size=8", "device=cpu", "report=off", "progress=plain", "checkpoint.every_steps=1"]
GAN = ["experiment=dcgan", "model.width=2", "epochs=2", *BASE]
VAE = ["experiment=vae", "model.hidden=8", "epochs=2", *BASE]
SIMCLR = ["experiment=simclr", "model.encoder.width=2", "epochs=2", *BASE]
STREAM = ["data.train._target_=streammodule.Stream", "data.val._target_=trainkit.data.digits", "steps_per_epoch=2"]
STREAM += ["data.split=off"]


def train(command: Command, directory: str, *overrides: str) -> str:
    """Train without an error; return what was printed."""
    done = command(*overrides, f"hydra.run.dir={directory}")
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def samples(run: Path) -> dict[str, bytes]:
    """Return the names and the contents of the images of a run."""
    return {file.name: file.read_bytes() for file in sorted((run / "samples").iterdir())}


@pytest.mark.parametrize("experiment", [GAN, VAE, SIMCLR], ids=["dcgan", "vae", "simclr"])
def test_a_killed_run_resumes_to_the_same_bits(
    experiment: list[str], forked: Command, forks: Forks, tmp_path: Path
) -> None:
    (tmp_path / "killmodule.py").write_text(KILL_MODULE)
    train(forked, "straight", *experiment)
    kill = "+hooks.kill={_target_: killmodule.Kill, step: 5}"  # in the middle of the second epoch
    process = forks.start(*experiment, kill, "hydra.run.dir=resumed", cwd=tmp_path)
    assert process.wait() == -signal.SIGKILL, process.stderr
    done = forked("resume", "resumed", "~hooks.kill")
    assert done.returncode == 0, done.stderr
    assert final(tmp_path / "resumed") == final(tmp_path / "straight")
    if experiment is GAN:
        images = samples(tmp_path / "straight")
        assert list(images) == ["epoch-0001.png", "epoch-0002.png"]
        assert samples(tmp_path / "resumed") == images


def test_a_vae_reports_both_parts_of_its_loss(forked: Command, tmp_path: Path) -> None:
    train(forked, "run", *VAE, "training_step={_target_: trainkit.steps.vae, beta: 2}")
    for row in read_history(tmp_path / "run"):
        for part in ("train", "val"):
            total = row[f"{part}/reconstruction"] + 2 * row[f"{part}/kl"]
            assert row[f"{part}/loss"] == pytest.approx(total, rel=1e-6)


def test_the_losses_of_a_gan_are_reported_for_each_optimizer(forked: Command, tmp_path: Path) -> None:
    train(forked, "run", *GAN)
    for row in read_history(tmp_path / "run"):
        assert row["train/loss"] == pytest.approx(row["train/discriminator"] + row["train/generator"])


def test_hooks_that_look_at_the_model_do_not_change_the_training(forked: Command, tmp_path: Path) -> None:
    for name, experiment in (("simclr", SIMCLR), ("gan", GAN)):
        hook = "probe" if name == "simclr" else "samples"
        monitor = ["monitor.metric=train/loss", "monitor.mode=min"]
        train(forked, f"{name}-with", *experiment, *monitor)
        train(forked, f"{name}-without", *experiment, *monitor, f"~hooks.{hook}")
        rows = [[row["train/loss"] for row in read_history(tmp_path / f"{name}-{way}")] for way in ("with", "without")]
        assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*SIMCLR, "micro_batch=4"], ["micro_batch=4"]),
        ([*GAN, "micro_batch=4"], ["micro_batch=4"]),
        ([*SIMCLR, "data.split=off"], ["LinearProbe needs a validation set", "write data.split=0.2"]),
        ([*SIMCLR, *STREAM], ["data.train is a stream", "use a data set with items"]),
        ([*GAN, "+hooks.samples.every=0"], ["every=0", "must be at least 1"]),
        ([*SIMCLR, "hooks.probe.part=encodr"], ["no module 'encodr'", "did you mean encoder?"]),
        (
            [*SIMCLR, "+hooks.images={_target_: trainkit.hooks.SampleImages}"],
            ["SampleImages needs a model with", "Sequential"],
        ),
    ],
)
def test_a_wrong_config_is_an_error_of_the_config(
    overrides: list[str], words: list[str], forked: Command, tmp_path: Path
) -> None:
    (tmp_path / "streammodule.py").write_text(DIGITS)
    done = forked(*overrides)
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
