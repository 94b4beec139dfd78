"""What reads strangers' bytes, one function each: it takes any bytes, and raises only where there is a bug.

The suite calls them with what Hypothesis makes up, `python -m tests.fuzz_parsers` with what covers new code.
"""

import contextlib
import io
import itertools
import json
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import sqlalchemy as sa
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError

from app.errors import STATUS_OF, HttpError
from app.routes import (
    MAX_METADATA_DEPTH,
    MAX_WAIT_S,
    _bounded,
    _is_deeper,
    _metadata,
    _parsed,
    _preferred_wait,
)
from app.schemas import FilterBody, RecordingPatch, SearchBody, SearchesBody, Searching, _merged, filter_of
from app.uploads import FILE_FIELDS, _FormSink, _media_type
from clasp_core import sandbox
from clasp_core.database import RECORDINGS, create_engine
from clasp_core.errors import InvalidAudio, InvalidField, InvalidLanguage
from clasp_core.filters import Filter, holds
from clasp_core.language import MAX_TAG_LENGTH, canonical_tag
from clasp_core.library import _decode_cursor, _plain_json, check_name
from tests.hostile import FAMILIES

BOUNDARY = b"b0undary"
_bodies: TypeAdapter[SearchBody | SearchesBody] = TypeAdapter(Searching)


def cursor(data: bytes) -> None:
    """A place in a list, or InvalidField; no name in it that a database could choke on."""
    with contextlib.suppress(InvalidField):
        place = _decode_cursor(data.decode("utf-8", "replace"))
        check_name("id", place.id)
        check_name("collection", place.collection)
        assert place.created_at.tzinfo is None


def tag(data: bytes) -> None:
    """A canonical tag, which is its own, or InvalidLanguage."""
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(InvalidLanguage):
        canonical = canonical_tag(text)
        assert len(text) <= MAX_TAG_LENGTH
        assert canonical == canonical_tag(canonical)


def metadata(data: bytes) -> None:
    """A JSON object that can be stored and answered, or InvalidField."""
    with contextlib.suppress(InvalidField):
        value = _metadata(data.decode("utf-8", "replace"))
        assert json.loads(json.dumps(_plain_json(value), allow_nan=False)) == value


def search_body(data: bytes) -> None:
    """Questions with filters that can be compared and kept in a set, or what FastAPI turns into a 422."""
    with contextlib.suppress(ValidationError, InvalidLanguage):
        body = _bodies.validate_json(data)
        for question in [body] if isinstance(body, SearchBody) else body.queries:
            hash(filter_of(question.filter, None))
            question.q.encode()


KEPT: list[dict[str, Any]] = [
    *(
        {"n": n}
        for n in (0, 1, 1.5, -0.0, 2**53 + 1, 2**64, 1e308, True, None, "", "1", "a\0b", "é", [1], {})
    ),
    {},
    {"نام": "سعدی", "a\0b": 1, "": True, "n.m": "x", '"': "\\", "$": 2},
]


def filter_(data: bytes) -> None:
    """Whatever is taken can be asked of a database, which finds what plain Python does; the rest is refused,
    in a query (our reader) and in a body (FastAPI's)."""
    text = data.decode("utf-8", "replace")
    bodies = []
    with contextlib.suppress(RequestValidationError):
        bodies.append(_parsed(FilterBody, text, "query", "filter"))
    with contextlib.suppress(ValueError, RecursionError):  # of json, and ValidationError
        bodies.append(FilterBody.model_validate(json.loads(text)))
    for body in bodies:
        with contextlib.suppress(InvalidLanguage):
            wanted = filter_of(body, frozenset({"default"}))
            _keys(wanted)
            told = json.dumps([[one.name, one.relation, json.loads(one.value)] for one in wanted.metadata])
            right = {key for key, metadata in enumerate(KEPT) if holds(json.dumps(metadata), told)}
            assert _keys(Filter(metadata=wanted.metadata)) == right


def _keys(wanted: Filter) -> set[int]:
    query = sa.select(RECORDINGS.c.key).where(wanted.where(RECORDINGS, "sqlite"))
    return set(_database().execute(query).scalars())


@cache
def _database() -> sa.Connection:
    """KEPT, in memory."""
    database = create_engine("sqlite://").connect()
    RECORDINGS.create(database)
    for key, metadata in enumerate(KEPT):
        database.execute(RECORDINGS.insert().values(key=key, metadata=metadata, collection="default"))
    return database


def patch(data: bytes) -> None:
    """A change of a record that can be stored, and that changes nothing more when it is done again; or a
    refusal."""
    with contextlib.suppress(RequestValidationError, InvalidField):
        change = _parsed(RecordingPatch, data, "body").metadata or {}
        if _is_deeper(change, MAX_METADATA_DEPTH):
            return
        for before in KEPT:
            after = _merged(before, change)
            _bounded(after)
            assert json.loads(json.dumps(_plain_json(after), allow_nan=False)) == after
            assert _merged(after, change) == after
            assert None not in (after[name] for name in change if name in after)


def wait(data: bytes) -> None:
    """Seconds within bounds, or nothing: `Prefer` never refuses a request."""
    seconds = _preferred_wait(data.decode("latin-1"))
    assert seconds is None or 0 <= seconds <= MAX_WAIT_S


def form(data: bytes) -> None:
    """A multipart body says the same in whatever pieces it arrives. The first bytes say where it is cut."""
    cuts, body = data[:8], data[8:]
    whole = _read([body])
    assert _read([bytes([byte]) for byte in body]) == whole
    places = sorted({cut * len(body) // 255 for cut in cuts} | {0, len(body)})
    assert _read([body[a:b] for a, b in itertools.pairwise(places)]) == whole


def _read(pieces: Sequence[bytes]) -> Any:
    """The fields, the recording's bytes and whether there is one; or the error's code."""
    try:
        sink = _FormSink(BOUNDARY)
        for piece in pieces:
            sink.feed(piece)
        sink.end()
    except HttpError as error:
        return STATUS_OF[error.code], error.code
    assert not set(sink.fields) & set(FILE_FIELDS)
    content = sink.take()
    return sink.fields, content, _media_type(content[:16])


def decode(data: bytes) -> None:
    """A hostile file, which the bytes choose, is sound or InvalidAudio in time, and the sandbox lives on."""
    rng = np.random.default_rng(list(data or b"\0"))
    content = FAMILIES[int(rng.integers(len(FAMILIES)))](rng)
    began = time.monotonic()
    decode_bytes(content)
    assert time.monotonic() - began < 60


def decode_bytes(content: bytes) -> None:
    """Samples that add up, or InvalidAudio with a code."""
    with contextlib.suppress(InvalidAudio):
        stream = sandbox.decode(io.BytesIO(content), max_duration_s=60, deadline_s=30)
        total = 0
        for block in stream:
            assert block.dtype == np.float32
            assert np.isfinite(block).all()
            total += len(block)
        assert abs(stream.info.duration_s * 16_000 - total) < 2
        assert total <= 60 * 16_000 + 1


TARGETS: dict[str, Callable[[bytes], None]] = {
    "cursor": cursor,
    "tag": tag,
    "metadata": metadata,
    "search-body": search_body,
    "filter": filter_,
    "patch": patch,
    "wait": wait,
    "form": form,
    "decode": decode,
}
SEEDS: dict[str, list[bytes]] = {
    "cursor": [b"WyIyMDI2LTAxLTAxVDAwOjAwOjAwIiwgImEiLCAiYiJd"],
    "tag": [b"zh-Hans-CN", b"en-GB-oed", b"de-1996-u-co-phonebk-x-a"],
    "metadata": [b'{"a": [1, 2.5, null, {"b": "c"}]}'],
    "search-body": [
        b'{"q": "bees", "limit": 3, "min_score": "auto", "filter": {"lang": "fa", "metadata": {"a": 1}}}',
        b'{"queries": [{"q": "bees", "collection": "a", "min_score": -0.5}]}',
    ],
    "filter": [
        b'{"id": "a", "lang": {"in": ["fa"]}, "created_at": {"gte": "2026-03-21T12:00:00Z"}}',
        b'{"duration_s": {"gt": 1, "lte": 2.5}, "metadata": {"n": {"in": [1, null]}, "x": "y"}}',
        b'{"metadata": {"n": {"ne": true, "gte": 0, "exists": true}, "": {"eq": "\\u0000"}}}',
    ],
    "patch": [b'{"lang": "fa", "metadata": {"n": {"a": [null]}, "x": null}}', b'{"metadata": null}'],
    "wait": [b"respond-async, wait=30; x=y"],
    "form": [
        b"\x10\x40\x80\xc0\xe0\xf0\xf8\xff--b0undary\r\n"
        b'Content-Disposition: form-data; name="id"\r\n\r\na\r\n--b0undary\r\n'
        b'Content-Disposition: form-data; name="file"; filename="x.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        b"RIFF\r\n--b0undar\r\n--b0undary--\r\n",
        b"\x10\x40\x80\xc0\xe0\xf0\xf8\xff\r\na\n--b0undary\r\n"
        b'Content-Disposition: form-data; name="id"\r\n\r\na\r\n--b0undary--',
    ],
    "decode": [b"\0", b"\1"],
}
"""What is right, to begin with."""
