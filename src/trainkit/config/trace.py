"""Record where each value of a config comes from, in the order in which Hydra and trainkit set the values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.default_element import ResultDefault
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from trainkit.config.choice_history import ChoiceHistory
from trainkit.config.compose import compose_with, drop_replaced
from trainkit.config.config_files import ConfigFiles
from trainkit.config.config_loader import ConfigLoader
from trainkit.config.diagnose import COMPOSITION_ERRORS
from trainkit.config.hints import is_off
from trainkit.config.init_from import expand_short_forms
from trainkit.config.origin import ABSENT, Event, Origin
from trainkit.config.replaced_targets import mark_new_arguments, nodes_with_new_target
from trainkit.config.schema import SHORT_FORMS
from trainkit.config.search_path import search_path
from trainkit.core.errors import ConfigError
from trainkit.core.leaves import leaves


@dataclass
class Trace:
    """A composed config, and the origin of each of its values.

    Attributes:
        config: the config that is trained. If the config has errors: as the command line gives it.
        hydra: Hydra's node.
        histories: for each dotted key of a leaf, what set or removed it, in order. The last event counts.
        choices: for each group, who chose what, in order. The last event counts.
        notes: about replaced `_target_`s, for the user.
        error: what is wrong with the config, if anything is.
    """

    config: DictConfig
    hydra: DictConfig
    histories: dict[str, list[Event]] = field(default_factory=dict)
    choices: dict[str, list[Event]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: ConfigError | None = None

    def record(
        self,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        origin_of: Callable[[str], Origin],
        given: Iterable[str] = (),
    ) -> None:
        """Append an event for each leaf that a step changed, and for each leaf that it gave.

        Args:
            before: the leaves before the step.
            after: the leaves after the step.
            origin_of: returns the origin for a key.
            given: the keys that the step sets, perhaps to the same value.
        """
        changed = [key for key in (*before, *after) if _differ(before.get(key, ABSENT), after.get(key, ABSENT))]
        for key in dict.fromkeys([*given, *changed]):
            if key in before or key in after:
                self.histories.setdefault(key, []).append(Event(after.get(key, ABSENT), origin_of(key)))


def trace(overrides: Sequence[str] = (), config_dir: str | None = None) -> Trace:
    """Compose the config of a command line, and record the origin of each value.

    The order of the files is that in which Hydra's loader merged them, and each override is applied by Hydra's own
    function.

    Raises:
        ConfigError: the config cannot be composed. A config with wrong values is no error here, see `Trace.error`.
    """
    loader = _RecordingLoader(search_path(config_dir))
    error: ConfigError | None = None
    try:
        composed = compose_with(loader, overrides)
        config, hydra, notes = composed.settings.source, composed.hydra, composed.notes
    except ConfigError as wrong:
        if wrong.composed is None:
            raise
        error, notes = wrong, ()
        config, hydra = wrong.composed.config, wrong.composed.hydra
    assert hydra is not None
    written = mark_new_arguments(overrides)
    try:
        defaults = loader.compute_defaults_list("config", written, RunMode.RUN)
        found = Trace(config, hydra, notes=notes, error=error)
        files = ConfigFiles(loader.repository)
        choices = ChoiceHistory(files, [piece.default for piece in loader.pieces], defaults.overrides, overrides)
        found.choices = choices.events
        state = _record_files(found, loader.pieces, files, choices)
        typed = dict(zip(written, overrides, strict=True))
        for override in defaults.config_overrides:
            text = str(override.input_line)
            _record_override(found, state, override, typed.get(text, text))
    except COMPOSITION_ERRORS:
        if error is not None:
            raise error from None  # an override is wrong
        raise
    _record_trainkit(found, state, written, overrides, loader)
    return found


@dataclass(frozen=True)
class _Piece:
    """A config that Hydra has merged: its entry of the defaults list, and its content at its place."""

    default: ResultDefault
    package: str
    config: DictConfig


class _RecordingLoader(ConfigLoader):
    """A loader that records the configs that it merges, in order, when it composes for the first time."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.pieces: list[_Piece] = []
        self._recorded = False

    def _load_single_config(self, default: Any, repo: Any) -> ConfigResult:
        result = super()._load_single_config(default, repo)
        if not self._recorded:
            package = result.header.get("package") if default.package is None else default.package
            config: Any = result.config
            self.pieces.append(_Piece(default, package or "", copy.deepcopy(config)))
        return result

    def _compose_config_from_defaults_list(self, defaults: Any, repo: Any) -> DictConfig:
        config = super()._compose_config_from_defaults_list(defaults, repo)
        self._recorded = True
        return config


class _State:
    """A config that is composed step by step, and the leaves that it had after the last recorded step."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.leaves = _leaves(config)

    def advance(self, found: Trace, origin_of: Callable[[str], Origin], given: Iterable[str] = ()) -> None:
        """Record what has changed in the config since the last call; see `Trace.record`."""
        before, self.leaves = self.leaves, _leaves(self.config)
        found.record(before, self.leaves, origin_of, given)


def _record_files(found: Trace, pieces: Sequence[_Piece], files: ConfigFiles, choices: ChoiceHistory) -> _State:
    """Merge the recorded configs again, as Hydra does; record what each of them sets. Return the merged config."""
    state = _State(OmegaConf.create())
    for piece in pieces:
        with flag_override(state.config, "no_deepcopy_set_nodes", True):
            state.config.merge_with(copy.deepcopy(piece.config))
        via = choices.via(piece.default)
        place, package = files.find(str(piece.default.config_path)), piece.package
        origin_of = functools.partial(place.origin_of, package=package, via=via)
        state.advance(found, origin_of, _leaves(piece.config))
    OmegaConf.set_struct(state.config, True)
    OmegaConf.set_readonly(state.config.hydra, False)
    return state


def _record_override(found: Trace, state: _State, override: Any, typed: str) -> None:
    """Apply an override of Hydra's parser, which the user typed as `typed`; record what it sets."""
    ConfigLoaderImpl._apply_overrides_to_config([override], state.config)
    given = {override.key_or_group: None if override.is_delete() else override.value()}
    state.advance(found, lambda _: Origin("command line", typed), dict(leaves(given)))


def _record_trainkit(
    found: Trace, state: _State, written: Sequence[str], overrides: Sequence[str], loader: ConfigLoaderImpl
) -> None:
    """Record what Hydra and trainkit change after the overrides."""
    config = state.config = state.config.copy()
    OmegaConf.set_struct(config, False)
    config.hydra = found.hydra
    state.advance(found, lambda _: Origin("Hydra", "set while composing"))
    config.pop("hydra")
    state.leaves = _leaves(config)
    drop_replaced(config, overrides, found.hydra, loader)
    replacing = {text: list(nodes_with_new_target(text)) for text in written}
    state.advance(found, lambda key: Origin("trainkit", _why_dropped(key, state.leaves, replacing)))
    expand_short_forms(config)
    state.advance(found, lambda key: Origin("trainkit", _why_expanded(key)))
    before = state.leaves
    state.config = found.config
    state.advance(found, lambda key: Origin("trainkit", _why_normalized(key, before)))


def _why_dropped(key: str, after: Mapping[str, Any], replacing: Mapping[str, Sequence[str]]) -> str:
    """Return why a new `_target_` changes a key.

    Args:
        key: the key.
        after: the leaves after the change.
        replacing: the nodes with a new `_target_` of each override.
    """
    texts = [text for text, nodes in replacing.items() if any(key.startswith(f"{node}.") for node in nodes)]
    texts = texts or [text for text, nodes in replacing.items() if nodes]
    cause = " and ".join(text.removeprefix("++") for text in texts)
    if key in after and after[key] == "${lr}":
        return f"{cause} gets the root's lr"
    return f"belongs to the _target_ that {cause} replaces"


def _why_expanded(key: str) -> str:
    section = key.partition(".")[0]
    return f"{section}=PATH is short for {section}.{SHORT_FORMS.get(section, 'path')}=PATH"


def _why_normalized(key: str, before: Mapping[str, Any]) -> str:
    """Return why the settings have another value than the config, given the leaves of the config."""
    section = key.partition(".")[0]
    if section in SHORT_FORMS and (section != key or key not in before):
        return f"{section} is off without {section}.{SHORT_FORMS[section]}"
    if is_off(before.get(key, ABSENT)):
        return "off, false and null mean the same"
    return {"epochs": "steps is given instead", "monitor.mode": "auto follows monitor.metric"}.get(key, "normalized")


def _leaves(config: Any) -> dict[str, Any]:
    """Return the leaves of a config by dotted keys, with interpolations as they are written."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    if isinstance(plain, dict):
        plain.pop("defaults", None)  # of Hydra, which removes it
    return dict(leaves(plain))


def _differ(one: Any, other: Any) -> bool:
    return type(one) is not type(other) or repr(one) != repr(other)  # 0 is not False, and NaN equals NaN
