"""A run that an older version saved can be resumed: its old keys, values and module paths are upgraded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import trainkit
from tests.saved_runs import save_run
from trainkit.config.renamed import upgrade_fingerprint
from trainkit.core.errors import ConfigError
from trainkit.engine.changes import find_changes
from trainkit.engine.session_facts import session_fingerprint
from trainkit.runs.directory import Run
from trainkit.runs.reload import reload_config

OVERRIDES = [
    "data=synthetic",
    "data.train.size=64",
    "data.split=0.25",
    "data.augment.crop_padding=2",
    "model=mlp",
    "epochs=1",
    "progress=off",
]


# The keys of version 0.1.0.
ROOT_KEYS = (
    *("lr", "epochs", "batch_size", "micro_batch", "seed", "device", "precision", "memory_format", "compile"),
    *("deterministic", "clip_norm", "clip_value", "ema", "on_oom", "on_nonfinite", "limit_batches", "watch", "hooks"),
    *("progress", "monitor", "early_stop", "checkpoint", "scheduler", "param_groups", "data", "model", "loss", "optim"),
)
DATA_KEYS = (
    *("train", "val", "split", "classes", "normalize", "augment", "cache", "cache_limit", "num_workers"),
    "on_unreadable",
)


def age(run: Path) -> None:
    """Rewrite the saved config of a run as version 0.1.0 wrote it."""
    file = run / ".hydra" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config = {key: value for key, value in config.items() if key in ROOT_KEYS}
    config["data"] = {key: value for key, value in config["data"].items() if key in DATA_KEYS}
    data = config["data"]
    data["on_error"] = data.pop("on_unreadable")
    data["augment"]["crop"] = data["augment"].pop("crop_padding")
    data["cache_limit"] = False
    config["hooks"] = {"kill": {"_target_": "trainkit.verification.Kill", "step": 1000}}
    file.write_text(yaml.safe_dump(config))
    info = json.loads((run / "run.json").read_text())
    del info["config_sha256"]
    (run / "run.json").write_text(json.dumps(info))


def test_a_run_with_old_keys_values_and_module_paths_resumes(here: Path) -> None:
    run = trainkit.train(trainkit.compose(OVERRIDES), directory=here / "run")
    age(run.directory)
    reloaded = reload_config(Run.load(run.directory), ["epochs=2"]).settings
    assert (reloaded.data.on_unreadable, reloaded.data.cache_limit) == ("stop", "auto")
    assert reloaded.data.augment is not None
    assert reloaded.data.augment.crop_padding == 2
    resumed = trainkit.resume(run, ["epochs=2"])
    assert [row["epoch"] for row in resumed.history] == [1, 2]


def test_the_old_name_of_a_key_in_a_fingerprint_is_not_a_change(here: Path) -> None:  # noqa: ARG001
    from tests.helpers import compose_settings
    from trainkit.build.session import build_session

    session = build_session(compose_settings(OVERRIDES))
    current = session_fingerprint(session)
    key = "data.augment.crop_padding"
    old = {"data.augment.crop" if name == key else name: value for name, value in current["config"].items()}
    assert key not in old
    assert upgrade_fingerprint(old) == current["config"]
    assert find_changes({**current, "config": old}, current, session.settings, []).keys == set()


def test_a_wrong_config_of_a_run_of_another_folder_names_that_folder(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(here / "run")
    monkeypatch.chdir(tmp_path_factory.mktemp("other"))
    with pytest.raises(ConfigError) as error:
        reload_config(run, ["lrr=1"])
    problem = error.value.problems[-1]
    assert problem.cause == f"this run started in {here}"
    assert f"sys.path.append({str(here)!r})" in problem.hint
