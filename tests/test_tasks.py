"""The commands in docs/tasks.md about samples and models train."""

from __future__ import annotations

import importlib.util
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command

PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
SECTIONS: tuple[str, ...] = ("Mappings", "Autoencoder", "Several inputs", "Padded sequences", "Hugging Face", "timm")
SECTIONS += ("Tables", "Cross-validation", "Imbalanced classes", "Texts", "State from batch to batch", "A small GPT")
SECTIONS += ("Segmentation", "A graph", "Fine-tune", "LoRA", "Distillation", "Detection", "Data without an end")
SECTIONS += ("GAN", "Contrastive")
DATA = """
import torch
from torchvision.transforms.v2.functional import to_pil_image

class Photos:
    classes, targets = 2, [0, 1] * 9
    def __len__(self): return 18
    def image(self, index): return torch.full((3, 32, 32), index * 9, dtype=torch.uint8)
    def __getitem__(self, index):
        return {"image": to_pil_image(self.image(index)), "label": index % 2, "file": f"{index}.png"}

class Bare(Photos):
    def __getitem__(self, index): return self.image(index)

class Triples(Photos):
    def __getitem__(self, index): return self.image(index), self.image(index // 2), float(index % 2)

def nodes():
    return torch.utils.data.TensorDataset(torch.arange(18), torch.arange(18) % 2)

class Words(Photos):
    def __getitem__(self, index): return {"tokens": [1 + index % 5] * (1 + index % 3), "label": index % 2}
"""
MODELS = """
import torch
from torch import nn

class Autoencoder(nn.Conv2d):
    def __init__(self): super().__init__(3, 3, 1)

class Compare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
    def forward(self, one, other): return self.scale * (one - other).double().abs().mean((1, 2, 3))

class Dict(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(10)
    def forward(self, images): return {"out": self.head(images.flatten(1)), "aux": None}

class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 2, padding_idx=0)
    def forward(self, tokens): return self.bag(tokens)
"""


def commands() -> list[Any]:
    """Return the commands of the sections; those that need an extra are slow."""
    found: list[Any] = []
    for section in SECTIONS:
        text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        for line in re.findall(r"^    (trainkit .*)$", text, re.M):
            package = (
                "datasets" if "datasets." in line else {"Hugging Face": "transformers", "timm": "timm"}.get(section)
            )
            missing = package is not None and importlib.util.find_spec(package) is None
            marks = [pytest.mark.slow, pytest.mark.skipif(missing, reason=f"needs {package}")] if package else []
            found.append(pytest.param(line, marks=marks, id=f"{section} {len(found)}"))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the page describes."""
    (tmp_path / "taskdata.py").write_text(DATA)
    rows = [f"{index},{index % 7},{'ab'[index % 2]},{'xy'[index % 3 // 2]},{index * 10}" for index in range(60)]
    (tmp_path / "houses.csv").write_text("\n".join(["id,size,place,kind,price", *rows]))
    (tmp_path / "book.txt").write_text("a book of words, and more words\n" * 150)
    graph = textwrap.dedent(PAGE.partition("    # taskmodels.py\n")[2].split("\n\n")[0])
    (tmp_path / "taskmodels.py").write_text(f"{MODELS}\n{graph}")
    stream = textwrap.dedent(PAGE.partition("    # mystreams.py\n")[2].partition("\n    trainkit ")[0])
    (tmp_path / "mystreams.py").write_text(f"import random\nimport torch\n\n{stream}")
    (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"x": [{n}, 1.0], "label": {n % 2}}}' for n in range(40)))
    (tmp_path / "conf" / "model").mkdir(parents=True)
    lines = PAGE.partition("# conf/model/picked.yaml\n")[2].split("\n\n")[0]
    (tmp_path / "conf" / "model" / "picked.yaml").write_text(textwrap.dedent(lines))
    return tmp_path


def save_reviews(folder: Path) -> None:
    """Save texts with two classes, and a tokenizer of words."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = [{"text": " ".join(["film"] * (1 + n % 4) + [("bad", "good")[n % 2]]), "label": n % 2} for n in range(40)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder / "reviews"))
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "film": 2, "bad": 3, "good": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(str(folder / "words"))


def test_every_section_has_a_command() -> None:
    assert len(commands()) >= len(SECTIONS)


@pytest.mark.parametrize("line", commands())
def test_every_command_about_samples_and_models_trains(line: str, folder: Path, forked: Command) -> None:
    if "data.path=reviews" in line:
        save_reviews(folder)
    if "init_from=runs/base" in line or re.search("finetune_resnet18|experiment=lora", line):
        first = PAGE.partition("\n## Fine-tune\n")[2].partition("\n    trainkit ")[2].partition("\n")[0]
        done = forked(*shlex.split(first), "epochs=1", "limit_batches=1", "batch_size=4", "device=cpu", "report=off")
        assert done.returncode == 0, done.stderr
    if "experiment=distillation" in line:
        first = PAGE.partition("\n## Distillation\n")[2].partition("\n    trainkit ")[2].partition("\n")[0]
        done = forked(*shlex.split(first), "epochs=1", "limit_batches=1", "device=cpu", "report=off")
        assert done.returncode == 0, done.stderr
    length = "steps=2" if "char_gpt" in line else "epochs=1"
    done = forked(*shlex.split(line)[1:], length, "limit_batches=2", "batch_size=8", "device=cpu", "report=off")
    assert done.returncode == 0, done.stderr
    assert "best of 1 epoch" in done.stdout
