"""Old module names stay importable for hooks, scripts and configs of version 0.1.0."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tests.conftest import Command
from trainkit.core.moved import MOVED_MODULES


@pytest.mark.parametrize("old", sorted(MOVED_MODULES))
def test_an_old_name_imports_the_new_module_with_a_warning(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {MOVED_MODULES[old]}"):
        module = importlib.import_module(old)
    new = importlib.import_module(MOVED_MODULES[old])
    assert module is new
    assert new.__spec__ is not None
    assert new.__spec__.name == new.__name__ == MOVED_MODULES[old]


def test_an_old_name_in_a_module_of_today_is_found_with_a_warning() -> None:
    from trainkit.training.metrics import Mean

    with pytest.warns(DeprecationWarning, match="metrics.Mean has moved to trainkit.training.metrics"):
        assert getattr(importlib.import_module("trainkit.metrics"), "Mean") is Mean  # noqa: B009


def test_an_unknown_module_is_still_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        importlib.import_module("trainkit.nothing")


def test_a_hook_with_an_old_import_and_an_old_target_train(trainkit: Command, tmp_path: Path) -> None:
    (tmp_path / "oldhook.py").write_text(
        "from trainkit.state import State\n"
        "class Hook:\n    def on_step(self, state: State) -> None:\n        state.step\n"
    )
    short = ["data=line", "model=linear", "loss=mse", "epochs=1", "progress=off"]
    assert trainkit(*short, "+hooks.h._target_=oldhook.Hook").returncode == 0
    kill = "+hooks.k={_target_: trainkit.verification.Kill, step: 100}"
    assert trainkit(*short, kill).returncode == 0
