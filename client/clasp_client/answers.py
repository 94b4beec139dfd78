"""What the service answers, as frozen dataclasses.

Members that a newer service adds are ignored, and those that an older one lacks have defaults where they can.
Times within recordings are in seconds, and scores are cosines (-1 to 1).
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RecordError:
    """Why a recording cannot be searched."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Links:
    """Paths below the service's address."""

    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """A recording as it stands."""

    id: str
    status: str
    """`pending`, `processing`, `ready` or `failed`."""
    collection: str
    created_at: datetime
    sha256: str
    size_bytes: int
    duration_s: float | None = None
    """Known once it has been embedded."""
    segments: int | None = None
    """How many of it can be found."""
    lang: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    media_type: str | None = None
    error: RecordError | None = None
    """Why it cannot be searched, where the status is `failed`."""
    duplicate: bool | None = None
    """True where an upload's bytes were in the collection already; then this is the first record of them."""
    etag: str | None = None
    """For `if_match`; changes whenever the record does. Only `get` and `update` tell it."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some records of a list."""

    items: tuple[Record, ...]
    next_cursor: str | None = None
    """For the next page; None on the last."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """What became of recordings that were to be deleted."""

    matched: int
    """How many there were at first."""
    deleted: int
    more: bool
    """Whether some are left."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a recording that matches, about a sentence long."""

    start_s: float
    end_s: float
    score: float
    transcript: str | None = None
    """What is said there, where the model wrote it down."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A recording that matches (or one of its segments, with `group_by="segment"`)."""

    rank: int
    """From 1."""
    id: str
    score: float
    """That of the best segment."""
    segments: tuple[Segment, ...]
    """Those that match, best first."""
    collection: str
    links: Links
    confidence: float | None = None
    """Probability (0 to 1) that a best hit with this score is right, where it was measured."""
    lang: str | None = None
    duration_s: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QueryEcho:
    """The question as it was understood."""

    text: str | None = None
    lang: str | None = None
    normalized: str | None = None
    """What was searched for; None where the question was a recording."""


@dataclass(frozen=True, slots=True)
class ModelEcho:
    """What answered."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Took:
    """Milliseconds inside the service."""

    encode: float
    search: float
    total: float


@dataclass(frozen=True, slots=True)
class SearchAnswer:
    """Hits, best first."""

    query: QueryEcho
    model: ModelEcho
    took_ms: Took
    hits: tuple[Hit, ...]


@dataclass(frozen=True, slots=True)
class Waveform:
    """How loud a recording is, for drawing."""

    start_s: float
    end_s: float
    peaks: tuple[float, ...]
    """From 0 to 1, evenly spaced between the two times."""


@dataclass(frozen=True, slots=True)
class Collection:
    """What is in a collection."""

    name: str
    recordings: int
    ready: int = 0
    failed: int = 0
    duration_s: float = 0.0
    segments: int = 0


@dataclass(frozen=True, slots=True)
class Readiness:
    """What `/readyz` looked at."""

    status: str
    model: str
    """Fingerprint of the model that answers."""
    checks: Mapping[str, str] = field(default_factory=dict)
    """Each is `ok`, or says what is wrong."""
    degraded: tuple[str, ...] = ()
    """Checks that are not well, but stop no answer."""


def parse(kind: type[T], value: object) -> T:
    """JSON as a dataclass of this module. Raises ValueError where it is not one."""
    try:
        parsed: T = _parse(kind, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"This is no {kind.__name__} of clasp-search: {error}") from None
    return parsed


def _parse(kind: Any, value: Any) -> Any:  # noqa: ANN401 - what JSON holds
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"an object was expected, not {type(value).__name__}")
        known = {name: _parse(of, value[name]) for name, of in _fields(kind).items() if name in value}
        return kind(**known)
    if kind is datetime:
        return datetime.fromisoformat(value)
    if get_origin(kind) in (types.UnionType, Union):
        return None if value is None else _parse(get_args(kind)[0], value)
    if get_origin(kind) is tuple:
        return tuple(_parse(get_args(kind)[0], item) for item in value)
    if kind is float:
        return float(value)
    return value


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
