"""Manifests: recordings with their transcripts, one JSON object a line, for evaluation and training."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from clasp_core.durability import write_whole
from clasp_core.errors import InvalidLanguage, InvalidManifest
from clasp_core.language import canonical_tag


@dataclass(frozen=True, slots=True)
class ManifestItem:
    """One recording and what is said in it."""

    id: str
    audio: Path
    text: str
    """The transcript, as written in the manifest (not normalised)."""
    lang: str | None = None
    """Canonical BCP 47 tag of the transcript."""
    speaker: str | None = None
    source: str | None = None
    split: str | None = None
    query: str | None = None
    """The text to search with, where it is not the transcript."""
    query_lang: str | None = None
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    """The line's other fields."""


_REQUIRED = ("id", "audio", "text")
_OPTIONAL = ("lang", "speaker", "source", "split", "query", "query_lang")


def read_manifest(path: Path, audio_root: Path | None = None) -> list[ManifestItem]:
    """The items of a JSON Lines file (UTF-8), in its order. Blank lines are skipped; null means absent.

    A relative `audio` is taken from `audio_root`, or else from the manifest's own folder; whether the
    file is there is not looked at. Raises InvalidManifest, naming the line: not UTF-8, not a JSON
    object, a field missing, empty or of the wrong type, a malformed language tag, an id met before,
    or no item at all.
    """
    root = path.parent if audio_root is None else audio_root
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InvalidManifest(f"{path} cannot be read: {error.strerror}.") from error
    items: list[ManifestItem] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _item(line, root)
            if item.id in line_of:
                raise InvalidManifest(f"the id {item.id!r} was used on line {line_of[item.id]}")
        except (InvalidManifest, InvalidLanguage) as error:
            raise InvalidManifest(f"{path}, line {number}: {error.detail.removesuffix('.')}.") from error
        line_of[item.id] = number
        items.append(item)
    if not items:
        raise InvalidManifest(f"{path} is empty: it needs one JSON object a line.")
    return items


def write_manifest(path: Path, items: Iterable[ManifestItem]) -> None:
    """Put the items into a file that `read_manifest` gives back as they are, in their order.

    `audio` is written relative to the manifest's folder, so that both can move together. The file appears
    whole or not at all, in place of one that was there. Raises InvalidManifest, writing nothing, for items
    that no manifest can hold: an id twice, an empty field, an `extra` that is not JSON or bears the name
    of another field, or no item.
    """
    root = path.parent
    lines: dict[str, bytes] = {}
    for item in items:
        line = _line(item, root)
        try:
            _item(line, root)
        except (InvalidManifest, InvalidLanguage) as error:
            raise InvalidManifest(f"The item {item.id!r} cannot be written: {error.detail}") from error
        if item.id in lines:
            raise InvalidManifest(f"The id {item.id!r} is used twice.")
        lines[item.id] = line
    if not lines:
        raise InvalidManifest(f"There is nothing to write to {path}: a manifest has at least one item.")
    write_whole(path, b"".join(line + b"\n" for line in lines.values()))


def _line(item: ManifestItem, root: Path) -> bytes:
    if taken := set(item.extra) & {*_REQUIRED, *_OPTIONAL}:
        raise InvalidManifest(f"The item {item.id!r} has {', '.join(sorted(taken))} among its other fields.")
    known = {name: value for name in _OPTIONAL if (value := getattr(item, name)) is not None}
    audio, folder = item.audio.absolute(), root.absolute()
    inside = audio.is_relative_to(folder)
    relative = (
        audio.relative_to(folder) if inside else Path(os.path.relpath(audio.resolve(), folder.resolve()))
    )
    fields = {"id": item.id, "audio": relative.as_posix(), "text": item.text, **known, **item.extra}
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # UnicodeEncodeError, of a lone surrogate, among them
        raise InvalidManifest(f"The item {item.id!r} cannot be written as JSON: {error}") from error


def _item(line: bytes, root: Path) -> ManifestItem:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidManifest("not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise InvalidManifest(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidManifest("not a JSON object")
    known = {name: _string(fields, name) for name in _OPTIONAL}
    known["lang"], known["query_lang"] = canonical_tag(known["lang"]), canonical_tag(known["query_lang"])
    return ManifestItem(
        id=_required(fields, "id"),
        audio=root / _required(fields, "audio"),
        text=_required(fields, "text"),
        **known,
        extra=MappingProxyType(
            {name: value for name, value in fields.items() if name not in (*_REQUIRED, *_OPTIONAL)}
        ),
    )


def _required(fields: Mapping[str, Any], name: str) -> str:
    value = _string(fields, name)
    if value is None:
        raise InvalidManifest(f"the field {name!r} is missing")
    return value


def _string(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidManifest(f"the field {name!r} must be a string, not {json.dumps(value)[:40]}")
    if not value.strip() or "\0" in value:
        raise InvalidManifest(f"the field {name!r} is empty or holds a NUL character")
    return value
