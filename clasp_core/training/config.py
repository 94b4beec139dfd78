"""Training configurations: TOML files read into dataclasses, strictly.

A misspelt key would train something else without a word, so whatever is not known is refused by name.
"""

import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from clasp_core.errors import InvalidField
from clasp_core.manifest import ManifestItem, read_manifest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """[data]: what is learnt from. Environment variables in paths are expanded."""

    manifest: Path
    cache: Path
    """Where encoder features, and the states of unfinished runs, are kept."""
    split: str = "train"
    validation: str | None = None
    """Split of the same manifest whose loss and retrieval figures are taken after every epoch."""
    validation_share: float = 0.0
    """Or this share of the training split is held out for them: whole speakers, where they are known."""
    speeds: tuple[float, ...] = (1.0,)
    """The readings of each recording: 1.0 as spoken, others resampled to that tempo and pitch."""
    precision: Literal["float16", "float32"] = "float16"
    """Of the features on disk."""
    weights: dict[str, float] = field(default_factory=dict)
    """How often an item is drawn per epoch, by source; 1 where a source is not named."""

    def __post_init__(self) -> None:
        require(bool(self.speeds), "data.speeds is empty")
        require(all(0.5 <= speed <= 2 for speed in self.speeds), "data.speeds must be within 0.5 and 2")
        require(all(weight >= 0 for weight in self.weights.values()), "data.weights may not be negative")
        require(0 <= self.validation_share < 1, "data.validation_share must be within 0 and 1")
        require(
            self.validation is None or not self.validation_share,
            "data.validation and data.validation_share exclude each other",
        )

    def require_watchable(self, figure: str | None) -> None:
        """Raises InvalidField where a figure of validation data is to be watched, and there are none."""
        require(
            figure is None or self.validates,
            "training.watch needs data.validation or data.validation_share",
        )

    @property
    def validates(self) -> bool:
        return self.validation is not None or self.validation_share > 0


def examples_of(data: DataConfig) -> tuple[list[ManifestItem], list[ManifestItem]]:
    """The items to learn from, and those to validate with (none where that is not asked for).

    Who is held out depends on the speakers' names alone: more items do not exchange them.
    Raises InvalidManifest as `read_manifest` does, InvalidField where a split has no item.
    """
    items = read_manifest(data.manifest)
    learnt = [item for item in items if item.split == data.split]
    checked = [item for item in items if data.validation is not None and item.split == data.validation]
    if data.validation_share:
        limit = data.validation_share * 16**24
        drawn = [int(digest(item.speaker or item.id), 16) < limit for item in learnt]
        checked = [item for item, held in zip(learnt, drawn, strict=True) if held]
        learnt = [item for item, held in zip(learnt, drawn, strict=True) if not held]
    require(bool(learnt), f"the manifest has no item of the split {data.split!r} to learn from")
    require(bool(checked) or not data.validates, "the manifest has no item to validate with")
    return learnt, checked


def require(holds: bool, otherwise: str) -> None:
    """Raises InvalidField with that reason unless it holds."""
    if not holds:
        raise InvalidField(f"The configuration is not usable: {otherwise}.")


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file's table. Raises InvalidField where it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InvalidField(f"{path} cannot be read as TOML: {error}.") from error


def parse(kind: type[T], table: Mapping[str, Any], base: Path, name: str = "") -> T:
    """A dataclass from a TOML table of its fields; a field that is a dataclass is a table of its own.

    Relative paths start at `base`. Raises InvalidField for a name that is unknown or missing, and for a
    value of another type.
    """
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    known = {known.name: known for known in fields(kind)}
    inside = f"[{name}]" if name else "the file"
    if unknown := sorted(set(table) - set(known)):
        raise InvalidField(
            f"The configuration has unknown names in {inside}: {', '.join(unknown)};"
            f" known are {', '.join(known)}."
        )
    values: dict[str, Any] = {}
    for field_name, described in known.items():
        place = f"{name}.{field_name}" if name else field_name
        if field_name in table:
            values[field_name] = _value(hints[field_name], table[field_name], base, place)
        elif is_dataclass(hints[field_name]):
            values[field_name] = parse(hints[field_name], {}, base, place)
        elif described.default is MISSING and described.default_factory is MISSING:
            raise InvalidField(f"The configuration lacks {place}.")
    made: T = kind(**values)
    return made


def _value(kind: Any, value: object, base: Path, place: str) -> object:  # noqa: ANN401 - a type expression
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return _value(kind, value, base, place)
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return parse(kind, value, base, place)
    if origin is Literal:
        if value in arguments:
            return value
        raise InvalidField(f"The configuration says {place} {value!r}; known are {', '.join(arguments)}.")
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, base, place) for item in value)
    if origin is dict and isinstance(value, dict):
        return {name: _value(arguments[1], item, base, f"{place}.{name}") for name, item in value.items()}
    if kind is Path and isinstance(value, str):
        return base / os.path.expandvars(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise InvalidField(f"The configuration's {place} has a value of the wrong type: {value!r}.")


def described(config: object) -> Any:  # noqa: ANN401 - JSON
    """A configuration as JSON, without paths: the places on a machine say nothing about the model."""
    if is_dataclass(config) and not isinstance(config, type):
        members = {known.name: getattr(config, known.name) for known in fields(config)}
        return {name: described(value) for name, value in members.items() if not isinstance(value, Path)}
    return list(config) if isinstance(config, tuple) else config


def digest(*identity: object) -> str:
    """24 hex digits of what can be written as JSON."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
