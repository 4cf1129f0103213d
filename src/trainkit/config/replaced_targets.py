"""A `KEY._target_=X` on the command line replaces a node: the arguments of the old `_target_` do not apply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from trainkit.config.check import references
from trainkit.config.dotted_choices import DOTTED_GROUPS, is_dotted_choice, is_dotted_path
from trainkit.config.hints import hints_of, is_off
from trainkit.config.init_from import expand_short_overrides
from trainkit.config.schema import DataSettings, named_nodes

NODES = (*DOTTED_GROUPS, "data.train", "data.val")  # that every config has


def mark_new_arguments(overrides: Sequence[str]) -> list[str]:
    """Return the overrides, with `++` before each argument of a `_target_` that the command line gives.

    A short form such as `init_from=PATH` is written out if other keys of its section follow.
    """
    nodes = {node for text in overrides for node in nodes_with_new_target(text)}

    def may_be_new(key: str) -> bool:
        # A misspelt node must stay an error, so `model.cn._target_=X` alone does not add the node model.cn.
        own = key.removesuffix("._target_")
        return any(key.startswith(f"{node}.") and (node != own or node in NODES) for node in nodes)

    written = []
    for text in expand_short_overrides(overrides):
        key, _, value = text.partition("=")
        whole_node = key in nodes and key in NODES and value.startswith("{")
        written.append(f"++{text}" if text[:1] not in "+~" and (whole_node or may_be_new(key)) else text)
    return written


def remove_added_plus_signs(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without the `++` that `mark_new_arguments` has added."""
    typed = [text.removeprefix("++") for text in overrides]
    rewritten = mark_new_arguments(typed)
    return [short if long == text else text for short, long, text in zip(typed, rewritten, overrides, strict=True)]


def drop_replaced_arguments(
    config: DictConfig,
    overrides: Sequence[str],
    choices: Mapping[str, Any],
    compose_before: Callable[[list[str]], DictConfig | None],
) -> tuple[str, ...]:
    """Drop the arguments that belong to a replaced `_target_`, in place.

    Args:
        config: the composed config, without Hydra's node.
        overrides: the overrides of the command line, from `mark_new_arguments`.
        choices: the choice of each group.
        compose_before: composes other overrides; used for the config before the new targets.

    Returns:
        Notes about the arguments that do not apply, for the user.
    """
    notes = []
    replaced: list[_ReplacedNode] = []
    targets = [text for text in overrides if "_target_" in text and not _adds_node(text)]
    if targets:
        given = _given_values(overrides)
        before = compose_before([text for text in overrides if text not in targets])
        replaced = list(_replaced_nodes(config, before, given, choices)) if before is not None else []
    for node in replaced:
        notes += node.drop()
    choice = choices.get("optim")
    dotted = is_dotted_path(choice) and OmegaConf.select(config, "optim._target_") == choice
    if dotted and not any(node.path == "optim" for node in replaced):
        notes += _set_learning_rate(config, "optim", given=not is_off(_raw(config, "lr")))
    return tuple(notes)


@dataclass(frozen=True)
class _ReplacedNode:
    """A node of the config with a new `_target_`."""

    config: DictConfig
    path: str  # of the node
    before: Mapping[str, Any]  # the config with the old `_target_`
    given: set[str]  # the keys that the command line gives
    label: str  # names the old `_target_`

    def drop(self) -> list[str]:
        """Drop the arguments of the old `_target_`; return the notes."""
        dropped = _drop_keys(OmegaConf.select(self.config, self.path), self.path, self.given)
        more = []
        if self.path.partition(".")[0] == "optim":
            more = self._drop_learning_rate(dropped)
        if self.path == "optim":
            dropped += self._drop_rules(dropped)
        if self.path == "data.train":
            dropped += self._drop_data_keys()
            more = self._note_validation_set()
        if not dropped:
            return more
        verb = "does" if len(dropped) == 1 else "do"
        return [f"note: {self.path}._target_ replaces {self.label}; its {', '.join(dropped)} {verb} not apply", *more]

    def _drop_rules(self, optimizers: list[str]) -> list[str]:
        """Drop the param_groups rules that name a dropped optimizer."""
        rules = _raw(self.config, "param_groups") or {}
        wrong = [rule for rule in rules if _raw(self.config, "param_groups", rule, "optimizer") in optimizers]
        wrong = [rule for rule in wrong if not any(key.startswith(f"param_groups.{rule}.") for key in self.given)]
        for rule in wrong:
            del self.config.param_groups[rule]
        return [f"param_groups.{rule}" for rule in wrong]

    def _drop_learning_rate(self, dropped: list[str]) -> list[str]:
        """Drop the root's learning rate if it belongs to the old optimizer; return the note."""
        given = "lr" in self.given and not is_off(_raw(self.config, "lr"))
        if given and "lr" in dropped:
            dropped.remove("lr")
        if not given and not any("${lr}" in str(_raw(self.config, "optim", key)) for key in self.config.optim):
            dropped[:0] = [] if "lr" in dropped or is_off(_raw(self.config, "lr")) else ["lr"]
            self.config.lr = None
        return _set_learning_rate(self.config, self.path, given=given)

    def _drop_data_keys(self) -> list[str]:
        """Drop the number of classes, and the keys of `data` that only the old training set used."""
        data, dropped = self.config.data, []
        if "data.classes" not in self.given and not is_off(_raw(self.config, "data", "classes")):
            data.classes = None
            dropped.append("data.classes")
        used, used_before = (set(references(raw, ())) for raw in (_plain(self.config), self.before))
        for key in [f"data.{key}" for key in data if key not in hints_of(DataSettings)]:
            if key not in self.given and key in used_before - used:
                del data[key.removeprefix("data.")]
                dropped.append(key)
        return dropped

    def _note_validation_set(self) -> list[str]:
        val = _raw(self.config, "data", "val")
        if not isinstance(val, dict) or "_target_" not in val or any(key.startswith("data.val") for key in self.given):
            return []
        return [f"note: data.val is still {val['_target_']}; data.val=null removes it"]


def _replaced_nodes(
    config: DictConfig, before: DictConfig, given: Mapping[str, Any], choices: Mapping[str, Any]
) -> Iterator[_ReplacedNode]:
    """Yield each node whose `_target_` on the command line differs from the one before, outer nodes first."""
    plain = _plain(before)
    for path in sorted(key.removesuffix("._target_") for key in given if key.endswith("._target_")):
        node, old = OmegaConf.select(config, path), _at(plain, path)
        if not isinstance(node, DictConfig) or not isinstance(old, dict) or old.get("_target_") == node.get("_target_"):
            continue
        targets = [child.get("_target_") for child in named_nodes(old).values() if isinstance(child, dict)]
        if any(targets):
            chosen = f"{path}={choices[path]}" if path in choices else None
            label = chosen or str(old.get("_target_") or f"the nodes of {path}")
            yield _ReplacedNode(config, path, plain, set(given), label)


def _set_learning_rate(config: DictConfig, path: str, *, given: bool) -> list[str]:
    """Pass the root's learning rate to a new optimizer if it is given. Else return the note about the default."""
    node = OmegaConf.select(config, path)
    if "lr" in node:
        return []
    if given:
        node["lr"] = "${lr}"
        return []
    if any("lr" in str(key) or "rate" in str(key) for key in node):  # another name of a learning rate
        return []
    return [f"note: lr is not given, so {node['_target_']} uses its own default learning rate"]


def _drop_keys(node: DictConfig, path: str, given: set[str]) -> list[str]:
    """Drop the keys of a node that the command line does not give; return them, dotted."""
    dropped = []
    for key in list(node):
        inner = f"{path}.{key}"
        if inner in given:
            continue
        if not any(name.startswith((f"{inner}.", f"{inner}[")) for name in given):
            del node[key]
            dropped.append(str(key))
        elif isinstance(node._get_node(key), DictConfig):
            dropped += [f"{key}.{name}" for name in _drop_keys(node[key], inner, given)]
    return dropped


def _adds_node(text: str) -> bool:
    """Return whether an override adds a new node, such as a hook, so that no `_target_` is replaced."""
    key = text.partition("=")[0].removeprefix("+")
    return text[:1] == "+" != text[1:2] and key.removesuffix("._target_") not in NODES


def nodes_with_new_target(text: str) -> Iterator[str]:
    """Yield the node whose `_target_` an override sets, or chooses by a dotted path."""
    key, _, value = text.lstrip("+").partition("=")
    if key.endswith("._target_"):
        yield key.removesuffix("._target_")
    chosen = any(is_dotted_choice(key, name.strip(" '\"()")) for name in value.removeprefix("choice").split(","))
    if chosen or (value.startswith("{") and "_target_" in value):
        yield key


def _given_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values that the command line sets, by dotted keys."""
    values: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                add(f"{key}.{name}", item)
        else:
            values[key] = value

    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:  # `diagnose` reports it
            continue
        if not override.is_delete():
            add(override.key_or_group, override.value())
    return values


def _plain(config: DictConfig) -> Any:
    """Return a config as plain containers, with its interpolations as they are written."""
    return OmegaConf.to_container(config, resolve=False)


def _raw(config: DictConfig, *keys: Any) -> Any:
    """Return the value at a key, with its interpolations as they are written."""
    return _at(_plain(config), ".".join(map(str, keys)))


def _at(node: Any, path: str) -> Any:
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node
