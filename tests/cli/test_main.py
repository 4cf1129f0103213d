"""The installed command: exit codes, output streams, imported packages, written files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import SCRIPT, Command
from tests.helpers import read_history

QUICK = ("epochs=1", "limit_batches=2")
MODULE = """
import time
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 4, num_classes: int = 10):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).amax((2, 3)))

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        raise ValueError("no good")

class NoInit(nn.Module):
    def forward(self, x):
        return x

class Leaves(nn.Module):
    def __init__(self):
        super().__init__()
        raise SystemExit(0)

class BreaksLater(Net):
    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        raise KeyError("missing thing")

class Slow(Net):
    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)

class Counter:
    def on_step(self, state):
        print("step", state.progress.step)
"""


def imported(code: str, cwd: Path) -> set[str]:
    """Return the slow packages that a command line imports."""
    script = (
        f"import sys\nfrom trainkit.cli.main import main\ncode = main({code})\n"
        "slow = {'torch', 'torchvision', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "print('IMPORTED', *slow, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "--cfg job",
        "optim=sgdd lr=-1",
        "trian",
        "model=torchvision.models.resnet18 optim._target_=torch.optim.AdamW --cfg job",
    ],
)
def test_commands_that_do_not_train_import_no_slow_package(command: str, tmp_path: Path) -> None:
    assert imported(repr(command.split()), tmp_path) == set()


def test_the_default_run_does_not_import_torchvision(tmp_path: Path) -> None:
    assert imported(repr([*QUICK, "progress=plain"]), tmp_path) == {"torch"}


def test_a_run_writes_its_files_and_prints_its_directory(trainkit: Command, tmp_path: Path) -> None:
    done = trainkit("model=toy_cnn", "optim=sgd", "lr=0.01", "epochs=2", "limit_batches=3")
    assert done.returncode == 0, done.stderr
    run = (tmp_path / "outputs" / "latest").resolve()
    assert str(run.relative_to(tmp_path)) in done.stdout
    assert "best of 2 epochs by val/loss" in done.stdout
    assert len(re.findall(r"^epoch \d/2 ", done.stderr, re.M)) == 2
    assert "\r" not in done.stdout + done.stderr
    history = read_history(run)
    assert [line["epoch"] for line in history] == [1, 2]
    assert history[1]["step"] == 6
    assert history[0]["train/loss"] == pytest.approx(history[0]["train/loss_sum"] / history[0]["train/samples"])
    keys = "epoch step train/loss train/loss_sum train/samples val/loss val/accuracy lr/default grad_norm"
    assert list(history[0]) == [*keys.split(), "seconds", "samples_per_second"]
    names = {file.name for file in run.iterdir()}
    assert names == {
        *(".hydra", ".lock", "checkpoints"),
        *("run.json", "params.json", "history.jsonl", "preprocessing.json", "trainkit.log"),
    }
    assert {file.name for file in (run / ".hydra").iterdir()} == {
        "config.yaml",
        "overrides.yaml",
        "hydra.yaml",
    }


def test_a_custom_model_works_from_any_folder(trainkit: Command, tmp_path: Path) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("_target_: mymodels.Net\nwidth: 4\n")
    (tmp_path / "mymodels.py").write_text(MODULE)
    done = trainkit("model=mine", "model.width=5", "+hooks.count._target_=mymodels.Counter", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "step 1\nstep 2\n" in done.stdout


def test_line_fit_takes_the_steps_of_the_tutorial(forked: Command, tmp_path: Path) -> None:
    assert forked("experiment=line_fit", "progress=off").returncode == 0
    history = read_history(tmp_path / "outputs" / "latest")
    gradients, weight = [], -2.05931
    for line in history:
        gradient = 2 * 2 * (2 * weight - 10)
        weight -= 0.1 * gradient
        gradients.append(gradient)
        assert line["grad/weight"] == pytest.approx(gradient, rel=1e-4, abs=1e-4)
        assert line["param/weight"] == pytest.approx(weight, abs=1e-5)
    assert [round(g, 4) for g in gradients[:3]] == [-56.4745, -11.2949, -2.259]
    assert history[-1]["param/weight"] == pytest.approx(5, abs=1e-5)


def test_polynomial_takes_the_steps_of_gradient_descent(forked: Command, tmp_path: Path) -> None:
    assert forked("experiment=polynomial", "progress=off").returncode == 0
    x, y, z = 1.0, 2.0, 3.0
    for line in read_history(tmp_path / "outputs" / "latest"):
        assert line["train/loss"] == pytest.approx(x + y**2 + z**3, rel=1e-4, abs=1e-4)
        x, y, z = x - 0.1, y - 0.1 * 2 * y, z - 0.1 * 3 * z**2
        assert [line[f"param/{name}"] for name in "xyz"] == pytest.approx([x, y, z], rel=1e-4, abs=1e-5)
    assert line["step"] == 100


def test_two_modules_train_in_two_groups_of_one_adam(forked: Command, tmp_path: Path) -> None:
    assert forked("experiment=two_modules", *QUICK).returncode == 0
    (line,) = read_history(tmp_path / "outputs" / "latest")
    assert (line["lr/cnn"], line["lr/gru"]) == (0.001, 0.003)


def test_a_multirun_trains_each_optimizer_in_a_separate_directory(trainkit: Command, tmp_path: Path) -> None:
    done = trainkit("-m", "optim=sgd,adam,adadelta", "epochs=2", "limit_batches=2")
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "outputs" / "sweeps").glob("*/*/*/history.jsonl"))
    assert [read_history(run.parent)[0]["lr/default"] for run in runs] == [0.01, 0.001, 1.0]
    header, *rows, order = done.stdout.splitlines()
    assert header.split() == ["optim", "train/loss", "val/loss", "val/accuracy", "directory"]  # epochs are equal
    assert {row.split()[0] for row in rows} == {"sgd", "adam", "adadelta"}
    assert len(rows) == 3
    assert order == "the best by val/loss is first (lower is better)"


def test_a_failed_run_does_not_stop_the_other_runs_of_a_multirun(forked: Command, tmp_path: Path) -> None:
    done = forked("-m", "optim.momentum=-1,0", *QUICK)
    assert done.returncode == 10
    assert "Invalid momentum value" in done.stderr
    assert len(list((tmp_path / "outputs" / "sweeps").glob("*/*/*/history.jsonl"))) == 1


def test_a_multirun_into_a_used_directory_is_an_error(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "multirun.yaml").touch()
    assert forked("-m", "hydra.sweep.dir=taken", "seed=1,2", *QUICK).returncode == 7
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["multirun.yaml"]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["trian"], 2, ["trian", "did you mean trainkit train?"]),
        (["--epochs", "3"], 2, ["--epochs", "keys have no dashes: write epochs=VALUE"]),
        (["--confi-dir", "x"], 2, ["did you mean --config-dir?"]),
        (["optim=sgdd", "lr=-1", "epoch=3"], 2, ["optim=sgd?", "lr=-1", "epochs?"]),
        (["-m", "optim=sgd,admm"], 2, ["did you mean optim=adam?"]),
        (["--lr=0.1"], 2, ["write lr=0.1"]),
        (["lr", "0.1"], 2, ["write lr=VALUE"]),
        (["--cfg", "foo"], 2, ["invalid choice: 'foo'"]),
        (["--config-name", "x"], 2, ["--config-name", "experiment=NAME"]),
        (["-sc"], 2, ["install=bash"]),
        (["-m", "+model.foo=1,2"], 2, ["model.foo", "in_channels"]),
        (["model=leaves"], 2, ["SystemExit: 0", "mymodels.py"]),
        (["-cd", "nowhere"], 2, ["nowhere", "folder does not exist"]),
        (
            ["optim=sgdd", "lr=-1", "+model.chanels=4"],
            2,
            ["optim=sgd?", "lr=-1", "model.chanels", "in_channels"],
        ),
        (["+model.num_clases=3", "+loss.weigth=1"], 2, ["model.num_classes?", "did you mean loss.weight?"]),
        (["model=mymodels.NoInit", "model.width=3"], 2, ["model.width: mymodels.NoInit takes no arguments"]),
        (["data=mydata.Birds"], 2, ["mydata.Birds", "write data.train._target_=mydata.Birds"]),
        (["data.colour=red"], 2, ["data.colour", "the keys of data are: train, val"]),
        (["model.num_classes=ten"], 2, ["model.num_classes=ten", "type int"]),
        (["+hooks.h._target_=mymodels.Countre"], 2, ["hooks.h._target_", "did you mean mymodels.Counter?"]),
        (["watch=[fc2.wieght]"], 2, ["fc2.wieght", "did you mean fc2.weight?"]),
        (["optim.momentum=-1"], 2, ["optim", "Invalid momentum value"]),
        (["model=broken"], 2, ["no good", "mymodels.py", "model: "]),
        (["model=breaks_later"], 2, ["missing thing", "in helper", "model: "]),
        (["model=linear"], 2, ["model: ", "inputs (32, 3, 32, 32)"]),
        (["loss=mse"], 2, ["data.train: ", "needs the same shape", "choose loss=cross_entropy"]),
        (["device=cuda"], 2, ["device=cuda", "device=auto"]),
        (
            ["lr=1e9", "epochs=2"],
            4,
            ["loss is nan, the gradient is not finite in param group default", "lower lr"],
        ),
        (["data=mnist", "data.root=nothing_here"], 5, ["nothing_here", "data=digits"]),
        (["data=image_folder", "data.root=nothing_here"], 5, ["nothing_here"]),
        (["data=arrays", "data.file=mymodels.py"], 5, ["mymodels.py", ".npz"]),
        (["hydra.run.dir=mymodels.py", *QUICK], 6, ["mymodels.py"]),
        (["hydra.run.dir=taken", *QUICK], 7, ["taken", "holds a run already"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_mistake_gives_a_clear_message_and_an_exit_code(
    argv: list[str], code: int, words: list[str], forked: Command, tmp_path: Path
) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    for name, file in (("Broken", "broken.yaml"), ("BreaksLater", "breaks_later.yaml"), ("Leaves", "leaves.yaml")):
        (tmp_path / "conf" / "model" / file).write_text(f"_target_: mymodels.{name}\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "run.json").write_text("{}")
    done = forked(*argv, http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert done.stderr.count(word) >= 1
    assert len(set(done.stderr.splitlines())) == len(done.stderr.splitlines())  # nothing is reported twice
    if code == 2 and "model" not in argv[0] and "loss" not in argv[0]:
        assert not (tmp_path / "outputs").exists()  # no run was started


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_with_its_exit_code_and_keeps_the_history(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    argv = [str(SCRIPT), "model._target_=mymodels.Slow", "~model.in_channels", "epochs=50", "limit_batches=3"]
    with subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("epoch  2/50"):
                break
        run.send_signal(number)
        rest = run.stderr.read()
        assert run.wait(timeout=60) == code
    assert "Traceback" not in rest
    assert number.name in rest
    directory = tmp_path / "outputs" / "latest"
    assert len(read_history(directory)) >= 2
    assert '"status": "stopped"' in (directory / "run.json").read_text()


def test_flags_may_be_anywhere_in_the_command_line(trainkit: Command) -> None:
    done = trainkit("optim=adam", "--cfg", "job", "epochs=3", "--resolve")
    assert done.returncode == 0, done.stderr
    assert "epochs: 3\n" in done.stdout
    assert "_target_: torch.optim.Adam\n  lr: 0.001" in done.stdout


def test_flags_of_hydra_work(trainkit: Command, tmp_path: Path) -> None:
    (tmp_path / "more" / "model").mkdir(parents=True)
    (tmp_path / "more" / "model" / "other.yaml").write_text("_target_: trainkit.models.MLP\nhidden: [3]\n")
    done = trainkit("-cd", "more", "model=other", "--cfg", "job", "--package", "model")
    assert "hidden:" in done.stdout, done.stderr
    assert "Defaults List" in trainkit("--info", "defaults").stdout
    completion = trainkit("-sc", "query=bash", COMP_LINE="trainkit optim=ad", COMP_POINT="17")
    assert "optim=adam" in completion.stdout.split(), completion.stderr


def test_the_help_of_a_command_shows_its_usage_and_its_flags(trainkit: Command) -> None:
    text = trainkit("compare", "--help").stdout
    assert text.startswith("usage: trainkit compare PATH...")
    assert "--plot FILE" in text
    assert "--kills" not in text
    assert "optim:" not in text


def test_help_lists_commands_choices_keys_and_flags(trainkit: Command) -> None:
    text = trainkit("--help").stdout
    for words in (
        "train ",
        "toy_cnn",
        "adadelta",
        "batch_size=32",
        "samples per optimizer step",
        "-m, --multirun",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_run_completes_if_stderr_is_closed_or_full(tmp_path: Path) -> None:
    for redirect, status in (("2>&-", "completed"), ("2>/dev/full", "completed")):
        shell = f"{SCRIPT} {' '.join(QUICK)} {redirect}"
        subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, check=False)
        assert f'"status": "{status}"' in (tmp_path / "outputs" / "latest" / "run.json").read_text()


def test_a_user_file_does_not_shadow_a_python_module(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise RuntimeError")
    (tmp_path / "yaml.py").write_text("raise RuntimeError")
    assert forked(*QUICK).returncode == 0


def test_an_invalid_image_is_a_data_error_that_names_the_file(forked: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "images" / name / f"{number}.png").write_text("not an image")
    for workers in (0, 2):
        done = forked("data=image_folder", "data.root=images", f"data.num_workers={workers}", *QUICK)
        assert done.returncode == 5, done.stderr
        assert "cannot identify image file" in done.stderr
        assert ".png" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_sample_that_is_not_a_pair_gives_the_same_error_in_a_worker(forked: Command, tmp_path: Path) -> None:
    (tmp_path / "mydata.py").write_text(
        "import torch\nclass Triples:\n    classes = list('ab')\n    def __len__(self): return 8\n"
        "    def __getitem__(self, i): return torch.zeros(3, 32, 32), i, i\n"
    )
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("train: {_target_: mydata.Triples}\n")
    for workers in (0, 2):
        done = forked("data=mine", f"data.num_workers={workers}", *QUICK)
        assert done.returncode == 2, done.stderr
        assert "data.train: __getitem__ of mydata.Triples (" in done.stderr
        assert "returns a tuple of 3 values, and a sample must be a pair (inputs, target)" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_broken_pipe_prints_no_error(tmp_path: Path) -> None:
    shell = f"{SCRIPT} --help | head -n 1"
    done = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_terminal_gets_a_live_display_and_keeps_the_lines_of_epochs(tmp_path: Path) -> None:
    import pty

    main, side = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    argv = [str(SCRIPT), "epochs=3", "limit_batches=10"]
    run = subprocess.Popen(argv, cwd=tmp_path, stderr=side, stdout=subprocess.DEVNULL, env=env)
    os.close(side)
    shown = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # the process has closed its side
            break
        if not chunk:
            break
        shown += chunk
    os.close(main)
    assert run.wait(timeout=60) == 0
    text = shown.decode()
    assert "━" in text
    assert "losses" in text
    assert len(re.findall(r"epoch \d/3  train/loss", text)) == 3
