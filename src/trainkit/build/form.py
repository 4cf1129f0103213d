"""From `data.inputs`, `data.targets` and `data.collate` to the form of samples."""

from __future__ import annotations

from trainkit.build.functions import build_function
from trainkit.config.schema import COLLATES
from trainkit.config.settings import Settings
from trainkit.config.targets import locate
from trainkit.data.form import SampleForm
from trainkit.losses import FromModel


def build_form(settings: Settings) -> SampleForm:
    """Build the form of the samples.

    Raises:
        ConfigError: `data.collate` is not a function of a list of samples.
        UserCodeError: `data.collate` raised an error.
    """
    data = settings.data
    collate = None if data.collate is None else build_function(data.collate, "data.collate", COLLATES)
    from_model = locate(settings.loss["_target_"]) is FromModel  # the model needs the targets, too
    return SampleForm(data.inputs, data.targets, targets_too=from_model, collate=collate)
