"""How important each sampled key is, by Optuna if it is installed. Imports Optuna only to compute."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from trainkit.sweeps.search.results import Search, SearchAxis, Trial

MIN_TRIALS = 8
SHARE = 0.1  # of the trials that count as good
INSTALL = "pip install 'trainkit[search]'"


def importance(search: Search) -> tuple[dict[str, float], str]:
    """Return the share of each key in what makes a trial good, and how it was computed or why it is missing.

    Paused and pruned trials count with their best value, as in the table.
    """
    trials = search.ranked
    axes = [axis for axis in search.plan.axes if all(value_of(axis, trial) is not None for trial in trials)]
    left = [axis.key for axis in search.plan.axes if axis not in axes]
    if len(trials) < MIN_TRIALS:
        return {}, f"The importance of the keys needs {MIN_TRIALS} trials with a value; there are {len(trials)}."
    if len(axes) < 2:
        return {}, "The importance of the keys needs two keys that each trial has."
    try:
        found = _evaluate(search, trials, axes)
    except ImportError:
        return {}, f"The importance of the keys needs Optuna: {INSTALL}"
    except Exception as error:  # an error of Optuna must not cost the rest of the report
        return {}, f"The importance of the keys cannot be computed: {type(error).__name__}: {error}"
    note = f"Importance: how much a key decides whether a trial is among the best {SHARE:.0%} (PED-ANOVA of Optuna)."
    return found, note + (f" Left out, because some trials lack them: {', '.join(left)}." if left else "")


def value_of(axis: SearchAxis, trial: Trial) -> Any:
    """Return the value of a key in a trial, as the search sampled it; None: the trial does not have it."""
    run = trial.runs[0]
    if axis.kind == "choice":
        given = [text.partition("=")[2] for text in run.overrides if text.partition("=")[0].lstrip("+") == axis.key]
        found = given[-1] if given else run.choices.get(axis.key, run.config.get(axis.key))
        return next((choice for choice in axis.choices if choice == found or str(choice) == str(found)), None)
    value = run.config.get(axis.key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    low, high = axis.low or 0.0, axis.high or 0.0
    if not low <= value <= high:  # the interval of an earlier command
        return None
    return int(value) if axis.kind == "int" else float(value)


def _evaluate(search: Search, trials: Sequence[Trial], axes: Sequence[SearchAxis]) -> dict[str, float]:
    """Return the importance by Optuna.

    Raises:
        ImportError: Optuna is not installed.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    distributions = {axis.key: _distribution(axis) for axis in axes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is experimental
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study(direction="maximize" if search.mode == "max" else "minimize")
            study.add_trials(
                [
                    optuna.trial.create_trial(
                        params={axis.key: value_of(axis, trial) for axis in axes},
                        distributions=distributions,
                        value=search.value(trial),
                    )
                    for trial in trials
                ]
            )
            evaluator = PedAnovaImportanceEvaluator(target_quantile=SHARE)
            return dict(get_param_importances(study, evaluator=evaluator))
        finally:
            optuna.logging.set_verbosity(level)


def _distribution(axis: SearchAxis) -> Any:
    """Return the distribution of Optuna for an axis."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.kind == "choice":
        return CategoricalDistribution(list(axis.choices))
    low, high = axis.low or 0.0, axis.high or 0.0
    if axis.kind == "int":
        return IntDistribution(int(low), int(high), log=axis.log, step=1 if axis.log else int(axis.step or 1))
    return FloatDistribution(low, high, log=axis.log, step=None if axis.log else axis.step)
