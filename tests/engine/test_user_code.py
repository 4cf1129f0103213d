"""Mistakes in a user's code: each is an error that names the config key, the user's line, and what was expected."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.helpers import read_history, thinned

MODULE = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, out=10):
        super().__init__()
        self.linear = nn.Linear(8, out)

    def forward(self, x):
        return self.linear(x)


class TwoInputs(Net):
    def forward(self, x, other):
        return self.linear(x) + other


class Dicts(Net):
    def forward(self, x):
        return {"logits": self.linear(x)}


class Flat(Net):
    def forward(self, x):
        return self.linear(x)[:, 0]


class Narrow(Net):
    def forward(self, x):
        return self.linear(x[:, :7])


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.linear(self.norm(x))


class Softmax(Net):
    def forward(self, x):
        return self.linear(x).softmax(1)


class Column(Net):
    def forward(self, x):
        return self.linear(x)[:, 0]


def squares(outputs, targets):
    return (outputs - targets).square().mean()


def squares_of_outputs(outputs):
    return outputs.square().mean()


class Async:
    async def on_epoch(self, state, metrics):
        pass


class Returns:
    def on_epoch(self, state, metrics):
        return {"mine/score": 1.0}


class Names:
    def on_epoch(self, state, metrics):
        metrics[3] = 1.0


class Denominator(nn.Module):
    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

    def denominator(self, targets):
        return targets > 3


class Steps(Net):
    def forward(self, x):
        return self.linear(x)[:, None].repeat(1, 4, 1)


class FlatSteps(Net):
    def forward(self, x):
        return self.linear(x).repeat(4, 1)


class Constant(Net):
    def forward(self, x):
        return self.linear(x) * 0


class Loss(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls = kind, []
        self.register_buffer("scale", torch.ones(()))

    def forward(self, outputs, targets):
        self.calls.append(len(self.calls))
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return {
            "dict": lambda: {"ce": losses.mean(), "count": len(losses)},
            "vector": lambda: losses,
            "float": lambda: losses.mean().item(),
            "integer": lambda: losses.mean().long(),
            "detached": lambda: losses.mean().detach(),
            "key": lambda: outputs["logits"].mean(),
            "view": lambda: outputs.t().view(-1).square().mean(),
            "none": lambda: None,
            "sum": lambda: losses.sum(),
            "saved": lambda: (losses * self.scale).mean(),
            "masked": lambda: (losses * (targets > 3)).sum() / (targets > 3).sum(),
            "centered": lambda: ((losses - losses.mean()) ** 2).mean(),
        }[self.kind]()


class Points:
    classes = 10

    def __init__(self, kind="ok", size=64):
        generator = torch.Generator().manual_seed(0)
        self.kind, self.inputs = kind, torch.randn(size, 8, generator=generator)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        x, label = self.inputs[index], index % 10
        return {
            "ok": lambda: (x, label),
            "strings": lambda: (x, "cat"),
            "dicts": lambda: (x, {"label": label}),
            "floats": lambda: (x, float(label)),
            "vectors": lambda: (x, x),
            "negative": lambda: (x, torch.full((10,), -1.0)),
            "int32": lambda: (x, torch.tensor(label, dtype=torch.int32)),
            "steps": lambda: (x, torch.full((4,), label)),
            "columns": lambda: (x, torch.tensor([label])),
            "beyond": lambda: (x, label + 5),
            "numbers": lambda: (x, torch.tensor([float(label)])),
            "doubles": lambda: (x.double(), label),
            "pairs": lambda: ((x, x), label),
            "unequal": lambda: (x[: 3 + index % 4], label),
            "alone": lambda: x,
            "missing": lambda: {}[index],
            "ignored": lambda: (x, label - 1),
            "tens": lambda: (x, torch.tensor([float(label)])),
            "soft": lambda: (x, torch.full((10,), 0.3)),
            "images": lambda: (x, torch.full((1, 2, 2), 200, dtype=torch.uint8)),
        }[self.kind]()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter([])


class Signature:
    def on_epoch(self, state):
        pass


class Replaces:
    def on_epoch(self, state, metrics):
        metrics["train/loss"] = 0.0


class Removes:
    def on_epoch(self, state, metrics):
        del metrics["grad_norm"]


class Lists:
    def on_epoch(self, state, metrics):
        metrics["mine/f1"] = [1.0, object()]


class Fails:
    def on_step(self, state):
        state.step + state.metrics["loss"]


class Sgd(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            group["learning_rate"]


class InPlace(Sgd):
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * param.grad


class NumberLr(torch.optim.lr_scheduler.LRScheduler):
    def get_lr(self):
        return 0.1


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 10)


class Scores:
    def on_epoch(self, state, metrics):
        metrics["val/f1"] = torch.ones(10)


class Reads:
    def on_epoch(self, state, metrics):
        print(metrics["train/los"])


class Decay(torch.optim.lr_scheduler.LRScheduler):
    def get_lr(self):
        return [self.gamma]
"""


@dataclass(frozen=True)
class Case:
    """A mistake: the overrides that cause it, and what the message contains."""

    overrides: str
    key: str
    found: str
    expected: str
    line: str  # a text in the user's line that the message names
    code: int = 2


DATA, LOSS = "+data.train.kind", "+loss.kind"
GETITEM = "def __getitem__"
CASES = {
    "string targets": Case(f"{DATA}=strings", "data.train", "a list of 32 ('cat')", "needs a tensor", GETITEM),
    "dict targets": Case(f"{DATA}=dicts", "data.train", "a dict (label: (32,) int64)", "needs a tensor", GETITEM),
    "float targets": Case(f"{DATA}=floats", "data.train", "(32,) float64", "needs classes (32,) int64", GETITEM),
    "float vectors": Case(f"{DATA}=vectors", "data.train", "(32, 8) float32", "or probabilities (32, 10)", GETITEM),
    "negative": Case(f"{DATA}=negative", "data.train", "values down to -1", "needs probabilities", GETITEM),
    "int32 targets": Case(f"{DATA}=int32", "data.train", "(32,) int32", "needs int64", GETITEM),
    "columns": Case(f"{DATA}=columns", "data.train", "(32, 1) int64", "return targets of shape ()", GETITEM),
    "classes last": Case(
        f"{DATA}=steps model=mine.Steps", "data.train", "(32, 4, 10)", "outputs.transpose(1, 2)", GETITEM
    ),
    "flat steps": Case(
        f"{DATA}=steps model=mine.FlatSteps", "data.train", "(128, 10)", "outputs.transpose(1, 2)", GETITEM
    ),
    "beyond": Case(f"{DATA}=beyond", "data.train", "class 14", "10 outputs: classes 0 to 9", GETITEM),
    "regression": Case(f"{DATA}=numbers", "data.train", "(32, 1) float32", "choose a loss for numbers", GETITEM),
    "doubles": Case(f"{DATA}=doubles", "model", "inputs (32, 8) float64", "return float32", "self.linear(x)"),
    "pairs": Case(
        f"{DATA}=pairs", "model", "a list of 2 ((32, 8) float32)", "take them apart in forward", "self.linear(x)"
    ),
    "unequal samples": Case(f"{DATA}=unequal", "data.train", "(3,) float32", "equal shape", GETITEM, 5),
    "inputs alone": Case(f"{DATA}=alone", "data.train", "(32, 8) float32", "or probabilities (32, 10)", GETITEM),
    "a missing key": Case(f"{DATA}=missing", "data.train", "KeyError: ", "fix that code", '"missing"'),
    "a stream": Case("data.train._target_=mine.Stream", "data.train", "a length", "steps_per_epoch", "def __iter__"),
    "two inputs": Case("model=mine.TwoInputs", "model", "argument: 'other'", "how a model is called", "def forward"),
    "dict outputs": Case("model=mine.Dicts", "model", "a dict (logits: (32, 10) float32)", "a tensor", "def forward"),
    "flat outputs": Case("model=mine.Flat", "model", "(32,) float32", "(N, classes)", "def forward"),
    "narrow": Case("model=mine.Narrow", "model", "32x7 and 8x10", "fix that code", "self.linear(x[:, :7])"),
    "narrow in a closure": Case(
        "model=mine.Narrow optim=lbfgs", "model", "32x7 and 8x10", "fix that code", "self.linear(x[:, :7])"
    ),
    "dict loss": Case(f"{LOSS}=dict", "loss", "a dict (ce: () float32, count: 32)", "one element", "def forward"),
    "vector loss": Case(f"{LOSS}=vector", "loss", "(32,) float32", "one element", "def forward"),
    "float loss": Case(f"{LOSS}=float", "loss", "a Python float", "one element", "def forward"),
    "integer loss": Case(f"{LOSS}=integer", "loss", "() int64", "a float tensor", "def forward"),
    "detached loss": Case(f"{LOSS}=detached", "loss", "not depend on a", "remove .detach()", "def forward"),
    "no loss": Case(f"{LOSS}=none", "loss", "a NoneType", "one element", "def forward"),
    "a view": Case(f"{LOSS}=view", "loss", "view size is not", "use reshape", '"view"'),
    "a hook's signature": Case(
        "hooks=Signature", "hooks.h", "(state, metrics)", "def on_epoch(self, state", "def on_ep"
    ),
    "a replaced metric": Case(
        "hooks=Replaces", "hooks.h", "changes the metric train/loss", "add it as", "def on_epoch"
    ),
    "a removed metric": Case("hooks=Removes", "hooks.h", "removes the metric grad_norm", "add it as", "def on_epoch"),
    "a metric of lists": Case("hooks=Lists", "hooks.h", "mine/f1 is a list", "as numbers", "def on_epoch"),
    "an async hook": Case("hooks=Async", "hooks.h", "is async", "without async", "async def on_epoch"),
    "returned metrics": Case(
        "hooks=Returns", "hooks.h", "returns metrics, which are ignored", "metrics.upd", "def on_epoch"
    ),
    "a metric named 3": Case("hooks=Names", "hooks.h", "a metric is named 3", "names are strings", "def on_epoch"),
    "a denominator per sample": Case(
        "loss=mine.Denominator", "loss", "returns (32,)", "expected one number", "def forward"
    ),
    "a class to ignore": Case(f"{DATA}=ignored", "data.train", "class -1", "loss.ignore_index=-1", GETITEM),
    "flat targets": Case(f"{DATA}=numbers model=mine.Flat loss=mse", "data.train", "(32, 1)", "(32,)", GETITEM),
    "classes for bce": Case(
        f"{DATA}=tens loss=bce +model.out=1", "data.train", "a target is 9", "from 0 to 1", GETITEM
    ),
    "no forward": Case("model=mine.NoForward", "model", 'the required "forward"', "define a method", "class NoForward"),
    "a metric per class": Case(
        "hooks=Scores", "hooks.h", "val/f1 is a Tensor (10,) float32", "as numbers", "def on_epoch"
    ),
    "an unknown metric": Case("hooks=Reads", "hooks.h", "KeyError: 'train/los'", "mean train/loss?", '"train/los"', 1),
    "a step with gradients": Case("optim=mine.InPlace", "optim", "a leaf Variable", "@torch.no_grad()", "param -="),
    "a number of a scheduler": Case(
        "scheduler=mine.NumberLr", "scheduler", "'float' object", "return a list from get_lr", "def get_lr"
    ),
    "a hook that fails": Case("hooks=Fails", "hooks.h", "no 'metrics'", "fix that code", "state.metrics", 1),
    "an optimizer": Case("optim=mine.Sgd", "optim", "KeyError: 'learning_rate'", "fix that code", '"learning_rate"'),
    "a scheduler": Case("scheduler=mine.Decay", "scheduler", "no attribute 'gamma'", "fix that code", "self.gamma"),
}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Return a folder with a module full of mistakes."""
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


def command(overrides: str) -> list[str]:
    """Return a command line that trains the module's classes with one mistake."""
    words = overrides.split()
    if words[0].startswith("hooks="):
        words[0] = f"+hooks.h._target_=mine.{words[0].partition('=')[2]}"
    base = {"model": "mine.Net", "data.train._target_": "mine.Points", "data.split": "off", "data.classes": "10"}
    base |= {"epochs": "1", "progress": "plain", "hydra.run.dir": "run"}
    base |= {"loss": "mine.Loss"} if any(word.startswith(LOSS) for word in words) else {}
    given = {word.partition("=")[0] for word in words}
    return [*(f"{key}={value}" for key, value in base.items() if key not in given), *words]


@pytest.mark.parametrize("name", thinned(CASES, keep=4))
def test_a_mistake_is_reported_with_its_key_its_line_and_what_was_expected(
    name: str, mine: Path, forked: Command
) -> None:
    case = CASES[name]
    result = forked(*command(case.overrides))
    text = result.stderr[result.stderr.find("error: ") :]
    assert result.returncode == case.code, result.stderr
    assert "Traceback" not in text
    assert text.startswith(f"error: {case.key}: "), text
    assert case.found in text
    assert case.expected in text
    lines = MODULE.splitlines()
    named = [lines[int(number) - 1] for number in re.findall(r"mine\.py, line (\d+)", text)]
    assert any(case.line in line for line in named), (named, text)
    assert not (mine / "run" / "history.jsonl").exists() or not read_history(mine / "run")


NOTES = {
    "more outputs than classes": ("+model.out=1000", "the model has 1,000 outputs, and the data has 10 classes"),
    "no probabilities": (f"{DATA}=soft", "those of a sample add up to 3 to 3, not to 1"),
    "probabilities for logits": ("model=mine.Softmax", "CrossEntropyLoss applies softmax itself"),
    "logits for log-probabilities": ("loss=nll", "which NLLLoss needs: end the model in log_softmax"),
    "a broadcast": (f"{DATA}=numbers loss=mine.squares +model.out=1 model=mine.Column", "may broadcast to each other"),
    "a constant model": ("model=mine.Constant", "the gradient of the first batch is exactly 0"),
    "an undeclared sum": (f"{LOSS}=sum", "returns a sum over the batch: give it reduction = 'sum'"),
    "a masked mean": (f"{LOSS}=masked", "define denominator(targets)"),
    "a loss between samples": (f"{LOSS}=centered", "declare whole_batch = True"),
}


@pytest.mark.parametrize("name", thinned(NOTES, keep=3))
def test_a_plausible_mistake_is_a_note_before_the_second_step(name: str, mine: Path, forked: Command) -> None:
    overrides, text = NOTES[name]
    result = forked(*command(overrides))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(text) == 1, result.stderr
    assert (mine / "run" / "trainkit.log").read_text().count(text) == 1


def test_a_syntax_error_is_named_with_its_file_and_line(mine: Path, forked: Command) -> None:
    (mine / "broken.py").write_text("import torch\n\ndef net(:\n    return 1\n")
    result = forked(*command("model=broken.net"))
    assert result.returncode == 2
    assert f"{mine}/broken.py, line 3: def net(:\n  fix that code" in result.stderr


def test_numbers_with_cross_entropy_over_one_output_are_refused(mine: Path, forked: Command) -> None:
    result = forked(*command(f"{DATA}=numbers +model.out=1"))
    assert result.returncode == 2
    assert "error: loss: torch.nn.modules.loss.CrossEntropyLoss: CrossEntropyLoss over one output is always 0" in (
        result.stderr
    )
    assert "loss=mse" in result.stderr
    assert forked(*command(f"{DATA}=numbers +model.out=1 loss=mse hydra.run.dir=other")).returncode == 0
    assert (mine / "other" / "history.jsonl").exists()


def test_a_loss_of_one_argument_is_a_config_error_that_says_how_a_loss_is_called(mine: Path, forked: Command) -> None:  # noqa: ARG001
    result = forked(*command("loss=mine.squares_of_outputs"))
    assert result.returncode == 2
    assert "mine.squares_of_outputs takes (outputs), and a loss is called with (outputs, targets)" in result.stderr


def test_image_targets_that_stay_uint8_are_a_note(mine: Path, forked: Command) -> None:
    (mine / "images.py").write_text(
        "import mine\nclass Net(mine.Net):\n    def forward(self, x):\n"
        "        return self.linear(x)[:, :4].reshape(-1, 1, 2, 2)\n"
    )
    result = forked(*command(f"{DATA}=images model=images.Net loss=mse"))
    assert result.returncode == 0, result.stderr
    assert "the targets are uint8 (32, 1, 2, 2) with values up to 200, and are not scaled" in result.stderr


@pytest.mark.parametrize("unit", [1000, 1])
def test_large_targets_of_a_regression_are_a_note(unit: int, tmp_path: Path, forked: Command) -> None:
    rows = "".join(f"{rooms},{(200 + rooms) * unit}\n" for rooms in range(41))
    (tmp_path / "houses.csv").write_text(f"rooms,price\n{rows}")
    words = ["data=table", "data.file=houses.csv", "data.target=price", "model=mlp", "loss=mse", "data.split=off"]
    result = forked(*words, "epochs=1", "batch_size=41", "lr=1e-9", "progress=plain")
    assert result.returncode == 0, result.stderr
    assert ("the targets have a size of 220,000 on average" in result.stderr) == (unit == 1000)


def test_a_last_batch_of_one_sample_with_batch_norm_is_refused_before_the_first_step(
    mine: Path, forked: Command
) -> None:
    result = forked(*command("model=mine.Normed +data.train.size=65 batch_size=16"))
    assert result.returncode == 2
    assert "65 samples in batches of 16: a forward pass has one sample, which batch norm (model.norm)" in result.stderr
    assert "write batch_size=17" in result.stderr
    assert not (mine / "run").exists()
    result = forked(*command("model=mine.Normed +data.train.size=64 batch_size=16 micro_batch=5"))
    assert "micro_batch=5: a forward pass has one sample" in result.stderr
    for fine in ("batch_size=17", "batch_size=16 limit_batches=4"):
        run = f"hydra.run.dir=run-{fine.split('=')[1][:2]}-{fine[-1]}"
        assert forked(*command(f"model=mine.Normed +data.train.size=65 {fine} {run}")).returncode == 0


def test_batch_norm_after_a_convolution_accepts_a_last_batch_of_one_image(tmp_path: Path, forked: Command) -> None:
    (tmp_path / "maps.py").write_text(
        "from torch import nn\ndef net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10))\n"
    )
    overrides = ["data=synthetic", "data.train.size=65", "data.split=off", "epochs=1", "progress=off"]
    result = forked("model=maps.net", *overrides, "batch_size=16", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr


def test_a_loss_whose_buffer_is_saved_for_the_backward_pass_trains(mine: Path, forked: Command) -> None:  # noqa: ARG001
    result = forked(*command(f"{LOSS}=saved"))
    assert result.returncode == 0, result.stderr
    assert "note: mine" not in result.stderr


def test_the_default_run_prints_no_new_note(forked: Command) -> None:
    result = forked("epochs=1", "progress=plain", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    assert "note:" not in result.stderr


def test_functions_are_losses_with_exact_denominators(mine: Path, forked: Command) -> None:
    (mine / "functions.py").write_text(
        "from torch.nn import functional as F\n"
        "def mean(outputs, targets):\n    return F.cross_entropy(outputs, targets)\n"
        "def total(outputs, targets, scale=1.0):\n"
        "    return scale * F.cross_entropy(outputs, targets, reduction='sum')\n"
        "total.reduction = 'sum'\n"
        "def make(smoothing):\n    from torch import nn\n    return nn.CrossEntropyLoss(label_smoothing=smoothing)\n"
    )
    torch_loss = "torch.nn.functional.cross_entropy"
    equal = {
        "class": ["loss=cross_entropy"],
        "function": ["loss=functions.mean"],
        "torch": [f"loss={torch_loss}"],
        "partial": [f"loss={torch_loss}", "+loss._partial_=true"],
        "sum": ["loss=functions.total", "loss.scale=1.0", "lr=0.01"],
        "made": ["loss=functions.make", "loss.smoothing=0.0"],
    }
    losses = {}
    for name, overrides in equal.items():
        rest = [*overrides, f"hydra.run.dir={name}", "lr=0", "batch_size=48"]
        result = forked(*command(" ".join(dict.fromkeys(rest[: -1 if "lr=0.01" in rest else None]))))
        assert result.returncode == 0, (name, result.stderr)
        losses[name] = read_history(mine / name)[0]["train/loss"]
        assert "note:" not in result.stderr.replace("note: loss", "")
    first = losses.pop("class")
    assert losses.pop("sum") > 0
    assert all(value == pytest.approx(first, rel=1e-6) for value in losses.values())


def test_a_function_of_torch_with_class_weights_has_exact_epoch_losses(mine: Path, forked: Command) -> None:
    weights = "[1,2,3,4,5,6,7,8,9,10]"
    common = ["lr=0", f"loss.weight={weights}", "batch_size=48"]
    for name, loss in (("module", "cross_entropy"), ("function", "torch.nn.functional.cross_entropy")):
        result = forked(*command(" ".join([f"loss={loss}", *common, f"hydra.run.dir={name}"])))
        assert result.returncode == 0, result.stderr
    rows = [json.loads((mine / name / "history.jsonl").read_text()) for name in ("module", "function")]
    assert rows[0]["train/loss"] == rows[1]["train/loss"]
