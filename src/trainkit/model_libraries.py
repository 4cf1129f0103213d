"""Models of torchvision, timm and Hugging Face's transformers, by their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from trainkit.core.errors import ConfigError
from trainkit.core.extras import import_extra
from trainkit.core.spelling import did_you_mean


def torchvision(name: str, num_classes: int | None = None, weights: str | None = None, **arguments: Any) -> Any:
    """Return a model of torchvision.

    Args:
        name: such as resnet18.
        num_classes: the number of outputs; None: that of the weights.
        weights: pretrained weights, such as DEFAULT. The last layer of other weights has another number of classes, so
            `num_classes` must be theirs.
        arguments: further arguments of the model.

    Raises:
        ConfigError: there is no model of this name.
    """
    from torchvision import models

    _require_name("model.name", name, models.list_models(), "torchvision")
    given = {} if num_classes is None else {"num_classes": num_classes}
    return models.get_model(name, weights=weights, **given, **arguments)


def timm(name: str, num_classes: int = 1000, pretrained: bool = False, **arguments: Any) -> Any:
    """Return a model of timm.

    Args:
        name: such as vit_tiny_patch16_224, or hf-hub:OWNER/NAME.
        num_classes: the number of outputs; 0: features.
        pretrained: start from pretrained weights, which are downloaded.
        arguments: further arguments of the model, such as img_size, in_chans and drop_path_rate.

    Raises:
        ConfigError: timm is not installed, or there is no model of this name.
    """
    library = import_extra("timm", "timm", "model")
    if ":" not in name:
        _require_name("model.name", name.partition(".")[0], library.list_models(), "timm")
    return library.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)


def huggingface(
    name: str | None = None,
    config: dict[str, Any] | None = None,
    task: str = "SequenceClassification",
    num_classes: int | None = None,
    **arguments: Any,
) -> Any:
    """Return a model of Hugging Face's transformers.

    Args:
        name: a local folder, or the name of a model on the hub, whose weights are loaded.
        config: the config of a model with random weights, with its `model_type`.
        task: the end of the class name, as in AutoModelForSequenceClassification; base: without a head.
        num_classes: the number of labels; None: that of the config.
        arguments: further arguments of `from_pretrained`, or of the config.

    Raises:
        ConfigError: transformers is not installed, there is no such task, or neither or both of name and config are
            given.
    """
    transformers = import_extra("transformers", "huggingface", "model")
    if (name is None) == (config is None):
        cause = "model: it needs either model.name or model.config"
        raise ConfigError(cause, hint="for example model.name=FOLDER, or model.config.model_type=bert")
    class_name = "AutoModel" if task == "base" else f"AutoModelFor{task}"
    known = [item.removeprefix("AutoModelFor") for item in dir(transformers) if item.startswith("AutoModelFor")]
    _require_name("model.task", task, [*known, "base"], "transformers")
    auto = getattr(transformers, class_name)
    labels = {} if num_classes is None or task == "base" else {"num_labels": num_classes}
    if config is None:
        return auto.from_pretrained(name, **{"dtype": torch.get_default_dtype(), **labels, **arguments})
    options = {**labels, **config, **arguments}
    if "model_type" not in options:
        raise ConfigError("model.config: it has no model_type", hint="for example model.config.model_type=bert")
    kind = options.pop("model_type")
    _require_name("model.config.model_type", kind, transformers.CONFIG_MAPPING.keys(), "transformers")
    return auto.from_config(transformers.AutoConfig.for_model(kind, **options))


def _require_name(key: str, name: str, names: Iterable[str], library: str) -> None:
    known = [*names]
    if name not in known:
        raise ConfigError(f"{key}={name}: {library} has no such name", hint=did_you_mean(name, known, f"{key}="))
