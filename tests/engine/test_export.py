"""`trainkit export`: files that agree with the model, their cards, and how they are loaded again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import trainkit
from tests.conftest import Command
from tests.helpers import compose_settings
from trainkit.build.session import build_session
from trainkit.core.errors import CheckpointError, ConfigError, ExportError, StorageError, UserCodeError
from trainkit.engine.export import Exported
from trainkit.engine.exports import onnx as onnx_format
from trainkit.engine.exports import program as torch_format
from trainkit.engine.exports.calls import Caller
from trainkit.engine.exports.raw_inputs import reading_steps
from trainkit.engine.exports.source import read_source
from trainkit.engine.exports.trusted import find_untrusted
from trainkit.model_libraries import huggingface
from trainkit.runs.directory import Run

QUICK = ["limit_batches=2", "epochs=1"]
NORMALIZED = ["data.normalize={mean:[0.1,0.2,0.3],std:[0.5,0.6,0.7]}"]
FORMATS = ("onnx", "torch", "safetensors")


def run_onnx(file: Path, **inputs: Tensor) -> list[np.ndarray[Any, Any]]:
    """Return the outputs of an ONNX file."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [*session.run(None, {name: value.numpy() for name, value in inputs.items()})]


def run_card(card: Path) -> str:
    """Run the lines of Python in a model card in its folder; return what they print."""
    code = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert code is not None and len(code[1].splitlines()) <= 5
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}  # with the models of the user
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=card.parent, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def module(here: Path, text: str, name: str = "mymodels") -> None:
    """Write a module of the user, which replaces an earlier one of that name."""
    (here / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n\n{text}")
    sys.modules.pop(name, None)


CASES: dict[str, list[str]] = {
    "toy_cnn": QUICK,
    "resnet18": [*QUICK, "model=torchvision", "model.name=resnet18", "batch_size=8", "ema=0.5"],
    "vit": [*QUICK, "experiment=vit", "batch_size=8"],
    "gpt": ["experiment=char_gpt", "steps=2", "steps_per_epoch=2", "limit_val_batches=1"],
}
SLOW = ("resnet18", "vit", "gpt")


@dataclass
class Case:
    """A run, and its exports in all formats."""

    run: Run
    exports: dict[str, Exported]


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("runs") / request.param
    run = trainkit.train(trainkit.compose([*CASES[request.param], "report=off"]), directory=directory)
    return Case(run, {form: trainkit.export(run, form) for form in FORMATS})


def random_inputs(run: Run, samples: int) -> Tensor:
    """Return a batch of random inputs of the model of a run, after the preprocessing."""
    sample = json.loads((run.directory / "preprocessing.json").read_text())["inputs"]
    generator = torch.Generator().manual_seed(100 + samples)
    shape = (samples, *sample["shape"])
    return torch.randint(9, shape, generator=generator) if sample["dtype"] == "int64" else torch.randn(shape)


def outputs_of(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_an_export_has_the_outputs_of_the_model_for_any_batch_size(case: Case, samples: int) -> None:
    inputs = random_inputs(case.run, samples)
    expected = outputs_of(trainkit.load(case.run), inputs)

    [outputs] = run_onnx(case.exports["onnx"].file, inputs=inputs)
    torch.testing.assert_close(torch.from_numpy(outputs), expected, rtol=1e-4, atol=1e-4)
    program = torch.export.load(case.exports["torch"].file).module()
    torch.testing.assert_close(outputs_of(program, inputs), expected, rtol=1e-6, atol=1e-6)
    loaded = trainkit.load(case.exports["safetensors"].file)
    assert torch.equal(outputs_of(loaded, inputs), expected)


def test_a_safetensors_file_has_the_weights_bit_by_bit(case: Case) -> None:
    own, loaded = (trainkit.load(path).state_dict() for path in (case.run, case.exports["safetensors"].file))
    assert own.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in own.items())


@pytest.mark.parametrize("form", FORMATS)
def test_the_lines_in_the_card_run_the_file(case: Case, form: str) -> None:
    shape = outputs_of(trainkit.load(case.run), random_inputs(case.run, 2)).shape
    card = case.exports[form].card
    printed = run_card(card)
    assert form == "safetensors" or re.findall(r"\d+", printed) == [str(size) for size in shape]
    assert "trainkit.load" not in card.read_text()


def test_a_program_is_loaded_only_if_it_is_trusted(case: Case) -> None:
    file = case.exports["torch"].file
    with pytest.raises(ConfigError, match=r"trust=True"):
        trainkit.load(file)
    inputs = random_inputs(case.run, 4)
    assert torch.equal(outputs_of(trainkit.load(file, trust=True), inputs), outputs_of(trainkit.load(case.run), inputs))


# ----------------------------------------------------------------------------------- models of the user

INIT = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
LINEAR = f"{INIT}        self.layer = nn.Linear(4, 3)\n\n"
# Data sets of inputs (4,) with a class out of 3, in several forms.
DATA = """
    class Rows(torch.utils.data.Dataset):
        def __init__(self, form):
            self.form = form
            self.x = torch.randn(12, 4)
            self.classes = ["a", "b|`", "c"]

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            x, scale = self.x[i], self.x[i, :1].exp()
            inputs = {"one": x, "pair": (x, scale), "named": {"scale": scale, "image": x}, "ids": x.gt(0).long()}
            return inputs[self.form], i % 3
"""


@pytest.fixture
def user(here: Path) -> Callable[..., Run]:
    """Train a model that the user wrote, for two steps."""

    def train_net(code: str, *overrides: str, form: str = "one") -> Run:
        (here / "mymodels.py").write_text(f"import torch\nfrom torch import nn\n\n{dedent(DATA)}\n\n{code}")
        sys.modules.pop("mymodels", None)
        data = ["data.train._target_=mymodels.Rows", f"+data.train.form={form}", "data.split=null", "data.val=null"]
        names = ["model._target_=mymodels.Net", *data, "monitor.metric=train/loss", "report=off", "batch_size=4"]
        return trainkit.train(trainkit.compose([*QUICK, *names, *overrides]), directory=here / "run")

    return train_net


def forward(body: str, args: str = "x") -> str:
    """Return the code of a model with a linear layer."""
    return f"{LINEAR}    def forward(self, {args}):\n        {body}\n"


def test_several_inputs_are_arguments_of_the_program_and_inputs_of_the_onnx_file(user: Callable[..., Run]) -> None:
    for form in ("named", "pair"):
        shutil.rmtree("run", ignore_errors=True)
        run = user(forward("return self.layer(image) * scale", "image, scale"), form=form)
        image, scale = torch.randn(5, 4), torch.randn(5, 1)
        expected = outputs_of(trainkit.load(run), image, scale)
        program = torch.export.load(trainkit.export(run, "torch").file).module()
        found = program(image=image, scale=scale) if form == "named" else program(image, scale)
        assert torch.equal(found.detach(), expected)
        exported = trainkit.export(run, "onnx")
        [outputs] = run_onnx(exported.file, image=image, scale=scale)
        torch.testing.assert_close(torch.from_numpy(outputs), expected)
        assert run_card(exported.card) == "(2, 3)"


LOSS = "\n\ndef loss(outputs, targets):\n    return nn.functional.cross_entropy(outputs['logits'], targets)\n"


def test_outputs_keep_the_names_of_a_mapping(user: Callable[..., Run]) -> None:
    body = forward("y = self.layer(x); return {'logits': y, 'more': (y.sum(1), y * 2)}")
    run = user(body + LOSS, "loss=mymodels.loss")
    session = onnxruntime.InferenceSession(trainkit.export(run, "onnx").file)
    assert [output.name for output in session.get_outputs()] == ["logits", "more_0", "more_1"]
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("inputs", ["batch", 4])]
    card = (run.directory / "export" / "onnx" / "README.md").read_text()
    assert "| `logits` | (N, 3) | float32 |" in card
    assert "| `more_0` | (N) | float32 |" in card


def test_the_onnx_file_describes_itself_and_names_no_file_of_this_machine(user: Callable[..., Run]) -> None:
    run = user(forward("return self.layer(x)"))
    file = trainkit.export(run, "onnx").file
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(metadata["classes"]) == ["a", "b|`", "c"]
    assert json.loads(metadata["preprocessing"])["inputs"] == {"shape": [4], "dtype": "float32"}
    assert metadata["trainkit_version"] == trainkit.__version__
    program = trainkit.export(run, "torch").file
    assert all(b"mymodels.py" not in content for content in (file.read_bytes(), program.read_bytes()))


def test_the_card_of_a_table_lists_the_inputs_in_their_order(here: Path) -> None:
    (here / "t.csv").write_text("size,city,price\n1,Bern,1\n,Rome,2\n3,,3\n4,Bern,4\n5,Rome,5\n")
    data = ["data=table", "data.file=t.csv", "data.target=price", "data.fill=median", "model=mlp", "loss=mse"]
    run = trainkit.train(trainkit.compose([*data, "epochs=1", "report=off"]), directory=here / "run")
    card = trainkit.export(run, "safetensors").card.read_text()
    assert 'The 4 inputs are, in this order: `["size", "city=", "city=Bern", "city=Rome"]`.' in card
    assert 'A missing number is replaced by `{"size": 3.5}`.' in card
    assert f"of the run run of {run.info['started'][:10]}, " in card
    assert "| `data.target` | `price` |" in card
    assert "(absent)" not in card
    assert "${" not in card


def test_the_card_says_how_images_get_their_size() -> None:
    images = {"kind": "images", "mode": "L"}
    assert reading_steps(images) == ["Convert the image to L."]
    assert reading_steps({**images, "size": 32})[1] == (
        "The shorter side is resized to 32 pixels, then the center is cropped to 32x32."
    )
    assert "the ratio of 24x32 pixels (height x width)" in reading_steps({**images, "size": [24, 32]})[1]


@pytest.mark.parametrize(
    "reader", [{"kind": "images", "size": "`big`"}, {"kind": "table", "columns": 3}, {"kind": "x"}]
)
def test_the_card_quotes_a_reader_of_another_form(reader: dict[str, Any]) -> None:
    (step,) = reading_steps(reader)
    assert step.startswith(f'A raw input is read as: kind "{reader["kind"]}"')
    assert "`" not in step


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_with_preprocessing_the_file_takes_raw_images(form: str, here: Path) -> None:
    run = trainkit.train(trainkit.compose([*QUICK, "report=off", *NORMALIZED]), directory=here / "run")
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    expected = outputs_of(trainkit.load(run), (images.double() / 255 - mean).div(std).float())
    exported = trainkit.export(run, form, with_preprocessing=True)
    if form == "onnx":
        found = torch.from_numpy(run_onnx(exported.file, inputs=images)[0])
    else:
        found = outputs_of(trainkit.load(exported.file, trust=True), images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "Subtract the mean" in exported.card.read_text()


@pytest.mark.parametrize("overrides", [["experiment=table_regression"], NORMALIZED])
def test_the_preprocessing_of_an_export_has_the_bits_of_the_training(overrides: list[str], here: Path) -> None:
    config = trainkit.compose([*QUICK, *overrides, "report=off"])
    run = trainkit.train(config, directory=here / "run")
    prepare = build_session(compose_settings([*QUICK, *overrides])).train.prepare
    raw = read_source(run, "best").sample()
    inputs = torch.rand(3, *raw.shape).mul(255).to(raw.dtype)
    assert torch.equal(read_source(run, "best").prepare()(inputs, None)[0], prepare(inputs, None)[0])


def test_lazy_layers_and_batch_norm_in_evaluation_mode_are_exported(user: Callable[..., Run]) -> None:
    code = "class Net(nn.Sequential):\n    def __init__(self):\n"
    code += "        super().__init__(nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Dropout(), nn.LazyLinear(3))\n"
    run = user(code, "precision=bf16", "memory_format=channels_last")
    inputs = torch.randn(6, 4)
    expected = outputs_of(trainkit.load(run), inputs)
    [outputs] = run_onnx(trainkit.export(run, "onnx").file, inputs=inputs)
    torch.testing.assert_close(torch.from_numpy(outputs), expected)
    exported = trainkit.export(run, "safetensors")
    assert torch.equal(outputs_of(trainkit.load(exported.file, trust=True), inputs), expected)
    assert run_card(exported.card) == ""
    assert "precision=bf16: autocast is a part of the training" in exported.card.read_text()


def test_adapters_are_merged_into_plain_weights(here: Path) -> None:
    adapted = ["model=lora", "model.model={_target_:trainkit.models.ToyCNN}"]
    adapted.append("checkpoint.weights=trainable")
    run = trainkit.train(trainkit.compose([*QUICK, "report=off", *adapted]), directory=here / "run")
    inputs = random_inputs(run, 3)
    expected = outputs_of(trainkit.load(run), inputs)
    exported = trainkit.export(run, "safetensors")
    with safe_open(exported.file, "pt") as file:
        assert not [name for name in file.keys() if "parametrizations" in name]  # noqa: SIM118  # not a dict
        assert json.loads(file.metadata()["model"])["_target_"] == "trainkit.models.ToyCNN"
    assert torch.equal(outputs_of(trainkit.load(exported.file), inputs), expected)
    program = torch.export.load(trainkit.export(run, "torch").file)
    assert not [name for name in program.state_dict if "parametrizations" in name]
    assert torch.equal(outputs_of(program.module(), inputs), expected)


def test_tied_weights_are_written_once(user: Callable[..., Run]) -> None:
    body = INIT + "        self.first = nn.Linear(4, 4)\n        self.second = nn.Linear(4, 4)\n"
    body += "        self.second.weight = self.first.weight\n\n"
    body += "    def forward(self, x):\n        return self.second(self.first(x))\n"
    exported = trainkit.export(user(body), "safetensors")
    with safe_open(exported.file, "pt") as file:
        assert sorted(file.keys()) == ["first.bias", "first.weight", "second.bias"]
    model = trainkit.load(exported.file, trust=True)
    assert model.second.weight is model.first.weight
    assert run_card(exported.card) == ""


def test_a_model_that_carries_state_starts_each_call_without_it(here: Path) -> None:
    text = ["experiment=word_lstm", *QUICK, "data.length=5"]
    run = trainkit.train(trainkit.compose([*text, "report=off"]), directory=here / "run")
    tokens = random_inputs(run, 3)
    model = trainkit.load(run)
    expected = outputs_of(model, tokens)
    program = torch.export.load(trainkit.export(run, "torch").file).module()
    for _ in range(2):
        torch.testing.assert_close(outputs_of(program, tokens), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), [("bert", "SequenceClassification"), ("gpt2", "CausalLM")])
def test_a_model_of_transformers_is_exported_with_the_names_of_its_inputs(kind: str, task: str, here: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 90, "model_type": kind}
    model = huggingface(config={**sizes, "bos_token_id": 0, "eos_token_id": 0}, task=task).eval()
    sample = {name: torch.empty(9, dtype=torch.int64, device="meta") for name in ("input_ids", "attention_mask")}
    onnx_format.write(Caller(model, sample, lambda inputs: inputs), here / "model.onnx", {})
    tokens = torch.randint(90, (5, 9))
    expected = outputs_of(model, input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    [logits] = run_onnx(here / "model.onnx", input_ids=tokens, attention_mask=torch.ones_like(tokens))
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
    assert model.config.use_cache


# --------------------------------------------------------------------------------------------- errors

BAD = {
    "control flow": ("return self.layer(x) if x.sum() > 0 else self.layer(-x)", "depends on the values of a tensor"),
    "batch size": ("return torch.stack([self.layer(row) for row in x])", "its code depends on the batch size"),
    "numpy": ("return self.layer(x) + torch.from_numpy(x.numpy().sum(1, keepdims=True))", "cannot be exported"),
    "random": ("return self.layer(x) + torch.rand(3)", "different outputs for equal inputs"),
    "NaN": ("return self.layer(x) if self.training else self.layer(x) * float('nan')", "returns NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_cannot_be_exported_is_an_error_with_the_line_and_leaves_no_file(
    name: str, user: Callable[..., Run]
) -> None:
    body, text = BAD[name]
    run = user(forward(body))
    with pytest.raises(ExportError, match=text) as error:
        trainkit.export(run, "torch")
    assert "mymodels.py, line" in str(error.value)
    if name in ("control flow", "numpy"):
        assert body[:20] in str(error.value)
    assert not (run.directory / "export").exists()
    if name != "NaN":
        assert trainkit.export(run, "safetensors").file.exists()


def test_an_error_of_the_model_names_its_line(user: Callable[..., Run]) -> None:
    run = user(forward("return self.layer(x) if self.training else self.layers(x)"))
    with pytest.raises(UserCodeError, match=r"no attribute 'layers'(.|\n)*mymodels.py, line"):
        trainkit.export(run, "onnx")


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_a_file_that_differs_from_the_model_is_an_error_and_leaves_no_file(
    form: str, user: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = user(forward("return self.layer(x)"))
    session = (onnx_format if form == "onnx" else torch_format).Session
    call = session.__call__

    def wrong(self: Any, caller: Any, samples: int) -> Any:
        return [(name, value + 0.01 * (samples == 7)) for name, value in call(self, caller, samples)]

    monkeypatch.setattr(session, "__call__", wrong)
    with pytest.raises(ExportError, match=r"differs from the model by .* for 7 samples"):
        trainkit.export(run, form)
    assert not (run.directory / "export").exists()


# ------------------------------------------------------------------------------------ files and damage


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a linear model."""
    directory = tmp_path_factory.mktemp("toy") / "run"
    overrides = [*QUICK, "model=mlp", "report=off"]
    return trainkit.train(trainkit.compose(overrides), directory=directory).directory


@pytest.fixture
def saved(toy: Path, here: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(toy, here / "run"))


def test_an_export_replaces_an_earlier_export_of_the_run_and_no_other_file(saved: Path) -> None:
    first = trainkit.export(saved, "safetensors")
    first = trainkit.export(saved, "safetensors", checkpoint="step-0")
    before = first.card.read_text()
    assert sorted(path.name for path in first.file.parent.iterdir()) == ["README.md", "model.safetensors"]

    for file, content in ((first.file, b"other weights"), (first.card, before.replace("epoch", "Epoch").encode())):
        original = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="not an unchanged export of this run"):
            trainkit.export(saved, "safetensors")
        assert file.read_bytes() == content
        file.write_bytes(original)
    first.card.write_text("mine")
    assert (
        "step-00000000" in trainkit.export(saved, "safetensors", checkpoint="step-0", overwrite=True).card.read_text()
    )


def test_an_export_of_another_run_is_not_replaced(saved: Path, here: Path) -> None:
    trainkit.export(saved, "safetensors", here / "shared")
    other = Path(shutil.copytree(saved, here / "other"))
    with pytest.raises(ConfigError, match="not an unchanged export of this run"):
        trainkit.export(other, "safetensors", here / "shared")


def test_the_output_is_a_folder_or_a_file_with_the_suffix_of_the_format(saved: Path, here: Path) -> None:
    (here / "a.safetensors").mkdir()
    expected = {
        "new folder/x": "new folder/x/model.safetensors",
        "my models/net.safetensors": "my models/net.safetensors",
        "a.safetensors": "a.safetensors/model.safetensors",
        "v2.1": "v2.1/model.safetensors",
    }
    for output, file in expected.items():
        exported = trainkit.export(saved, "safetensors", output)
        assert exported.file == Path(file)
        assert exported.card.exists()
    assert Path("my models/net.md").exists()
    for output in ("net.onnx", "net.pt"):
        with pytest.raises(ConfigError, match="is not the suffix of the format safetensors"):
            trainkit.export(saved, "safetensors", output)
    Path("file").write_text("mine")
    with pytest.raises(ConfigError, match="it is a file, expected a directory"):
        trainkit.export(saved, "safetensors", "file")


@pytest.mark.parametrize("output", ["/proc/models", "run/run.json/models"])
def test_a_place_that_cannot_be_written_is_a_storage_error(output: str, saved: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written(.|\n)*--output PATH"):
        trainkit.export(saved, "safetensors", output)


@pytest.mark.parametrize("form", [*(pytest.param(f, marks=pytest.mark.slow) for f in FORMATS[:2]), FORMATS[2]])
def test_a_full_disk_leaves_the_earlier_export_and_no_other_file(form: str, saved: Path, here: Path) -> None:
    exported = trainkit.export(saved, form)
    before = {path: path.read_bytes() for path in exported.file.parent.iterdir()}
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import trainkit.engine.export; "
    )
    code += (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from trainkit.cli.main import main; sys.exit(main())"
    )
    words = [sys.executable, "-c", code, "export", "run", "--format", form]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True)
    assert done.returncode == StorageError.exit_code, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in exported.file.parent.iterdir()} == before


def test_what_a_killed_export_left_is_removed(saved: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    folder = saved / "export" / "safetensors"
    (folder / f".model.safetensors.new-{dead.stdout.strip()}").mkdir(parents=True)
    trainkit.export(saved, "safetensors")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]


@pytest.mark.parametrize(
    ("package", "form"), [("onnxruntime", "onnx"), ("onnxscript", "onnx"), ("safetensors", "safetensors")]
)
def test_a_missing_package_is_an_error_with_the_command_that_installs_it(
    package: str, form: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=rf"{package} is not installed\n  install it: pip install 'trainkit\[{form}\]'"
    ):
        trainkit.export(saved, form)


def test_a_run_whose_data_is_gone_is_exported(user: Callable[..., Run], here: Path) -> None:
    run = user(forward("return self.layer(x)"))
    module = here / "mymodels.py"
    module.write_text(module.read_text().replace("self.x = ", "self.x = open('gone.csv') and "))
    sys.modules.pop("mymodels")
    assert trainkit.export(run, "torch").difference == 0

    (run.directory / "preprocessing.json").unlink()  # a run of an earlier version
    with pytest.raises(ExportError, match=r"does not record the inputs of its model(.|\n)*--format safetensors"):
        trainkit.export(run, "torch")
    assert trainkit.export(run, "safetensors").difference is None


def test_a_damaged_checkpoint_and_a_missing_one_are_errors(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="has no step-7 checkpoint"):
        trainkit.export(saved, "safetensors", checkpoint="step-7")
    [state] = saved.glob("checkpoints/step-00000002/state.pt")
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes"):
        trainkit.export(saved, "safetensors")


def test_a_running_training_can_be_exported(saved: Path) -> None:
    code = "import sys, pathlib; from trainkit.runs.lock import Lock; Lock(pathlib.Path('run')).acquire(); "
    code += "print(1, flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "1\n"
        assert trainkit.export(saved, "safetensors", checkpoint="last").file.exists()
        other.kill()


def test_wrong_arguments_are_config_errors(saved: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean --format onnx"):
        trainkit.export(saved, "onx")
    with pytest.raises(ConfigError, match="--with-preprocessing"):
        trainkit.export(saved, "safetensors", with_preprocessing=True)
    with pytest.raises(ConfigError, match="write best, last or step-N"):
        trainkit.export(saved, "safetensors", checkpoint="newest")


def test_the_command_prints_the_files_and_the_difference(saved: Path, forked: Command) -> None:
    done = forked("export", "run", "--format", "torch", "--output", "my models", "--checkpoint", "last", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer == {"model": "my models/model.pt2", "card": "my models/README.md", "difference": 0.0} | {
        "checked": "the outputs of 1, 2 and 7 samples equal those of the model, in torch"
    }
    assert forked("export", "run").returncode == 2
    assert saved.exists()


# ------------------------------------------------------------------------------------- trust and secrets


def rewritten(file: Path, model: Any) -> Path:
    """Write a copy of a safetensors file with another config of the model; return its path."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
        metadata = {**opened.metadata(), "model": json.dumps(model)}
    save_file(tensors, other := file.with_name("other.safetensors"), metadata)
    return other


MARKER = "open('executed', 'w')"
HOSTILE: dict[str, Any] = {
    "a function": {"_target_": "builtins.exec", "_args_": [MARKER]},
    "a function behind an allowed module": {"_target_": "torch.nn.modules.module.functools.partial", "func": "print"},
    "a function of os": {"_target_": "torchvision.models.resnet.os.system", "command": "touch executed"},
    "a nested function": {
        "_target_": "torch.nn.Sequential",
        "_args_": [{"_target_": "os.system", "command": "touch executed"}],
    },
    "a class that is no module": {"_target_": "torch.nn.Parameter"},
    "a function of trainkit": {"_target_": "trainkit.config.targets.locate", "dotted": "os.system"},
    "an interpolation": {"_target_": "torch.nn.Linear", "in_features": "${oc.env:HOME}", "out_features": 3},
    "a hub": {"_target_": "timm.create_model", "model_name": "hf-hub:somebody/model"},
    "a checkpoint": {"_target_": "timm.create_model", "model_name": "resnet18", "checkpoint_path": "x"},
    "another module": {"_target_": "mymodels.Net"},
    "remote code": {"_target_": "trainkit.model_libraries.huggingface", "name": "x", "trust_remote_code": True},
    "no string": {"_target_": ["os.system"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_chooses_no_code_unless_it_is_trusted(name: str, saved: Path, here: Path) -> None:
    (here / "mymodels.py").write_text(MARKER)
    file = rewritten(trainkit.export(saved, "safetensors").file, HOSTILE[name])
    with pytest.raises(ConfigError, match="trust=True"):
        trainkit.load(file)
    assert not Path("executed").exists()


def test_models_of_the_libraries_need_no_trust() -> None:
    for target in (
        "torch.nn.Linear",
        "torchvision.models.resnet18",
        "torchvision.models.ResNet",
        "trainkit.models.GPT",
    ):
        assert list(find_untrusted({"_target_": target})) == []
    for target in ("timm.models.vision_transformer.VisionTransformer", "timm.models.resnet18", "timm.create_model"):
        assert list(find_untrusted({"_target_": target, "model_name": "resnet18"})) == []


def test_a_secret_is_in_no_exported_file_and_is_given_again(
    user: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        f"{LINEAR.replace('(self)', '(self, api_key, url)')}    def forward(self, x):\n        return self.layer(x)\n"
    )
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    secrets = ["+model.api_key=sesame-sesame", "+model.url=x-${oc.env:MY_TOKEN}"]
    run = user(code, *secrets)
    exported = trainkit.export(run, "safetensors", overrides=["model.api_key=sesame-sesame"])
    for path in (exported.file, exported.card):
        assert b"sesame" not in path.read_bytes()
        assert b"hunter2" not in path.read_bytes()
    with pytest.raises(ConfigError, match=r"model\.api_key: the value is a secret"):
        trainkit.load(exported.file, trust=True)
    given = ["model.api_key=x", "model.url=y"]
    assert trainkit.load(exported.file, overrides=given, trust=True).layer.weight.shape == (3, 4)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 40, b"\x02" + bytes(7) + b"{}", b"\x10" + bytes(7) + b'{"a": [[[[[[[[[[']
)
def test_a_damaged_file_is_an_error_without_a_traceback(content: bytes, here: Path) -> None:
    file = here / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError)):
        trainkit.load(file)
    with pytest.raises(ConfigError, match="there is no such file"):
        trainkit.load("nothing.safetensors")
    with pytest.raises(ConfigError, match="onnxruntime"):
        file.rename("model.onnx")
        trainkit.load("model.onnx")
    Path("model.pt2").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainkit.load("model.pt2", trust=True)
