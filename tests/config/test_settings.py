"""Typed settings: off is None, nodes are plain, and values that depend on the data are set later."""

from __future__ import annotations

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from tests.helpers import compose_settings
from trainkit.config.renamed import upgrade_fingerprint, upgrade_saved_config
from trainkit.config.schema import UNNAMED
from trainkit.config.settings import read_settings


def test_off_is_none_and_a_rule_that_is_off_is_dropped() -> None:
    settings = compose_settings(["ema=off", "checkpoint=false", "param_groups=no_decay", "param_groups.norms=off"])
    assert (settings.ema, settings.checkpoint, settings.data.augment and settings.data.augment.mixup) == (None,) * 3
    assert list(settings.param_groups) == ["biases"]


def test_optimizers_and_schedulers_are_named_nodes() -> None:
    settings = compose_settings(["optim=muon_sgd", "scheduler=cosine"])
    assert list(settings.optim) == ["muon", "sgd"]
    assert settings.scheduler[UNNAMED]["eta_min"] == 0.0
    assert compose_settings([]).scheduler == {}


def test_values_that_depend_on_the_data_are_set_with_the_data() -> None:
    settings = compose_settings(["scheduler=onecycle", "data.classes=off", "epochs=3"])
    assert settings.model["num_classes"] is None
    known = settings.with_data(classes=7, steps_per_epoch=5)
    assert (known.data.classes, known.model["num_classes"], known.scheduler[UNNAMED]["total_steps"]) == (7, 7, 15)
    assert settings.data.classes is None  # the settings themselves do not change
    assert compose_settings([]).with_data(classes=7).data.classes == 10  # the config decides


def test_values_that_were_replaced_stay_replaced_with_the_data() -> None:
    settings = compose_settings(["scheduler=onecycle", "data.classes=off"])
    changed = replace(settings, scheduler={}, optim={"a": {"fused": False}}, data=replace(settings.data, cache="none"))
    known = changed.with_data(classes=7, steps_per_epoch=5)
    assert (known.scheduler, known.optim) == ({}, {"a": {"fused": False}})
    assert (known.data.cache, known.data.classes) == ("none", 7)


def test_reading_settings_does_not_change_the_config() -> None:
    config = compose_settings(["ema=0.9"]).source
    before = OmegaConf.to_yaml(config)
    config.ema = "off"
    assert read_settings(config).ema is None
    assert config.ema == "off"
    config.ema = 0.9
    assert OmegaConf.to_yaml(config) == before


@pytest.mark.parametrize("old_limit", [None, False, "off"])
def test_the_config_of_an_old_run_gets_the_present_names(old_limit: object) -> None:
    config = compose_settings([]).source
    OmegaConf.set_struct(config, False)
    del config.data.on_unreadable, config.data.augment.crop_padding
    config.data.on_error, config.data.augment.crop, config.data.cache_limit = "skip", "${epochs}", old_limit
    config.hooks.kill = {"_target_": "trainkit.verification.Kill", "step": 3}
    upgrade_saved_config(config)
    assert config.hooks.kill["_target_"] == "trainkit.diagnostics.verify_resume.Kill"
    settings = read_settings(config)
    assert (settings.data.on_unreadable, settings.data.cache_limit) == ("skip", "auto")
    assert settings.data.augment is not None
    assert settings.data.augment.crop_padding == 20


def test_the_fingerprint_of_an_old_run_gets_the_present_names() -> None:
    old = {"data.augment.crop": 4, "lr": 0.1, "model._target_": "trainkit.augment.Augment"}
    new = {"data.augment.crop_padding": 4, "lr": 0.1, "model._target_": "trainkit.data.augment.Augment"}
    new["data.shuffle"] = True  # older versions shuffled in any case
    assert upgrade_fingerprint(old) == new
