"""The config of an evaluation: the saved config of a run with other data or metrics, and the same model. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainkit.config.hints import is_off
from trainkit.config.replaced_targets import mark_new_arguments
from trainkit.config.search_path import make_loader
from trainkit.config.settings import Settings
from trainkit.core.errors import ConfigError, Problem
from trainkit.runs.directory import Run
from trainkit.runs.reload import ALLOW, choose_group, reload_config

MACHINE = (
    "device",
    "precision",
    "memory_format",
    "compile",
    "deterministic",
    "micro_batch",
    "val_batch_size",
    "on_oom",
)
CHOOSABLE = ("data", "metrics", "evaluation_step", "limit_val_batches", "progress", *MACHINE)  # keys of an override
READING = ("data.num_workers", "data.cache", "data.cache_limit")  # keys of `data` that change no number
INSTEAD = {
    "batch_size": "write val_batch_size=N",
    "limit_batches": "write limit_val_batches=N",
    "loss": "add a metric instead: metrics.NAME._target_=...",
}
# Parts of a training that an evaluation does not build.
NEUTRAL: Mapping[str, Any] = {
    "lr": 0.1,
    "optim": {"_target_": "torch.optim.SGD", "lr": "${lr}"},
    "scheduler": None,
    "param_groups": {},
    "training_step": "supervised",
    "hooks": {},
    "logger": {},
    "watch": [],
    "monitor": {"metric": "val/loss", "mode": "min"},
}
MODEL_KEYS = ("normalize", "standardize", "classes")  # keys of `data` that belong to the model, not to the data set
STEP_RESOLVERS = ("total_steps", "steps_per_epoch")
SECRETS = ("model", "data", "loss", "metrics", "evaluation_step")  # sections whose secrets an evaluation needs
HINT = "name the data: data.val._target_=PATH, data=NAME, or the training data: 'data.val=${data.train}'"


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation evaluates.

    Attributes:
        settings: of the run, with the overrides; without the parts that only a training needs.
        overrides: the overrides.
        saved_step: the key of the evaluation step's state in a checkpoint; None: the step is another one.
        has_own_data: whether the data is the validation data of the run.
        repeats: whether the evaluation repeats one of the training, so that both give the same numbers.
        needs_steps: whether a value depends on the number of steps, which only the training data shows.
    """

    settings: Settings
    overrides: Sequence[str]
    saved_step: str | None
    has_own_data: bool
    repeats: bool
    needs_steps: bool


def read_evaluation_config(run: Run, overrides: Sequence[str]) -> EvaluationConfig:
    """Return the config of an evaluation of a run.

    Args:
        run: a saved run.
        overrides: `KEY=VALUE` as on the command line, for the data, the metrics and the machine.

    Raises:
        ConfigError: everything that is wrong with the overrides or the config, or there is no validation data.
        CheckpointError: the saved config is damaged or was edited.
    """
    check_overrides(overrides)
    choices = [text for text in overrides if _key(text) == "data"]
    rest = mark_new_arguments([_with_plus(text) for text in overrides if text not in choices])
    steps: dict[str, Any] = {}

    def adapt(config: DictConfig) -> None:
        steps.update(_neutralize(config))
        for text in choices:
            _choose_data(config, text)
        _clear_replaced_nodes(config, rest)

    settings = reload_config(run, rest, SECRETS, adapt).settings
    if overrides:
        saved = reload_config(run, [text for text in rest if text.startswith(ALLOW)], SECRETS, _neutralize)
        _check_same_model(saved.settings, settings)
    _check_validation(settings)
    keys = [_key(text) for text in overrides]
    changes_step = any(key.partition(".")[0] == "evaluation_step" for key in keys)
    shared = not is_off(steps["evaluation_step"]) and steps["evaluation_step"] == steps["training_step"]
    saved_step = None if changes_step else "training_step" if shared else "evaluation_step"
    has_own_data = not any(key.partition(".")[0] == "data" and key not in READING for key in keys)
    repeats = has_own_data and not changes_step and "limit_val_batches" not in keys
    needs_steps = any(f"${{{name}:" in OmegaConf.to_yaml(settings.source) for name in STEP_RESOLVERS)
    return EvaluationConfig(settings, list(overrides), saved_step, has_own_data, repeats, needs_steps)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` if an evaluation, of whatever run, does not take the overrides."""
    problems = [problem for text in overrides for problem in _refused(text)]
    if problems:
        raise ConfigError(*problems)


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0].partition("@")[0]


def _refused(text: str) -> list[Problem]:
    """Return the problem of an override that an evaluation does not take."""
    key = _key(text)
    section = key.partition(".")[0]
    if "=" not in text and not text.startswith("~"):
        return [
            Problem(f"{text}: neither the directory of a run nor KEY=VALUE", "trainkit eval RUN... [KEY=VALUE ...]")
        ]
    if section == "model":
        hint = f"remove it; to train another model: trainkit {text}"
        return [Problem(f"{text}: an evaluation keeps the model of the run", hint)]
    if key == "data.classes":
        return [Problem(f"{text}: the model of the run decides the number of classes", "remove it")]
    if text.startswith(ALLOW) or section in CHOOSABLE:
        return []
    cause = f"{text}: it does not change an evaluation, which takes data, metrics and the machine"
    if section == "loss":
        cause = f"{text}: an evaluation keeps the loss of the run"
    return [Problem(cause, INSTEAD.get(section, f"remove it; the keys are {', '.join(CHOOSABLE)}"))]


def _with_plus(text: str) -> str:
    """Return an override that may add a metric, which the saved config does not have."""
    return f"++{text}" if text.startswith("metrics.") else text


def _neutralize(config: DictConfig) -> dict[str, Any]:
    """Replace the parts of a config that only a training needs, in place; return the custom steps."""
    OmegaConf.set_struct(config, False)
    keys = ("training_step", "evaluation_step")
    steps = {key: config[key] for key in keys}
    steps = {key: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for key, v in steps.items()}
    config.evaluation_step = steps["evaluation_step"]  # it may refer to the training step
    for key, value in NEUTRAL.items():
        config[key] = value
    return steps


def _choose_data(config: DictConfig, text: str) -> None:
    """Replace the data by the choice of an override, in place. What belongs to the model stays.

    Raises:
        ConfigError: there is no such choice.
    """
    kept = {key: config.data._get_node(key) for key in MODEL_KEYS}
    problems = choose_group(config, "data", text, make_loader())
    if problems:
        raise ConfigError(*problems)
    OmegaConf.set_struct(config, False)
    for key, node in kept.items():
        config.data[key] = node


def _clear_replaced_nodes(config: DictConfig, overrides: Sequence[str]) -> None:
    """Remove the arguments of each `_target_` that an override replaces, in place."""
    for text in overrides:
        path = _key(text).removesuffix("._target_")
        if path == _key(text):
            continue
        *above, name = path.split(".")
        parent = OmegaConf.select(config, ".".join(above)) if above else config
        if isinstance(parent, DictConfig) and name in parent:
            parent[name] = {}


def _check_same_model(saved: Settings, settings: Settings) -> None:
    """Raise `ConfigError` if the overrides change the model or the loss, which may refer to other keys."""
    for key in ("model", "loss"):
        if getattr(saved, key) != getattr(settings, key):
            cause = f"the overrides change the {key} of the run, which refers to their keys"
            raise ConfigError(f"{key}: {cause}", hint="remove the override of a key that the saved config refers to")


def _check_validation(settings: Settings) -> None:
    """Raise `ConfigError` if there is nothing to evaluate."""
    data = settings.data
    if settings.evaluation_step is None:
        raise ConfigError("evaluation_step=off: the run has no validation", hint="add evaluation_step=supervised")
    if data.val is None and data.split is None and data.folds is None:
        raise ConfigError("there is no validation data: data.val, data.split and data.folds are off", hint=HINT)
