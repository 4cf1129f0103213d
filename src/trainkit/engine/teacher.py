"""The teacher of a distillation that the command line names `last`."""

from __future__ import annotations

from collections.abc import Mapping

from trainkit.config.settings import Settings
from trainkit.core.errors import named_errors
from trainkit.runs.find import find_last_run

DISTILLATION = "trainkit.distillation.Distillation"


def name_teacher(settings: Settings) -> Settings:
    """Return the settings with the directory of the newest run instead of `training_step.teacher=last`.

    So the saved config names the teacher. For a resume, the newest run would be the resumed run itself.

    Raises:
        ConfigError: there is no run.
    """
    step = settings.training_step
    if not isinstance(step, Mapping) or step.get("_target_") != DISTILLATION or step.get("teacher") != "last":
        return settings
    with named_errors("training_step.teacher=last"):
        return settings.with_teacher(str(find_last_run()))
