"""Compilation: torch's compiler is imported when something compiles, and compiled models train as others do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import SmallCNN, assert_close, compose_settings, small_run, train_session
from trainkit.build import session as build
from trainkit.core.errors import ConfigError
from trainkit.runs.snapshot import capture_state, digest, restore_state
from trainkit.training import compile as compilation
from trainkit.training.compile import compile_model
from trainkit.training.loop import fit

# torch itself raises this warning when it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

TRAIN = """
import torch
from trainkit.build import session as build
from trainkit.config.compose import compose_run
from trainkit.training.loop import fit

torch.set_num_threads(1)
session = build.build_session(compose_run(["progress=off", "model=mlp", "limit_batches=1", "epochs=1"]).settings)
fit(session.state, session.train, session.val)
"""

# This process trains once. It then runs each line of its input in a fork and answers with the traceback, if any.
SERVER = f"""
import json, os, sys, traceback
{TRAIN}
for line in sys.stdin:
    read, write = os.pipe()
    if os.fork() == 0:
        answer = ""
        try:
            exec(json.loads(line), {{"torch": torch, "sys": sys}})
        except BaseException:
            answer = traceback.format_exc()
        os.write(write, answer[-4000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        print(json.dumps(answers.read()), flush=True)
    os.wait()
"""

SEEN = """
import torch._dynamo.testing
seen = []
def note(x):
    seen.append(torch.compiler.is_compiling())
    return x + 1
"""

LIGHT = {  # code that compiles nothing and must not import the compiler
    "nothing": "assert 'torch._dynamo.eval_frame' not in sys.modules",
    "inspect": "import inspect; inspect.stack(); inspect.getmodule(torch.nn.Linear); inspect.getmodule(lambda: 0)",
    "pickle": "import pickle; pickle.loads(pickle.dumps(torch.nn.Linear(2, 2)))",
    "deepcopy": "import copy; copy.deepcopy(torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]))",
    "module attributes": "[getattr(module, '__warningregistry__', None) for module in list(sys.modules.values())]",
}

WHOLE = {  # code that must find the real torch._dynamo
    "attribute": "torch._dynamo.config.verbose; torch._dynamo.reset()",
    "no such attribute": "assert not hasattr(torch._dynamo, 'nothing_of_this_name')",
    "find_spec": "import importlib.util; assert importlib.util.find_spec('torch._dynamo') is not None",
    "dir": "assert 'optimize' in dir(torch._dynamo)",
    "an option": (
        "import torch._dynamo.config as config; config.suppress_errors = True\n"
        "import torch._dynamo.convert_frame as user\n"
        "assert user.config.suppress_errors and torch._dynamo.config.suppress_errors"
    ),
    "counters": (
        "from torch._dynamo.utils import counters\n"
        "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))\n"
        "assert counters['frames']['ok'] == 1, dict(counters)"
    ),
    "compile": "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).tolist() == [2, 2]",
    "reset": "torch.compiler.reset()",
    "disable": (
        "@torch.compiler.disable\ndef double(x):\n    return 2 * x\n"
        "assert double(1) == 2 and torch.compile(double, backend='eager')(torch.ones(1)).item() == 2"
    ),
    "disable with arguments": (
        "@torch.compiler.disable(recursive=False)\ndef double(x):\n    return 2 * x\nassert double(1) == 2"
    ),
    "disable a builtin": (
        "torch.compiler.disable(torch.sin); torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))"
    ),
    "disable a class": (
        "@torch.compiler.disable\nclass Own:\n    pass\nOwn()\n"
        "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))"
    ),
    "disabled before the import": (
        "before = torch.compiler.disable(lambda x: note(x))\n" + SEEN + "\n"
        "torch.compile(lambda x: before(x) * 2, backend='eager')(torch.ones(2))\nassert seen == [False], seen"
    ),
    "reference from before the import": (
        "early = torch._dynamo\n" + SEEN + "\n"
        "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))\nlate = early.disable(note)\n"
        "torch.compile(lambda x: late(x) * 2, backend='eager')(torch.ones(2))\nassert seen == [False], seen"
    ),
    "optimizers are not compiled": (
        "import torch._dynamo.testing\nparam = torch.nn.Parameter(torch.ones(1))\n"
        "optimizer = torch.optim.SGD([param], lr=0.5)\nparam.grad = torch.ones(1)\n"
        "torch.compile(optimizer.step, backend='eager')()\nassert param.item() == 0.5"
    ),
    "checkpointing": (
        "from torch.utils.checkpoint import checkpoint\nlayer = torch.nn.Linear(2, 2)\n"
        "x = torch.ones(1, 2, requires_grad=True)\n"
        "for reentrant in (True, False):\n    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()"
    ),
    "functional": "assert torch.func.grad(lambda x: (x**2).sum())(torch.ones(2)).tolist() == [2, 2]",
    "export": "torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)).module()(torch.ones(1, 2))",
    "flex attention": "from torch.nn.attention.flex_attention import create_block_mask, flex_attention",
    "custom operators": (
        "@torch.library.custom_op('own::sine', mutates_args=())\n"
        "def sine(x: torch.Tensor) -> torch.Tensor:\n    return x.sin()\n"
        "sine.register_fake(torch.empty_like)\n"
        "torch.compile(lambda x: sine(x), backend='eager', fullgraph=True)(torch.ones(2))"
    ),
    "deterministic": "torch.use_deterministic_algorithms(True)",
}


class Server:
    """A process that has trained once without compilation."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, code: str) -> str:
        """Run code in a fork; return its traceback, or an empty string if it succeeds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        return str(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.process.communicate(timeout=60)


@pytest.mark.parametrize("name", LIGHT)
def test_code_that_compiles_nothing_does_not_import_the_compiler(name: str, server: Server) -> None:
    assert server.run(LIGHT[name] + "\n" + LIGHT["nothing"]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_code_that_needs_the_compiler_finds_the_real_module_after_a_training(name: str, server: Server) -> None:
    assert server.run(WHOLE[name]) == ""


UNVERIFIED = f"""
import sys
from trainkit.training import compile as compilation
compilation.VERIFIED_TORCH = ((1, 0), (2, 0))
{TRAIN}
assert "torch._dynamo.eval_frame" in sys.modules
torch._dynamo.reset()
"""


@pytest.mark.slow
def test_an_unverified_torch_imports_the_compiler_as_usual() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", UNVERIFIED],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verified", [((2, 11), (2, 15)), ((2, 0), (2, 1)), ((3, 0), (3, 1))])
def test_torch_internals_are_changed_only_in_verified_versions(verified: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "VERIFIED_TORCH", verified)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    finders = [finder for finder in sys.meta_path if not isinstance(finder, compilation.DynamoImportWatcher)]
    monkeypatch.setattr(sys, "meta_path", list(finders))
    monkeypatch.delitem(sys.modules, compilation.DYNAMO, raising=False)
    is_verified = verified[0] <= tuple(map(int, torch.__version__.split(".")[:2])) <= verified[1]
    assert compilation.is_verified_torch() == is_verified
    compilation.skip_dynamo(optimizer)
    compilation.defer_dynamo()
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    assert [len(registered) for registered in hooks] == [is_verified, is_verified]
    watchers = [finder for finder in sys.meta_path if finder not in finders]
    assert len(watchers) == is_verified
    for watcher in watchers:
        watcher.find_spec(compilation.DYNAMO, None)
    assert sys.meta_path == finders


class Disables(SmallCNN):
    """A model that disables the compiler for one of its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled: list[bool] = []
        self.uncompiled = torch.compiler.disable(self.note)

    def note(self, maps: Tensor) -> Tensor:
        self.compiled.append(torch.compiler.is_compiling())
        return maps

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.uncompiled(self.maps(images)).flatten(1))
        return logits


class Breaks(SmallCNN):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        torch._dynamo.graph_break()
        logits: Tensor = self.head(maps.flatten(1))
        return logits


class CompilesItself(SmallCNN):
    def __init__(self) -> None:
        super().__init__()
        self.body.compile(backend="eager")

    @torch.compile(backend="eager")
    def maps(self, images: Tensor) -> Tensor:
        return super().maps(images)


def test_a_model_that_compiles_itself_trains_like_a_plain_model(here: Any) -> None:  # noqa: ARG001
    assert_close(train_session(small_run(CompilesItself, "ema=0.9")), train_session(small_run(SmallCNN, "ema=0.9")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised by torch's compiler after a graph break
@pytest.mark.parametrize("model", [SmallCNN, Breaks, Disables])
@pytest.mark.parametrize("more", [["compile=true"], ["compile=reduce-overhead", "ema=0.9", "clip_norm=0.1"]], ids=str)
def test_a_compiled_model_trains_like_a_plain_model(model: type[nn.Module], more: list[str]) -> None:
    short_last_batch = ["data.split=0.02", "limit_batches=off", "batch_size=300"]
    overrides = [*small_run(model, *more), *short_last_batch]
    compiled, plain = train_session(overrides), train_session([*overrides, "compile=off"])
    assert_close(compiled, plain, rtol=1e-3)
    assert compiled.state.progress.best is not None
    assert plain.state.progress.best is not None
    assert compiled.state.progress.best["val/loss"] == pytest.approx(plain.state.progress.best["val/loss"], rel=1e-4)
    assert [*compiled.state.objects.model.state_dict()] == [*plain.state.objects.model.state_dict()]
    assert not any(getattr(compiled.state.objects.model, "compiled", []))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_compiled_model_computes_in_the_configured_precision(precision: str) -> None:
    overrides = small_run(SmallCNN, f"precision={precision}", "micro_batch=12")
    assert_close(train_session([*overrides, "compile=true"]), train_session(overrides), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_compile_compiles_the_model() -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()  # another test may have compiled a model of the same code
    counters.clear()
    train_session(small_run(SmallCNN, "compile=true"))
    assert counters["frames"]["ok"] >= 1


@pytest.mark.slow
def test_a_run_resumes_with_and_without_compilation() -> None:
    overrides = small_run(SmallCNN, "optim=adam", "epochs=2")
    straight = train_session(overrides)
    for there, here_ in (("true", "off"), ("off", "true")):
        begun, later = (
            build.build_session(compose_settings([*overrides, f"compile={name}"])) for name in (there, here_)
        )
        saved: list[dict[str, Any]] = []

        class Keep:
            def on_epoch_end(self, state: Any, metrics: Any, kept: list[Any] = saved) -> None:  # noqa: ARG002
                kept.append(capture_state(state, {}))

        begun.state.settings = replace(begun.state.settings, epochs=1)
        fit(begun.state, begun.train, None, [Keep()])
        restore_state(later.state, saved[0])
        assert digest(capture_state(later.state, {})) == digest(saved[0])
        fit(later.state, later.train)
        assert_close(later, straight, rtol=1e-3)


def test_compile_is_an_error_without_a_cpp_compiler_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ConfigError, match="compile: this machine has no C\\+\\+ compiler"):
        compile_model(nn.Linear(2, 2), "default")
