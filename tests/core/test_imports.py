"""Imports without the garbage collector."""

from __future__ import annotations

import gc
import importlib
import signal
import subprocess
import sys

import pytest

from trainkit.core.imports import fast_imports


def test_the_garbage_collector_is_paused_during_imports_and_runs_after_them() -> None:
    with fast_imports():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_garbage_collector_runs_again_after_an_import_that_fails() -> None:
    with pytest.raises(ModuleNotFoundError), fast_imports():
        importlib.import_module("no_such_module")
    assert gc.isenabled()


def test_a_process_that_has_torch_already_keeps_its_objects_in_the_garbage_collection() -> None:
    importlib.import_module("torch")
    before = gc.get_freeze_count()
    with fast_imports():
        importlib.import_module("json")
    assert gc.get_freeze_count() == before


def test_the_objects_of_the_first_imports_are_exempted_from_the_garbage_collection() -> None:
    program = "import gc\nfrom trainkit.core.imports import fast_imports\nwith fast_imports():\n    import json\n"
    program += "print(gc.get_freeze_count(), gc.isenabled())"
    words = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert int(words[0]) > 0
    assert words[1] == "True"


SIGNALLED = """
import os, signal, sys
from trainkit.core.imports import fast_imports
from trainkit.core.process import run_to_exit_code

def command():
    with fast_imports():
        os.kill(os.getpid(), signal.SIGTERM)
        print("imported")
    print("not stopped")
    return 0

sys.exit(run_to_exit_code(command))
"""


def test_a_signal_during_imports_stops_the_command_when_they_are_done() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "imported\n"
    assert done.stderr == "stopped by SIGTERM\n"
