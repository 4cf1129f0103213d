"""Real faults: signals, killed processes, full disks, damaged files. Each has its exit code and its message."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Command
from tests.helpers import mounted_disk, read_history
from tests.processes import Forks, Process, until
from trainkit.runs.checkpoint import Checkpoints
from trainkit.runs.snapshot import digest
from trainkit.training.metrics import CLOCKS

MODULE = '''
import os
import time
from pathlib import Path
import random
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(8, width), nn.Linear(width, 3), nn.Dropout(0.3)

    def forward(self, x):
        return self.last(self.dropout(torch.relu(self.first(x))))

class Points:
    """Random samples; reading the samples in `stuck` waits."""

    classes = ["a", "b", "c"]

    def __init__(self, size=64, wait=0.0, stuck=None):
        self.size, self.wait, self.stuck = size, wait, stuck

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if self.wait:
            time.sleep(self.wait)
        if index == self.stuck and Path("hang").exists():
            Path("stuck").touch()
            time.sleep(1000)
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(8) + float(np.random.rand()) + random.random()
        return torch.randn(8, generator=generator) + 0.1 * noise, index % 3

class Greedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.sum() * self.w * torch.empty(10**15)[0]

class Slow(Net):
    def forward(self, x):
        Path("in a step").touch()
        time.sleep(3 if Path("very slow").exists() else 0.2)
        Path("in a step").unlink()
        return super().forward(x)
'''
DATA = """
train: {_target_: faultmodule.Points}
val: {_target_: faultmodule.Points, size: 16}
"""
BASE = ["model=net", "data=points", "batch_size=8", "progress=off", "hydra.run.dir=run"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with a small model and data that may be slow."""
    (tmp_path / "faultmodule.py").write_text(MODULE)
    for name, text in (("model/net", "_target_: faultmodule.Net\nwidth: 32\n"), ("data/points", DATA)):
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / f"{name}.yaml").write_text(text)
    return tmp_path


def saved(run: Path) -> dict[str, Any]:
    """Return the newest checkpoint of a run."""
    return Checkpoints(run / "checkpoints").newest()[1]


def final(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return the hash of the final state of a run, and its history without times."""
    history = [{key: value for key, value in row.items() if key not in CLOCKS} for row in read_history(run)]
    return digest(saved(run)), history


def message_of(process: Process, code: int, *words: str) -> str:
    """Return the only message of a command with this exit code."""
    assert process.wait() == code, process.stderr
    text = process.stderr
    assert "Traceback" not in text, text
    for word in words:
        assert word in text, text
    return text


def has_saved(run: Path, step: int) -> Any:
    """Return a function that says whether a run has a checkpoint of at least this step."""
    return lambda: any(int(n.removeprefix("step-")) >= step for n in Checkpoints(run / "checkpoints").names())


# -------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_step_saves_and_sets_the_exit_code(number: int, code: int, own: Path, forks: Forks) -> None:
    argv = [*BASE, "model._target_=faultmodule.Slow", "epochs=1", "data.val=null", "limit_batches=2"]
    run = forks.start(*argv, cwd=own)
    until((own / "in a step").exists)
    run.send(number)
    name = signal.Signals(number).name
    text = message_of(run, code, f"stopped by {name}, saved as step-00000001; to continue: trainkit resume run")
    assert len(text.strip().splitlines()) == 1
    assert (saved(own / "run")["step"], saved(own / "run")["batch"]) == (1, 1)
    info = json.loads((own / "run" / "run.json").read_text())
    assert (info["status"], info["exit_code"], info["why"]) == ("stopped", code, name)
    forks.run(*argv, "hydra.run.dir=straight", cwd=own)
    forks.run("resume", "run", cwd=own)
    assert final(own / "run") == final(own / "straight")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_signal_stops_a_run_that_waits_for_data_at_once(part: str, workers: int, own: Path, forks: Forks) -> None:
    argv = [*BASE, "epochs=1", f"data.num_workers={workers}", f"+data.{part}.stuck=13"]
    (own / "hang").touch()
    run = forks.start(*argv, cwd=own)
    until((own / "stuck").exists)
    time.sleep(0.2)
    began = time.monotonic()
    run.send(signal.SIGTERM)
    message_of(run, 143, "saved as step-")
    assert time.monotonic() - began < 30
    assert saved(own / "run")["epoch"] == 0
    if part == "val":
        assert saved(own / "run")["batch"] == 8  # all batches of the epoch
    (own / "hang").unlink()
    forks.run(*argv, "hydra.run.dir=straight", cwd=own)
    forks.run("resume", "run", cwd=own)
    assert final(own / "run") == final(own / "straight")


@pytest.mark.parametrize("started", [1, 3])
def test_a_signal_during_the_start_of_workers_leaves_no_worker_behind(started: int, own: Path, forks: Forks) -> None:
    (own / "late.py").write_text(
        "import multiprocessing.process as mp, os, signal\nstart, count = mp.BaseProcess.start, [0]\n"
        "def late(self):\n    start(self)\n    count[0] += 1\n"
        f"    if count[0] == {started}:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "class Hook:\n    def on_start(self, state):\n        mp.BaseProcess.start = late\n"
        "    def on_end(self, state): ...\n"
    )
    run = forks.start(*BASE, "data.num_workers=2", "+hooks.late._target_=late.Hook", cwd=own)
    message_of(run, 143, "stopped by SIGTERM, saved as step-")
    until(lambda: not working_in(own), timeout=10)


def working_in(folder: Path) -> list[str]:
    """Return the processes with this working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").resolve() == folder.resolve():
                found.append(process.name)
    return found


def test_a_second_signal_ends_the_run_at_once_but_a_doubled_signal_counts_once(own: Path, forks: Forks) -> None:
    (own / "very slow").touch()
    argv = [*BASE[:-1], "model._target_=faultmodule.Slow", "data.val=null", "limit_batches=1", "epochs=1"]
    for name, pause in (("doubled", 0.0), ("second", 1.3)):
        run = forks.start(*argv, f"hydra.run.dir={name}", cwd=own)
        until((own / "in a step").exists)
        run.send(signal.SIGTERM)
        time.sleep(pause)
        run.send(signal.SIGTERM)
        assert run.wait() == (143 if name == "doubled" else -signal.SIGTERM), run.stderr
        assert saved(own / name)["step"] == (1 if name == "doubled" else 0)
        (own / "in a step").unlink(missing_ok=True)


def test_an_ignored_signal_stays_ignored(own: Path, forks: Forks) -> None:
    run = forks.start(*BASE, "epochs=2", "+data.train.wait=0.005", cwd=own, IGNORED="SIGHUP")
    until(has_saved(own / "run", 0))
    run.send(signal.SIGHUP)
    assert run.wait() == 0, run.stderr


def test_a_closed_terminal_does_not_end_the_training(own: Path, forks: Forks) -> None:
    for progress in ("rich", "tqdm", "plain"):
        argv = [*BASE[:-2], f"progress={progress}", "epochs=1", f"hydra.run.dir={progress}"]
        hook = "+hooks.gone._target_=gone.Gone"
        (own / "gone.py").write_text(
            "import os\nclass Gone:\n    def on_step(self, state):\n        os.close(2)\n"
            "        os.open('/dev/full', os.O_WRONLY)\n"
        )
        run = forks.start(*argv, hook, cwd=own)
        assert run.wait() == 0
        assert json.loads((own / progress / "run.json").read_text())["status"] == "completed"


def test_a_signal_to_the_process_group_leaves_the_data_to_the_current_step(own: Path) -> None:
    code = f"import os, sys; os.setpgid(0, 0); sys.argv[1:] = {[*BASE, 'data.num_workers=2', 'epochs=99']!r}\n"
    code += "from trainkit.cli.main import main\nsys.exit(main())"
    import sys

    run = subprocess.Popen([sys.executable, "-c", code], cwd=own, stderr=subprocess.PIPE, text=True)
    until(has_saved(own / "run", 8))
    os.killpg(run.pid, signal.SIGINT)
    _, text = run.communicate(timeout=120)
    assert run.returncode == 130, text
    assert text.strip().startswith("stopped by SIGINT, saved as step-")


# -------------------------------------------------------------------------------------- killed, and resumed


@pytest.mark.slow
def test_twenty_four_kills_at_random_moments_change_no_bit(own: Path, forks: Forks) -> None:
    """Kill every third run while it saves, and one run five times within an epoch; resume each to its end."""
    draw = random.Random(time.time_ns())
    argv = ["model=net", "model.width=40000", "data=points", "batch_size=8", "progress=off", "epochs=3"]
    argv += ["optim=adamw", "scheduler=onecycle", "ema=0.9", "checkpoint.every_steps=2", "data.num_workers=1"]
    began = time.monotonic()
    forks.run(*argv, "hydra.run.dir=straight", cwd=own)
    length = time.monotonic() - began
    kills = {"anywhere": 0, "while saving": 0}
    for number in range(100):
        if sum(kills.values()) >= 24 and kills["while saving"] >= 8:
            break
        run = own / f"run{number}"
        process = forks.start(*argv, f"hydra.run.dir={run.name}", cwd=own)
        for _ in range(6):
            until(lambda run=run: (run / "run.json").exists())
            if draw.random() < 0.5:
                with contextlib.suppress(TimeoutError):
                    until(lambda run=run: half_written(run), timeout=length, interval=0)
                    time.sleep(draw.uniform(0, 0.02))
            else:
                time.sleep(draw.uniform(0, 0.6 * length))
            with contextlib.suppress(ProcessLookupError):
                process.send(signal.SIGKILL)
            code = process.wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL, process.stderr
            kills["while saving" if half_written(run) else "anywhere"] += 1
            process = forks.start("resume", run.name, cwd=own)
        assert process.wait() in (0, -signal.SIGKILL), process.stderr
        forks.run("resume", run.name, cwd=own)
        assert final(run) == final(own / "straight"), run
        assert [row["epoch"] for row in read_history(run)] == [1, 2, 3]
        assert not half_written(run)
        shutil.rmtree(run)
    assert sum(kills.values()) >= 24, kills
    assert kills["while saving"] >= 8, kills
    print(kills)  # shown by pytest -rP


def half_written(run: Path) -> bool:
    """Return whether a checkpoint is being written, or was when its process died."""
    try:
        return any(".new-" in name for name in os.listdir(run / "checkpoints"))  # noqa: PTH208
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_five_kills_within_one_epoch_change_no_bit(own: Path, forks: Forks) -> None:
    argv = [*BASE[:-1], "epochs=2", "checkpoint.every_steps=1", "data.train.size=200", "optim.momentum=0.9"]
    argv = [text.replace("data.train.size", "+data.train.size") for text in argv]
    forks.run(*argv, "hydra.run.dir=straight", cwd=own)
    hook = "+hooks.kill={_target_: trainkit.diagnostics.verify_resume.Kill, step: 3}"
    process = forks.start(*argv, hook, "hydra.run.dir=run", cwd=own)
    for step in (7, 11, 12, 20, 999):
        assert process.wait() == -signal.SIGKILL, process.stderr
        assert saved(own / "run")["epoch"] == 0
        process = forks.start("resume", "run", f"hooks.kill.step={step}", cwd=own)
    assert process.wait() == 0, process.stderr
    assert final(own / "run") == final(own / "straight")


def test_verify_resume_prints_two_equal_hashes_and_exits_with_0(own: Path, trainkit: Command) -> None:
    done = trainkit("verify-resume", "model=net", "data=points", "epochs=2", "batch_size=8", "--kills", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] is True
    assert found["straight"] == found["resumed"]
    assert re.fullmatch("[0-9a-f]{64}", found["straight"])
    assert len(found["steps"]) == 2
    assert not list((own / "outputs" / "verify-resume").glob("*/*"))


@pytest.mark.slow
def test_verify_resume_gives_secrets_again(own: Path, forks: Forks) -> None:
    (own / "keyed.py").write_text(
        "from faultmodule import Net\nclass Keyed(Net):\n"
        "    def __init__(self, width, api_key):\n        super().__init__(width)\n"
    )
    argv = [
        "model=net",
        "model._target_=keyed.Keyed",
        "model.width=32",
        "+model.api_key=abc123",
        "data=points",
        "epochs=1",
    ]
    done = forks.start("verify-resume", *argv, "--kills", "1", cwd=own)
    assert done.wait() == 0, done.stderr


@pytest.mark.slow
def test_verify_resume_exits_with_1_if_the_bits_differ(own: Path, forks: Forks) -> None:
    """A model that counts outside of its state_dict is not resumable, and verify-resume detects it."""
    (own / "counted.py").write_text(
        "import torch\nfrom faultmodule import Net\nclass Counted(Net):\n    seen = 0\n"
        "    def forward(self, x):\n        self.seen += 1\n        return super().forward(x) * (1 + 0.1 * self.seen)\n"
    )
    argv = ["model=net", "model._target_=counted.Counted", "data=points", "epochs=1", "batch_size=8"]
    run = forks.start("verify-resume", *argv, "checkpoint.every_steps=1", "--kills", "2", cwd=own)
    assert run.wait() == 1, run.stderr
    assert "DIFFERENT" in run.stdout
    assert len(list((own / "outputs" / "verify-resume").glob("*/*/straight/run.json"))) == 1


# ------------------------------------------------------------------------------------------------ storage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 3 MiB."""
    with mounted_disk(tmp_path / "disk", "3m") as disk:
        yield disk


def test_a_full_disk_is_a_storage_error_and_leaves_the_checkpoints_unchanged(
    own: Path, small_disk: Path, forks: Forks
) -> None:
    argv = ["model=net", "model.width=30000", "data=points", "batch_size=8", "progress=off", "hydra.run.dir=disk/run"]
    run = forks.start(*argv, "checkpoint.keep=9", "epochs=9", cwd=own)  # 1.4 MiB each, so the third does not fit
    message_of(run, 6, "step-00000016 cannot be written: No space left on device", "trainkit resume")
    checkpoints = Checkpoints(small_disk / "run" / "checkpoints")
    assert checkpoints.names() == ["step-00000008", "step-00000000"]
    assert checkpoints.newest()[0] == "step-00000008"
    assert not half_written(small_disk / "run")
    info = json.loads((small_disk / "run" / "run.json").read_text())
    assert (info["status"], info["exit_code"]) == ("failed", 6)
    shutil.rmtree(checkpoints.directory / "step-00000000")
    forks.run("resume", "disk/run", "epochs=2", "checkpoint.keep=1", cwd=own)
    forks.run(*argv[:-1], "epochs=2", "hydra.run.dir=straight", cwd=own)
    assert final(small_disk / "run") == final(own / "straight")


def test_the_first_error_is_reported_even_if_the_disk_is_full(own: Path, small_disk: Path, forks: Forks) -> None:
    (own / "filling.py").write_text(
        "class Fill:\n    def on_step(self, state):\n        try:\n"
        "            with open('disk/filler', 'wb') as file:\n"
        "                while True:\n                    file.write(bytes(4096))\n                    file.flush()\n"
        "        except OSError:\n            raise ValueError('first') from None\n"
    )
    run = forks.start(*BASE[:-1], "hydra.run.dir=disk/run", "+hooks.fill._target_=filling.Fill", cwd=own)
    text = message_of(run, 1, "hooks.fill: ValueError: first", "disk/run cannot be written: No space left")
    assert text.index("first") < text.index("cannot be written")
    info = json.loads((small_disk / "run" / "run.json").read_text())
    assert (info["status"], info["exit_code"]) == ("failed", 1)


def test_a_stop_that_cannot_be_saved_is_a_storage_error(own: Path, small_disk: Path, forks: Forks) -> None:
    argv = [*BASE[:-1], "model.width=60000", "hydra.run.dir=disk/run", "+data.train.wait=0.05"]  # 2.7 MiB
    run = forks.start(*argv, cwd=own)
    until(has_saved(small_disk / "run", 0))
    time.sleep(2)  # a step takes 0.4 s, and an epoch 3 s
    run.send(signal.SIGTERM)
    message_of(run, 6, "cannot be written: No space left on device", "trainkit resume disk/run")
    assert json.loads((small_disk / "run" / "run.json").read_text())["exit_code"] == 6
    assert saved(small_disk / "run")["step"] == 0


def test_any_error_of_user_code_ends_the_run_with_a_message(own: Path, forks: Forks) -> None:
    (own / "panic.py").write_text(
        "class Panic(BaseException): ...\nclass Hook:\n    def on_step(self, state):\n        raise Panic('at once')\n"
    )
    message_of(forks.start(*BASE, "+hooks.panic._target_=panic.Hook", cwd=own), 1, "hooks.panic: Panic: at once")
    assert json.loads((own / "run" / "run.json").read_text())["status"] == "failed"


def test_a_directory_that_becomes_read_only_is_a_storage_error(own: Path, small_disk: Path, forks: Forks) -> None:
    run = forks.start(*BASE[:-1], "hydra.run.dir=disk/run", "epochs=200", "+data.train.wait=0.001", cwd=own)
    until(has_saved(small_disk / "run", 8))
    subprocess.run(["mount", "--bind", str(small_disk), str(small_disk)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(small_disk)], check=True)
        message_of(run, 6, "cannot be written: Read-only file system")
        resumed = forks.start("resume", "disk/run", cwd=own)
        message_of(resumed, 6, "Read-only file system")
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)
    assert Checkpoints(small_disk / "run" / "checkpoints").newest()[1]["step"] >= 8


# --------------------------------------------------------------------------------------------------- data


def test_a_killed_worker_process_is_a_data_error(own: Path, forks: Forks) -> None:
    run = forks.start(*BASE, "data.num_workers=2", "+data.train.wait=0.01", "epochs=50", cwd=own)
    until(has_saved(own / "run", 8))
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    message_of(run, 5, "a worker process that reads data ended", "data.num_workers")
    forks.run("resume", "run", "data.num_workers=0", f"epochs={saved(own / 'run')['epoch'] + 1}", cwd=own)


@pytest.fixture
def images(own: Path) -> Path:
    """Forty images in two classes; one file is truncated, and another is not an image."""
    for number in range(40):
        path = own / "images" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 2 * number, 0)).save(path)
    cut = own / "images" / "a" / "10.png"
    cut.write_bytes(cut.read_bytes()[:60])
    (own / "images" / "b" / "11.png").write_text("no image")
    return own / "images"


IMAGES = ["data=image_folder", "data.root=images", "data.split=off", "epochs=1", "progress=off", "hydra.run.dir=run"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_not_an_image_is_named_with_its_number(workers: int, images: Path, forks: Forks) -> None:
    run = forks.start(*IMAGES, f"data.num_workers={workers}", cwd=images.parent)
    text = message_of(run, 5, "data.on_unreadable=skip")
    assert re.search(r"error: data\.train: sample (5 \(images/a/10|25 \(images/b/11)\.png\): \w+: ", text), text


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_skipped_counted_and_logged(workers: int, images: Path, forks: Forks) -> None:
    forks.run(*IMAGES, f"data.num_workers={workers}", "data.on_unreadable=skip", cwd=images.parent)
    (row,) = read_history(images.parent / "run")
    assert row["train/samples"] == 38
    assert row["unreadable"] == 2
    log = (images.parent / "run" / "trainkit.log").read_text()
    assert "skipped an unreadable sample: sample 5 (images/a/10.png): " in log
    assert "skipped an unreadable sample: sample 25 (images/b/11.png): UnidentifiedImageError" in log


def test_skip_stops_if_too_many_files_are_unreadable(images: Path, forks: Forks) -> None:
    for number in range(0, 40, 3):
        (images / "ab"[number % 2] / f"{number:02}.png").write_text("no image")
    run = forks.start(*IMAGES, "data.on_unreadable=skip", cwd=images.parent)
    message_of(run, 5, "11 of 40 samples cannot be read, 10 may be skipped; sample ")


# ------------------------------------------------------------------------------------- memory, not finite


def test_an_out_of_memory_error_names_the_batch_the_peak_and_the_setting_to_lower(own: Path, forks: Forks) -> None:
    run = forks.start(*BASE, "model._target_=faultmodule.Greedy", "~model.width", "on_oom=stop", cwd=own)
    text = message_of(
        run, 8, "cpu ran out of memory: inputs (8, 8) float32, 8 samples at a time, peak ", "micro_batch=4"
    )
    assert re.search(r"peak \d+\.\d\d GiB", text)
    split = forks.start(*BASE, "hydra.run.dir=split", "model._target_=faultmodule.Greedy", "~model.width", cwd=own)
    message_of(split, 8, "1 sample at a time", "use a smaller model")


def test_rollback_restores_the_last_checkpoint_and_continues_with_the_next_batch(own: Path, forks: Forks) -> None:
    (own / "poison.py").write_text(
        "import torch\nfrom faultmodule import Points\nclass Poison(Points):\n    def __getitem__(self, index):\n"
        "        x, y = super().__getitem__(index)\n        return (x * float('nan') if index == 40 else x), y\n"
    )
    argv = [*BASE, "data.train._target_=poison.Poison", "epochs=2"]
    stopped = forks.start(*argv, "hydra.run.dir=stopped", cwd=own)
    message_of(stopped, 4, "the loss is nan", "the inputs of sample 40 are not finite", "param group default")
    forks.run(*argv, "on_nonfinite=rollback", "checkpoint.every_steps=3", cwd=own)
    rows = read_history(own / "run")
    assert [row["train/skipped"] for row in rows] == [1, 1]
    assert [row["train/samples"] for row in rows] == [56, 56]
    log = (own / "run" / "trainkit.log").read_text()
    assert log.count("note: back to the weights of step-") == 2
    assert rows[-1]["step"] < 14  # discarded steps do not count


# ------------------------------------------------------------------------------------------ one at a time


def test_one_process_uses_a_directory_and_the_lock_of_a_dead_process_is_taken_over(own: Path, forks: Forks) -> None:
    first = forks.start(*BASE, "+data.train.wait=0.01", "epochs=99", cwd=own)
    until(has_saved(own / "run", 8))
    second = forks.start("resume", "run", cwd=own)
    text = message_of(second, 7, f"process {first.pid} on ", "uses this directory")
    assert len(text.strip().splitlines()) == 2
    third = forks.start(*BASE, cwd=own)
    message_of(third, 7, "holds a run already")
    first.send(signal.SIGKILL)
    first.wait()
    assert json.loads((own / "run" / ".lock").read_text())["pid"] == first.pid
    epoch = saved(own / "run")["epoch"]
    forks.run("resume", "run", f"epochs={epoch + 1}", cwd=own)
    assert len(read_history(own / "run")) == epoch + 1


def test_two_simultaneous_starts_get_two_directories(own: Path, forks: Forks) -> None:
    both = [forks.start(*BASE[:-1], "epochs=1", cwd=own) for _ in range(3)]
    assert [run.wait() for run in both] == [0, 0, 0]
    runs = list((own / "outputs").glob("*/*/run.json"))
    assert len(runs) == 3
    assert all(json.loads(file.read_text())["status"] == "completed" for file in runs)


def test_one_of_two_simultaneous_starts_gets_the_directory_that_both_name(own: Path, forks: Forks) -> None:
    both = [forks.start(*BASE, "epochs=1", cwd=own) for _ in range(3)]
    assert sorted(run.wait() for run in both) == [0, 7, 7]
    assert json.loads((own / "run" / "run.json").read_text())["status"] == "completed"


def test_a_process_whose_lock_file_is_deleted_stops_and_the_run_that_replaced_it_is_right(
    own: Path, forks: Forks
) -> None:
    first = forks.start(*BASE, "+data.train.wait=0.01", "epochs=99", cwd=own)
    until(has_saved(own / "run", 8))
    (own / "run" / ".lock").unlink()
    epochs = saved(own / "run")["epoch"] + 2
    second = forks.start("resume", "run", f"epochs={epochs}", cwd=own)
    message_of(first, 7, ".lock was deleted or replaced", "stops without writing")
    assert second.wait() == 0, second.stderr
    assert [row["epoch"] for row in read_history(own / "run")] == list(range(1, epochs + 1))
    straight = forks.start(*BASE[:-1], "+data.train.wait=0.01", f"epochs={epochs}", "hydra.run.dir=straight", cwd=own)
    assert straight.wait() == 0
    assert final(own / "run") == final(own / "straight")


# --------------------------------------------------------------------------------------------- the command


def test_resume_continues_in_the_same_directory_with_the_same_history(own: Path, trainkit: Command) -> None:
    assert trainkit(*BASE, "epochs=2").returncode == 0
    done = trainkit("resume", "run")
    assert done.returncode == 0
    assert done.stdout.startswith("finished: all 2 epochs are done")
    done = trainkit("resume", "run", "epochs=3", "progress=plain")
    assert done.returncode == 0, done.stderr
    assert "resumed from step-00000016: epoch 3 of 3" in done.stderr
    assert "best of 3 epochs" in done.stdout
    assert [row["epoch"] for row in read_history(own / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["resume"], 2, ["write trainkit resume RUN"]),
        (["resume", "nowhere"], 2, ["nowhere: this directory does not exist"]),
        (["resume", "last"], 2, ["outputs/latest: this directory does not exist"]),
        (["resume", "conf"], 2, ["conf does not hold a run"]),
        (["resume", "run", "seed=7"], 3, ["seed: 0 in the checkpoint, 7 now", "resume.allow=[seed]"]),
        (["resume", "run", "epohcs=7", "seed=-1"], 2, ["did you mean epochs?", "seed=-1"]),
        (["verify-resume", "checkpoint=off"], 2, ["checkpoint=off"]),
        (["verify-resume", "--kills", "0"], 2, ["--kills 0"]),
        (["checkpoint.keep=0"], 2, ["checkpoint.keep=0: must be a whole number of at least 1"]),
        (["on_nonfinite=rollback", "checkpoint=off"], 2, ["on_nonfinite=rollback"]),
    ],
)
def test_a_wrong_resume_command_gives_one_message(
    argv: list[str], code: int, words: list[str], own: Path, forks: Forks
) -> None:
    forks.run(*BASE, "epochs=1", cwd=own)
    message_of(forks.start(*argv, cwd=own), code, *words)


def test_a_damaged_checkpoint_is_skipped_and_only_damaged_ones_are_exit_code_3(own: Path, forks: Forks) -> None:
    forks.run(*BASE, "epochs=2", cwd=own)
    newest = own / "run" / "checkpoints" / "step-00000016" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    done = forks.run("resume", "run", "epochs=3", "progress=plain", cwd=own)
    assert "note: skipped step-00000016: state.pt has " in done.stderr
    assert "resumed from step-00000008: epoch 2 of 3" in done.stderr
    assert len(read_history(own / "run")) == 3
    for file in (own / "run" / "checkpoints").glob("*/state.pt"):
        file.write_bytes(b"nothing")
    words = "no checkpoint can be used: step-00000024: state.pt has 7 bytes"
    message_of(forks.start("resume", "run", "epochs=4", cwd=own), 3, words)


def test_nothing_in_a_checkpoint_is_instantiated(own: Path, forks: Forks) -> None:
    """A config in a checkpoint is only compared: its `_target_`s are never called."""
    import torch

    from tests.runs.test_checkpoint import write_state

    forks.run(*BASE, "epochs=1", cwd=own)
    folder = own / "run" / "checkpoints" / "step-00000008"
    content = torch.load(folder / "state.pt", weights_only=True)
    content["fingerprint"]["config"]["model._target_"] = "os.mkdir"
    content["fingerprint"]["config"]["model.path"] = str(own / "was here")
    torch.save(content, own / "state")
    write_state(folder, (own / "state").read_bytes())
    text = message_of(forks.start("resume", "run", "epochs=2", cwd=own), 3, "'os.mkdir' in the checkpoint")
    assert "resume.allow=[model]" in text
    forks.start("resume", "run", "epochs=2", "resume.allow=[model]", cwd=own).wait()
    assert not (own / "was here").exists()


@pytest.mark.parametrize(
    "override",
    [
        "+model.api_keys={hf: sEcret1}",
        "+model.api_keys=[sEcret1, other]",
        "+model.token='it\\'s sEcret1'",
        '+model.token="a\\"b sEcret1"',
        "+model.token=zq9sEcret1,zq8sEcret1",
        "+model.more={url: x, Password: sEcret1}",
        "+model.token=${oc.env:NOT_THERE,sEcret1}",
        "+model.url=${oc.env:MINE}",
    ],
)
def test_no_file_contains_a_secret_however_it_is_written(override: str, own: Path, forks: Forks) -> None:
    (own / "anything.py").write_text(
        "from faultmodule import Net\nclass Anything(Net):\n    def __init__(self, width, **rest):\n"
        "        super().__init__(width)\n        self.rest = rest\n"
        "    def forward(self, x):\n        raise ValueError(f'refused: {self.rest}')\n"
    )
    argv = [
        *BASE[:-1],
        "model._target_=anything.Anything",
        "model.width=8",
        "+model.derived='${model.token}@x'",
        override,
    ]
    argv = [text for text in argv if "derived" not in text or "token" in override]
    sweep = ["-m", "hydra.sweep.dir=run"] if "," in override and "[" not in override and "{" not in override else []
    run = forks.start(*argv, *(sweep or ["hydra.run.dir=run"]), cwd=own, MINE="sEcret1")
    assert run.wait() in (2, 10), run.stderr
    files = [file for file in (own / "run").rglob("*") if file.is_file()]
    assert any(file.name == "run.json" for file in files), run.stderr
    assert not [file for file in files if b"sEcret" in file.read_bytes()]


def test_numbers_and_targets_under_secret_keys_stay(own: Path, forks: Forks) -> None:
    (own / "tokens.py").write_text(
        "from faultmodule import Net\nclass Tokens(Net):\n    def __init__(self, width, num_tokens, key_encoder):\n"
        "        super().__init__(width)\n        assert num_tokens == 12\n"
    )
    argv = [*BASE, "model._target_=tokens.Tokens", "model.width=3", "model.num_tokens=12", "epochs=1"]
    forks.run(*argv, "+model.key_encoder={_target_: torch.nn.Linear, in_features: 2, out_features: 3}", cwd=own)
    forks.run("resume", "run", "epochs=2", cwd=own)


def test_no_file_contains_secrets_or_environment_values(own: Path, forks: Forks) -> None:
    (own / "secretive.py").write_text(
        "class Log:\n    def __init__(self, api_key, url, more):\n        self.key = api_key\n"
        "    def on_epoch(self, state, metrics):\n        raise RuntimeError(f'refused: {self.key}')\n"
    )
    hook = "+hooks.log={_target_: secretive.Log, api_key: sEcret1, url: '${oc.env:PLACE}', more: {Password: sEcret2}}"
    env = {"PLACE": "sEcret3", "TOKEN": "sEcret4"}
    argv = [*BASE[:-1], hook, "+hooks.two={_target_: secretive.Log, api_key: '${oc.env:TOKEN}', url: x, more: []}"]
    assert forks.start(*argv, "epochs=1", "hydra.run.dir=run", cwd=own, **env).wait() == 1
    assert forks.start("-m", *argv, "epochs=1", "seed=1,2", cwd=own, **env).wait() == 10
    files = [file for folder in ("run", "outputs") for file in (own / folder).rglob("*") if file.is_file()]
    assert {"config.yaml", "run.json", "state.pt", "multirun.yaml", "trainkit.log", "hydra.yaml"} <= {
        file.name for file in files
    }
    for file in files:
        assert b"sEcret" not in file.read_bytes(), file
    shown = (
        forks.run("--cfg", "all", *argv, cwd=own, **env).stdout
        + forks.run("--cfg", "job", *argv, cwd=own, **env).stdout
    )
    assert "sEcret" not in shown
    again = message_of(
        forks.start("resume", "run", cwd=own, **env),
        2,
        "hooks.log.api_key: the value is a secret",
        "hooks.log.more.Pass",
    )
    assert "error: hooks.two" not in again
