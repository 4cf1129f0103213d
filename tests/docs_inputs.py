"""What the commands of the pages find in their folder: small data sets, modules and weights, and runs made before.

`INPUTS` maps a pattern of what commands mention to a function that makes it in a folder. A page gets the inputs that
its commands mention. A file that the page shows itself replaces an input, or follows it if the input is in `CONTINUED`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

# What the reader of a page has run before: the page, how a command begins, and the commands that run before it.
BEFORE = {
    ("docs/config.md", "trainkit init_from=outputs/2"): ["trainkit"],
    ("docs/report.md", "trainkit report outputs/2"): ["trainkit", "trainkit -m optim=sgd,adam"],
    ("docs/resume.md", "trainkit resume last  "): ["trainkit"],
}

# A page shows a part of these modules.
CONTINUED = {"taskmodels.py"}

TASK_DATA = """
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
TASK_MODELS = """
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
MODELS = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=8, num_classes=10):
        super().__init__(nn.Flatten(), nn.LazyLinear(width), nn.ReLU(), nn.Linear(width, num_classes))
"""


def make_photos(folder: Path) -> None:
    """Make a folder of images for each of two classes."""
    from PIL import Image

    for number in range(20):
        file = folder / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (number * 12, 100, 50 * (number % 2))).save(file)


def make_houses(folder: Path) -> None:
    """Make a table with numbers and words."""
    rows = [f"{index},{index % 7},{'ab'[index % 2]},{'xy'[index % 3 // 2]},{index * 10}" for index in range(60)]
    (folder / "houses.csv").write_text("\n".join(["id,size,place,kind,price", *rows]))


def make_book(folder: Path) -> None:
    """Make a text of some words."""
    (folder / "book.txt").write_text("a book of words, and more words\n" * 150)


def make_rows(folder: Path) -> None:
    """Make samples in JSON lines."""
    (folder / "rows.jsonl").write_text("\n".join(f'{{"x": [{n}, 1.0], "label": {n % 2}}}' for n in range(40)))


def make_reviews(folder: Path) -> None:
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


def make_weights(folder: Path) -> None:
    """Save the weights of a toy CNN for 10 classes."""
    from safetensors.torch import save_file

    from trainkit.models import ToyCNN

    save_file(ToyCNN().state_dict(), folder / "weights.safetensors")


def write(path: str, text: str) -> Callable[[Path], None]:
    """Return a function that writes a file into a folder."""

    def make(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(textwrap.dedent(text).lstrip())

    return make


INPUTS: dict[str, Callable[[Path], None]] = {
    r"book\.txt": make_book,
    r"houses\.csv": make_houses,
    "model=mine": write("conf/model/mine.yaml", "_target_: mymodels.Net\nnum_classes: ${data.classes}\n"),
    "mymodels.Net|model=mine": write("mymodels.py", MODELS),
    "photos": make_photos,
    "reviews": make_reviews,
    r"rows\.jsonl": make_rows,
    "taskdata": write("taskdata.py", TASK_DATA),
    "taskmodels": write("taskmodels.py", TASK_MODELS),
    r"weights\.safetensors": make_weights,
}


def make_inputs(commands: str, folder: Path) -> None:
    """Make what some commands mention."""
    for pattern, make in INPUTS.items():
        if re.search(rf"(?<![\w/])({pattern})\b", commands):
            make(folder)
