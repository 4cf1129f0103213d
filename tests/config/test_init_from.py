"""The key `init_from`: its short form, alone and with further keys, in files and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import compose_settings
from trainkit.config.compose import compose_sweep
from trainkit.config.schema import InitFromSettings
from trainkit.core.errors import ConfigError
from trainkit.runs.fingerprint import differences, fingerprint


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [
        (["init_from=a/b.pt"], []),
        (["init_from.path=a/b.pt"], []),
        (["init_from=a/b.pt", r"init_from.missing=[fc\..*]"], [r"fc\..*"]),
        ([r"init_from.missing=[fc\..*,x]", "init_from=a/b.pt"], [r"fc\..*", "x"]),
        (["init_from={path: a/b.pt, checkpoint: best, missing: [x], unexpected: []}"], ["x"]),
    ],
)
def test_a_path_is_enough_and_further_keys_may_follow(overrides: list[str], missing: list[str]) -> None:
    expected = InitFromSettings("a/b.pt", "best", missing, [])
    settings = compose_settings(overrides)
    assert settings.init_from == expected
    assert settings.source.init_from.path == "a/b.pt"


@pytest.mark.parametrize("overrides", [[], ["init_from=off"], ["init_from=null"], ["init_from.path=off"]])
def test_off_is_none(overrides: list[str]) -> None:
    settings = compose_settings(overrides)
    assert settings.init_from is None
    assert settings.source.init_from is None


def test_a_file_may_use_the_short_form(here: Path) -> None:
    (here / "conf" / "experiment").mkdir(parents=True)
    (here / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\ninit_from: last\n")
    assert compose_settings(["experiment=mine"]).init_from == InitFromSettings("last", "best", [], [])
    assert compose_settings(["experiment=mine", "init_from=off"]).init_from is None


def test_a_sweep_may_compare_starts() -> None:
    jobs = compose_sweep(["init_from=a,b", "init_from.missing=[x]"]).jobs
    assert [job.settings.init_from for job in jobs] == [InitFromSettings(path, "best", ["x"], []) for path in "ab"]


def test_runs_of_older_versions_without_the_key_are_equal() -> None:
    current = fingerprint(compose_settings([]))
    older = {key: value for key, value in current.items() if not key.startswith("init_from")}
    assert differences(older, current) == {}


def test_another_start_is_another_fingerprint() -> None:
    one, other = (fingerprint(compose_settings([f"init_from={path}"])) for path in "ab")
    assert list(differences(one, other)) == ["init_from.path"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("init_from=5", "init_from=5: must be a mapping, or off"),
        ("init_from.checkpoints=last", "did you mean init_from.checkpoint"),
        ("checkpoint.weights=some", "checkpoint.weights=some: must be all or trainable"),
    ],
)
def test_a_wrong_value_is_an_error(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_settings([override])
    assert words in str(caught.value)
