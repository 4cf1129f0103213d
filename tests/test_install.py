"""An installed trainkit works outside the repository, and the first training reaches the README's accuracy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.helpers import files_in, read_history
from tests.wheel import install_wheel
from trainkit.cli.project import project_files

ROOT = Path(__file__).parents[1]
MODEL = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, images):
        return self.layers(images)
"""


def use(command: Path, folder: Path, **env: str) -> None:
    """Use an installed trainkit as a new user would: train, add a custom model, train it."""

    def run(*args: str, where: Path = folder) -> str:
        done = subprocess.run(
            [command, *args], cwd=where, env={**os.environ, **env}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "best of 2 epochs" in run("epochs=2")
    (folder / "mymodels.py").write_text(MODEL)
    (folder / "conf" / "model").mkdir(parents=True)
    (folder / "conf" / "model" / "mine.yaml").write_text(
        "_target_: mymodels.Net\nwidth: 8\nnum_classes: ${data.classes}\n"
    )
    assert "best of 2 epochs" in run("model=mine", "epochs=2")
    assert "mine" in run("--help")
    run("init", "flowers")
    assert files_in(folder / "flowers") == sorted(project_files("flowers"))
    assert "best of 2 epochs" in run("experiment=baseline", "epochs=2", where=folder / "flowers")


def test_a_wheel_contains_configs_and_data_and_works_outside_the_repository(tmp_path: Path) -> None:
    site, folder = install_wheel(tmp_path / "wheel"), tmp_path / "folder"
    folder.mkdir()
    ask = [sys.executable, "-c", "from trainkit.config.search_path import CONF; print(CONF)"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.run(ask, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout.strip()
    assert found == str(site / "trainkit" / "conf")
    use(site / "bin" / "trainkit", folder, PYTHONPATH=str(site))


@pytest.mark.slow
def test_an_install_into_a_new_environment_works(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    install = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    subprocess.run([*install, "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(ROOT)], check=True)
    (tmp_path / "folder").mkdir()
    use(python.with_name("trainkit"), tmp_path / "folder")
    make = ["make", "setup", "test", f"PYTHON={python}"]
    done = subprocess.run(make, cwd=tmp_path / "folder" / "flowers", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


@pytest.mark.slow
def test_the_first_training_reaches_an_accuracy_of_94_percent(trainkit: Command, tmp_path: Path) -> None:
    assert trainkit().returncode == 0
    history = read_history(tmp_path / "outputs" / "latest")
    assert len(history) == 20
    assert history[-1]["val/accuracy"] >= 0.94
