"""Manifests: recordings with their transcripts, one JSON object a line, for evaluation and training."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
