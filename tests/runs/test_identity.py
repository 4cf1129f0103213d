"""The identity of a job: equal for the same training, however it is written; different for any other."""

from __future__ import annotations

import pytest

from trainkit.config.compose import compose
from trainkit.runs.identity import config_hash


def hash_of(*overrides: str) -> str:
    """Return the identity of the job that some overrides give."""
    return config_hash(compose(overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["lr=0.01", "seed=1"],
        ["seed=1", "lr=1e-2"],
        ["lr=0.01", "seed=1", "optim=sgd", "model=toy_cnn"],
        ["lr=0.01", "seed=1", "progress=off", "report=off", "logger=csv", "retries=3", "fail_fast=true"],
    ],
)
def test_the_same_training_has_the_same_identity_however_it_is_written(overrides: list[str]) -> None:
    assert hash_of(*overrides) == hash_of("lr=0.01", "seed=1")


@pytest.mark.parametrize(
    "override",
    ["lr=0.02", "seed=2", "epochs=21", "device=cpu", "micro_batch=8", "compile=true", "optim=adam", "watch=[a]"],
)
def test_any_key_that_may_be_swept_changes_the_identity(override: str) -> None:
    assert hash_of("lr=0.01", "seed=1", override) != hash_of("lr=0.01", "seed=1")


def test_the_environment_does_not_enter_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for value in ("one", "two"):
        monkeypatch.setenv("MINE", value)
        hashes.add(hash_of("+hooks.h={_target_: builtins.dict, name: '${oc.env:MINE}', api_key: '${oc.env:MINE}'}"))
    assert len(hashes) == 1


def test_jobs_that_differ_in_a_secret_are_different_jobs() -> None:
    hooks = [f"+hooks.h={{_target_: builtins.dict, api_key: S3CRET{value}}}" for value in ("one", "two", "two")]
    assert len(set(map(hash_of, hooks))) == 2
