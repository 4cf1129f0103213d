"""`data=table`: the columns of CSV and parquet files as inputs and targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from tests.helpers import compose_settings
from trainkit.build.session import build_session
from trainkit.core.errors import ConfigError, DataError
from trainkit.data import table

CSV = """size,colour,price,kind
1.5,red,10,b
2,blue,20.5,a
,green,30,b
-4e1,red,40,a
"""


@pytest.fixture
def houses(here: Path) -> Path:
    (here / "houses.csv").write_text(CSV)
    return here / "houses.csv"


def test_numbers_are_inputs_and_words_are_one_hot_as_in_scikit_learn(houses: Path) -> None:
    rows = table(str(houses), "price", drop=["kind"], fill=0)
    assert rows is not None
    inputs, targets = rows.tensors
    encoded = OneHotEncoder(sparse_output=False).fit_transform([["red"], ["blue"], ["green"], ["red"]])
    assert inputs.tolist() == np.column_stack([[1.5, 2, 0, -40], encoded]).tolist()
    assert rows.columns == ["size", "colour=blue", "colour=green", "colour=red"]
    assert targets.tolist() == [[10], [20.5], [30], [40]]
    assert (inputs.dtype, targets.dtype, rows.classes) == (torch.float32, torch.float32, 1)


def test_a_column_of_words_is_a_classification(houses: Path) -> None:
    rows = table(str(houses), "kind", fill=0)
    assert rows is not None
    assert rows.tensors[1].tolist() == [1, 0, 1, 0]
    assert rows.classes == ["a", "b"]


def test_whole_numbers_are_classes_if_asked(here: Path) -> None:
    (here / "t.csv").write_text("x,y\n1,7\n2,-3\n3,7\n")
    rows = table("t.csv", "y", task="classification")
    assert rows is not None
    assert (rows.tensors[1].tolist(), rows.classes) == ([1, 0, 1], ["-3", "7"])


def test_parquet_and_csv_give_the_same_table(here: Path, houses: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"size": [1.5, 2, None, -40], "colour": ["red", "blue", "green", "red"]}
    columns |= {"price": [10, 20.5, 30, 40], "kind": ["b", "a", "b", "a"]}
    parquet.write_table(pyarrow.table(columns), here / "houses.parquet")
    one, other = (table(str(file), "kind", fill=0) for file in (houses, here / "houses.parquet"))
    assert one is not None
    assert other is not None
    assert torch.equal(one.tensors[0], other.tensors[0])
    assert torch.equal(one.tensors[1], other.tensors[1])


@pytest.mark.parametrize("fill", ["mean", "median"])
def test_missing_numbers_get_the_mean_or_median_of_the_training_file_as_in_scikit_learn(here: Path, fill: str) -> None:
    (here / "train.csv").write_text("x,z,y\n1,7,1\n,0.1,2\n2,,3\n9,0.2,4\n")
    (here / "val.csv").write_text("x,z,y\n5,,1\n,3,2\n")
    lack = np.nan
    imputer = SimpleImputer(strategy=fill).fit([[1, 7], [lack, 0.1], [2, lack], [9, 0.2]])
    rows = table("train.csv", "y", part="val", val_file="val.csv", fill=fill)
    assert rows is not None
    np.testing.assert_array_equal(rows.tensors[0], imputer.transform([[5, lack], [lack, 3]]).astype(np.float32))
    assert rows.reader["fill"] == pytest.approx(dict(zip("xz", imputer.statistics_, strict=True)), rel=1e-15)


@pytest.mark.parametrize("fill", ["average", "3", True, float("nan"), 1e300, [0]])
def test_a_fill_that_is_no_number_and_no_average_is_an_error(houses: Path, fill: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.fill=.*: must be a number, mean or median"):
        table(str(houses), "kind", fill=fill)


def test_the_mean_of_a_column_without_values_is_an_error(here: Path) -> None:
    (here / "t.csv").write_text("x,y\n,1\nna,2\n")
    with pytest.raises(DataError, match=r"data\.fill=mean: the column 'x' of t\.csv has no value"):
        table("t.csv", "y", fill="mean")


def test_a_missing_word_becomes_a_category_with_each_fill(here: Path) -> None:
    (here / "t.csv").write_text("word,y\na,1\n,2\n")
    with pytest.raises(DataError, match="it becomes a category of its own"):
        table("t.csv", "y")
    for fill in (0, "mean"):
        rows = table("t.csv", "y", fill=fill)
        assert rows is not None
        assert (rows.columns, rows.tensors[0].tolist()) == (["word=", "word=a"], [[0, 1], [1, 0]])


def test_a_text_is_the_name_of_one_column(houses: Path) -> None:
    one, other = (table(str(houses), "price", drop=drop, fill=0) for drop in ("kind", ["kind"]))
    assert one is not None
    assert other is not None
    assert one.columns == other.columns
    with pytest.raises(ConfigError, match=r"data\.drop=id: .* has no such column"):
        table(str(houses), "price", drop="id")
    with pytest.raises(ConfigError, match=r"data\.target names no column"):
        table(str(houses), [])


def test_a_validation_file_has_the_categories_of_the_training_file(here: Path, houses: Path) -> None:
    (here / "val.csv").write_text("kind,price,colour,size\na,1,green,5\n")
    rows = table(str(houses), "kind", part="val", val_file="val.csv")
    assert rows is not None
    assert rows.columns == ["size", "colour=blue", "colour=green", "colour=red", "price"]
    assert rows.tensors[0].tolist() == [[5, 0, 1, 0, 1]]
    assert rows.tensors[1].tolist() == [0]
    (here / "val.csv").write_text("kind,price,colour,size\na,1,pink,5\n")
    with pytest.raises(DataError, match="no value 'pink' in the column 'colour'"):
        table(str(houses), "kind", part="val", val_file="val.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"x,y\n", "the table has no rows"),
        (b"x,y\n1,2\n1,2,3\n", "line 3 has 3 values, and the header has 2"),
        (b"x,x,y\n1,2,3\n", "several columns have the name 'x'"),
        (b"x,y\n1,\xff\n", "byte 6 is not UTF-8"),
        (b"x,y\n1,2\nNA,2\n", "the column 'x' has no value in row 2"),
        (b"x,y\n1,2\n3,\n", "the column 'y' has no value in row 2"),
        (b"x,z\n1,2\n", "data.target=y: t.csv has no such column"),
        (b"y\n1\n", "no column is left for the inputs"),
        (b"PAR1 is not parquet", "it is not a parquet file"),
    ],
)
def test_a_damaged_table_is_one_clear_error(content: bytes, words: str, here: Path) -> None:
    (here / "t.csv").write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=words):
        table("t.csv", "y")


def test_a_number_outside_of_float32_is_an_error_that_names_the_row(here: Path) -> None:
    (here / "t.csv").write_text("a,b\n1,2\n1e300,3\n")
    with pytest.raises(DataError, match="row 2 of the column 'a' is 1e\\+300, outside of float32"):
        table("t.csv", "b")


def test_a_table_may_be_separated_by_semicolons(here: Path) -> None:
    (here / "t.csv").write_text("x;y\n1;2\n3;4\n")
    rows = table("t.csv", "y")
    assert rows is not None
    assert rows.tensors[1].tolist() == [[2], [4]]


def test_words_in_a_regression_are_an_error_that_names_the_row(houses: Path) -> None:
    with pytest.raises(DataError, match="row 1 of the column 'kind' is 'b', not a number"):
        table(str(houses), "kind", fill=0, task="regression")


def test_a_misspelt_column_is_corrected(houses: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean price"):
        table(str(houses), "prise")


def test_the_shipped_table_is_the_diabetes_set_of_scikit_learn() -> None:
    rows = table("package:diabetes.csv", "progression")
    assert rows is not None
    data = load_diabetes(scaled=False)
    np.testing.assert_array_equal(rows.tensors[0].numpy(), data.data.astype(np.float32))
    np.testing.assert_array_equal(rows.tensors[1][:, 0].numpy(), data.target.astype(np.float32))


def test_inputs_are_standardized_by_the_training_samples_alone() -> None:
    overrides = ["data=table", "data.file=package:diabetes.csv", "data.target=progression", "model=mlp", "loss=mse"]
    session = build_session(compose_settings([*overrides, "data.folds=5", "data.fold=2", "batch_size=1000"]))
    assert session.val is not None
    data = load_diabetes(scaled=False).data
    scaler = StandardScaler().fit(data[list(session.train.dataset.indices)])
    wanted = scaler.transform(data[list(session.val.dataset.indices)])
    np.testing.assert_allclose(next(session.val.batches(0))[0].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_images_cannot_be_standardized() -> None:
    with pytest.raises(ConfigError, match=r"data\.standardize: it needs inputs"):
        build_session(compose_settings(["data=synthetic", "model=mlp", "data.standardize=on"]))
