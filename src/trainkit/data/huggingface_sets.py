"""Data sets of Hugging Face's `datasets`, with an optional tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit.core.errors import ConfigError, DataError
from trainkit.core.extras import import_extra
from trainkit.core.spelling import did_you_mean

READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


class HuggingFaceDataset:
    """A `datasets.Dataset` whose samples are mappings.

    Attributes:
        table: the `datasets.Dataset`.
        classes: the names of the classes, or their number; None: the targets are not classes.
        targets: the classes of all samples, or None.
        reader: how texts become tokens, for `preprocessing.json`; None: no tokenizer.
    """

    def __init__(self, table: Any, target: str | None, reader: dict[str, Any] | None = None) -> None:
        self.table, self.reader = table, reader
        self.classes: Any = None
        self.targets: Any = None
        feature: Any = None if target is None else table.features[target]
        if hasattr(feature, "names"):
            self.classes = feature.names
        if target is not None and str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
            self.targets = table[target][:]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = self.table[index]
        return sample

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return several samples, which is faster than one by one."""
        batch = self.table[indices]
        return [{key: values[row] for key, values in batch.items()} for row in range(len(indices))]


def huggingface(
    path: str,
    name: str | None = None,
    split: str = "train",
    *,
    tokenizer: str | None = None,
    text: str | Sequence[str] = "text",
    target: str | None = "label",
    max_length: int | None = None,
    columns: Sequence[str] | None = None,
) -> HuggingFaceDataset:
    """Return a data set of Hugging Face's `datasets`; its samples are mappings.

    Args:
        path: a folder of `save_to_disk`, a file (.csv, .json, .jsonl, .parquet, .arrow), or a name on the hub.
        name: the configuration of a data set on the hub.
        split: the part, such as train, test or train[:10%].
        tokenizer: a folder or a name on the hub. The text columns become input_ids, attention_mask and so on.
        text: the column that the tokenizer reads, or two columns for pairs of texts.
        target: the column of the targets. With a tokenizer it is renamed to labels, as the models expect.
        max_length: the maximum number of tokens; longer texts are cut.
        columns: keep these columns only.

    Raises:
        ConfigError: `datasets` or `transformers` is not installed, or a column does not exist.
        DataError: the data set cannot be read.
    """
    datasets = import_extra("datasets", "huggingface", "data")
    datasets.disable_progress_bars()
    table = _load(datasets, path, name, split)
    reader = None
    if tokenizer is not None:
        texts = [text] if isinstance(text, str) else [*text]
        reader = {"kind": "tokens", "tokenizer": tokenizer, "text": texts, "max_length": max_length}
        _require_columns("data.text", texts, table)
        table = _tokenize(table, tokenizer, texts, max_length)
    if target is not None and target in table.column_names and tokenizer is not None and target != "labels":
        table, target = table.rename_column(target, "labels"), "labels"
    if columns is not None:
        _require_columns("data.columns", columns, table)
        table = table.select_columns([*columns])
    return HuggingFaceDataset(table, target if target in table.column_names else None, reader)


def _load(datasets: Any, path: str, name: str | None, split: str) -> Any:
    place = Path(path).expanduser()
    try:
        if place.is_dir() and ((place / "state.json").exists() or (place / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(str(place))
            if not isinstance(loaded, Mapping):
                return loaded
            if split not in loaded:
                hint = did_you_mean(split, loaded, "data.train.split=")
                raise DataError(f"data: {path} has no part {split!r}", hint=hint)
            return loaded[split]
        if place.suffix in READERS and place.is_file():
            return datasets.load_dataset(READERS[place.suffix], data_files=str(place), split="train")
        return datasets.load_dataset(path, name, split=split)
    except DataError:
        raise
    except Exception as error:  # the library raises many types for a missing or unreachable data set
        reason = " ".join(str(error).split())
        hint = "write a folder of save_to_disk, a file, or a name on the hub: data.path=PATH"
        raise DataError(f"data: {path} cannot be loaded: {type(error).__name__}: {reason}", hint=hint) from error


def _tokenize(table: Any, tokenizer: str, texts: list[str], max_length: int | None) -> Any:
    transformers = import_extra("transformers", "huggingface", "data.tokenizer")
    try:
        function = transformers.AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # the library raises many types for a missing or unreachable tokenizer
        reason = " ".join(str(error).split())
        hint = "write a folder of save_pretrained, or a name on the hub"
        raise DataError(f"data.tokenizer={tokenizer}: {reason}", hint=hint) from error
    tokens = functools.partial(_tokens, function=function, texts=texts, max_length=max_length)
    return table.map(tokens, batched=True, remove_columns=texts)


def _tokens(batch: Mapping[str, Any], *, function: Any, texts: list[str], max_length: int | None) -> dict[str, Any]:
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    return {**function(*(batch[column] for column in texts), **cut)}


def _require_columns(key: str, names: Sequence[str], table: Any) -> None:
    for name in names:
        if name not in table.column_names:
            hint = did_you_mean(name, table.column_names, f"{key}=")
            raise ConfigError(f"{key}={name}: the data set has no such column", hint=hint)
