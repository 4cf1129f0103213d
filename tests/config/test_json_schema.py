"""The JSON schema accepts the shipped configs and rejects typos and wrong types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from trainkit.config.json_schema import json_schema
from trainkit.config.search_path import CONF

CONFIGS = [CONF / "config.yaml", *sorted((CONF / "experiment").glob("*.yaml"))]


def errors(config: Any) -> list[str]:
    """Return the errors of a config."""
    return [error.message for error in jsonschema.Draft202012Validator(json_schema()).iter_errors(config)]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_are_valid(file: Path) -> None:
    assert errors(yaml.safe_load(file.read_text()) or {}) == []


@pytest.mark.parametrize("file", sorted((CONF / "data").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_definition_of_data_is_the_schema_of_shipped_data_sets(file: Path) -> None:
    schema = json_schema()
    of_data = jsonschema.Draft202012Validator({"$defs": schema["$defs"], "$ref": "#/$defs/data"})
    config = yaml.safe_load(file.read_text())
    assert of_data.is_valid(config)
    assert of_data.is_valid({**config, "new_key": 3})
    assert not of_data.is_valid({**config, "split": 7})


def test_the_schema_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize(
    "config",
    [
        "epochs: 3",
        "epochs: ${oc.env:EPOCHS}",
        "micro_batch: off",
        "ema: null",
        "compile: true",
        "device: cuda:1",
        "data: {root: somewhere, cache_limit: 4.5}",
        "data: {normalize: {mean: [0.1, 0.2], std: 1}}",
        "checkpoint: off",
        "init_from: runs/base",
        "init_from: {path: last, missing: ['head.*']}",
        "early_stop: {patience: 3}",
        "monitor: {metric: val/miou, mode: max}",
        "defaults: [override /optim: adam]",
        "param_groups: {head: {layer: -1, lr_mult: 10}}",
    ],
)
def test_valid_configs_are_accepted(config: str) -> None:
    assert errors(yaml.safe_load(config)) == []


@pytest.mark.parametrize(
    "config",
    [
        "epoch: 3",
        "epochs: ten",
        "epochs: 0",
        "epochs: never",
        "epochs: 2.5",
        "ema: 1",
        "lr: -0.1",
        "device: gpu",
        "precision: fp8",
        "watch: weight",
        "monitor: {mode: up}",
        "early_stop: {pateince: 3}",
        "data: {splt: 0.2}",
        "data: {on_error: skip}",
        "data: {augment: {crop: 4}}",
        "data: {cache_limit: off}",
        "optim: sgd",
    ],
)
def test_wrong_configs_are_rejected(config: str) -> None:
    assert len(errors(yaml.safe_load(config))) == 1


def test_keys_of_a_users_data_set_are_accepted(here: Path) -> None:
    assert errors({"data": {"window": 3}})
    (here / "conf" / "data").mkdir(parents=True)
    (here / "conf" / "data" / "mine.yaml").write_text("window: 8  # samples per window\n")
    (here / "conf" / "data" / "broken.yaml").write_text("a: [\n")
    assert errors({"data": {"window": 3}}) == []


def test_the_schema_does_not_depend_on_the_hashes_of_the_process() -> None:
    def printed(seed: str) -> str:
        command = [sys.executable, "-m", "trainkit", "--schema"]
        return subprocess.check_output(command, env={**os.environ, "PYTHONHASHSEED": seed}, text=True)

    assert printed("1") == printed("2")


def test_every_key_has_a_description() -> None:
    def undescribed(node: dict[str, Any], path: str) -> list[str]:
        found = []
        for key, value in node.get("properties", {}).items():
            found += undescribed(value.get("anyOf", [{}])[0], f"{path}{key}.")
            found += [] if "description" in value else [f"{path}{key}"]
        return found

    assert undescribed(json_schema(), "") == [
        "data.normalize.mean",
        "data.normalize.std",
    ]  # data.normalize describes both


def test_the_command_prints_the_schema_without_torch() -> None:
    code = "import sys; from trainkit.cli.main import main; main(['--schema']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["additionalProperties"] is False
