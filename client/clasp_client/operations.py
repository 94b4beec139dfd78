"""What is asked of the service, and what is made of its answers: each operation once, for both clients.

An operation is a generator (as `httpx.Auth`'s flows are): it yields the next `Step`, is sent what came of it,
and returns its result. It touches no network and never sleeps, so `Client` and `AsyncClient` only differ in
how they do a step.
"""

import json
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx

from clasp_client.answers import (
    Collection,
    Deletion,
    Page,
    Readiness,
    Record,
    SearchAnswer,
    Waveform,
    parse,
)
from clasp_client.errors import (
    ClaspError,
    ConnectionFailed,
    NotFound,
    NotReadyInTime,
    PreconditionFailed,
    RecordingFailed,
    ServiceError,
    TimedOut,
    UnexpectedAnswer,
    error_class,
)
from clasp_client.retries import Patience, Retries, retry_after_s
from clasp_client.transfers import Progress, Recording, Sink, Source

T = TypeVar("T")
GroupBy: TypeAlias = Literal["recording", "segment"]
MinScore: TypeAlias = float | Literal["auto"]
MAX_QUESTIONS = 100
"""So many the service takes at once."""
_TRY_AGAIN = frozenset({429, 502, 503, 504})
_NEVER_BEGUN = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_OUR_FAULT = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)


@dataclass(slots=True)
class Ask:
    """A request to send."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    """Those that are None are left out."""
    headers: dict[str, str] = field(default_factory=dict)
    json: object = None
    source: Source | None = None
    """The body, if it is not JSON."""
    sink: Sink | None = None
    """Where the answer's body goes, if it is one of success."""
    repeatable: bool = True
    """Whether to do it twice is to do it once, so that it may be sent again when what became of it is not
    known."""
    patient: bool = True
    """Whether it is ever sent again."""
    uncertain: bool = False
    """It was sent again, and the service may have done it before."""


@dataclass(frozen=True, slots=True)
class Pause:
    """A time to wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Something that reads or writes files at length."""

    do: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. What went into a sink is not here."""

    status: int
    headers: Mapping[str, str]
    content: bytes = b""


Step: TypeAlias = Ask | Pause | Work
Steps: TypeAlias = Generator[Step, Reply | None, T]


@dataclass(frozen=True, slots=True)
class Question:
    """One of `search_many`: words (`q`), or a recording that is there already (`like`)."""

    q: str | None = None
    lang: str | None = None
    """BCP 47 tag: a hint for normalising the question, never a filter."""
    limit: int = 10
    collection: str | None = None
    min_score: MinScore | None = None
    """A cosine, or `auto` for hits that are probably right only."""
    group_by: GroupBy = "recording"
    filter: Mapping[str, Any] | None = None
    """As the service's README has it; times may be `datetime`s with a zone."""
    like: str | None = None
    """A recording's id; what is there is asked for, and the recording itself is no hit."""
    at_s: float | None = None
    """With `like`: the second at which the segment is that is meant; else the whole recording is."""
    like_collection: str | None = None

    def body(self) -> dict[str, Any]:
        """As JSON has it."""
        return _given({name: getattr(self, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class Upload:
    """One of `upload_many`."""

    recording: Recording
    id: str | None = None
    lang: str | None = None
    collection: str | None = None
    metadata: Mapping[str, Any] | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What became of an `Upload`: a record, or an error."""

    upload: Upload
    record: Record | None = None
    error: ClaspError | OSError | None = None


class Operations:
    """Everything that the service can be asked. The clients have methods of the same names."""

    def __init__(self, retries: Retries) -> None:
        self._retries = retries

    # --- recordings

    def upload(
        self,
        recording: Recording,
        *,
        id: str | None = None,
        lang: str | None = None,
        collection: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        wait: float | None = None,
        progress: Progress | None = None,
        idempotency_key: str | None = None,
    ) -> Steps[Record]:
        """Index a recording: a path, bytes, or a file open for reading bytes.

        It is streamed, and sent again when the connection breaks, which never makes two of it; a file that
        cannot be sought is sent once. Returns when it is safe with the service (the record says `pending`),
        or, with `wait`, once it can be found, as `wait_until_ready` does after at most so many seconds.

        `lang` is the BCP 47 tag of what is spoken. With an `idempotency_key` of your own the upload is done
        once even if this program dies and tries again within 24 hours. Raises OSError where the file cannot
        be read.
        """
        fields = {"id": id, "lang": lang, "collection": collection}
        # proxies bound and log addresses: metadata go into the body, before the recording
        form = None if metadata is None else {"metadata": _as_json(metadata), **_given(fields)}
        ask = Ask(
            "POST",
            "/audio",
            params=fields if form is None else {},
            headers={"Idempotency-Key": idempotency_key or uuid4().hex},
            source=Source(recording, progress, form),
        )
        return (yield from self._registered(ask, wait))

    def upload_url(
        self,
        url: str,
        *,
        id: str | None = None,
        lang: str | None = None,
        collection: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        wait: float | None = None,
        idempotency_key: str | None = None,
    ) -> Steps[Record]:
        """Let the service fetch a recording (where its operator allows that host) and index it; else as
        `upload`."""
        body = {"url": url, "id": id, "lang": lang, "collection": collection, "metadata": metadata}
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        return (yield from self._registered(Ask("POST", "/audio", json=_given(body), headers=headers), wait))

    def _registered(self, ask: Ask, wait: float | None) -> Steps[Record]:
        record = _parsed(Record, (yield from self._sent(ask)))
        if wait is None:
            return record
        return (yield from self.wait_until_ready(record.id, collection=record.collection, timeout=wait))

    def upload_one_of_many(self, upload: Upload, wait: float | None) -> Steps[Uploaded]:
        try:
            record = yield from self.upload(
                upload.recording,
                id=upload.id,
                lang=upload.lang,
                collection=upload.collection,
                metadata=upload.metadata,
                progress=upload.progress,
                wait=wait,
            )
        except (ClaspError, OSError) as error:
            return Uploaded(upload, error=error)
        return Uploaded(upload, record)

    def wait_until_ready(
        self, id: str, *, collection: str | None = None, timeout: float = 600.0
    ) -> Steps[Record]:
        """The record once the recording can be found. Raises RecordingFailed where it cannot be indexed, and
        NotReadyInTime after `timeout` seconds."""
        began = time.monotonic()
        pause = 0.05
        while True:
            record = yield from self.get(id, collection=collection)
            if record.status == "ready":
                return record
            if record.status == "failed":
                raise RecordingFailed(record)
            left = timeout - (time.monotonic() - began)
            if left <= 0:
                raise NotReadyInTime(record, timeout)
            yield Pause(min(pause, left))
            pause = min(2.0, pause * 1.5)

    def get(self, id: str, *, collection: str | None = None) -> Steps[Record]:
        """One record, with its `etag`. `collection` is needed where several that you see have the id."""
        reply = yield from self._sent(Ask("GET", _audio(id), {"collection": collection}))
        return _with_etag(reply)

    def page(
        self,
        *,
        collection: str | None = None,
        status: str | None = None,
        filter: Mapping[str, Any] | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Steps[Page]:
        """One page of `list`, of at most `limit` records: the first, or the one that `next_cursor` named."""
        params = {"collection": collection, "status": status, "limit": limit, "cursor": cursor}
        if filter is not None:
            params["filter"] = _as_json(filter)
        return _parsed(Page, (yield from self._sent(Ask("GET", "/audio", params))))

    def update(
        self,
        id: str,
        change: Mapping[str, Any],
        *,
        collection: str | None = None,
        if_match: str | None = None,
    ) -> Steps[Record]:
        """Change a record's `metadata` and `lang` by a JSON merge patch (RFC 7396): `{"metadata": {"show":
        "news", "draft": None}}` sets one member and removes another.

        With `if_match` (an `etag`) only if nobody changed it since, else PreconditionFailed. Only then is a
        change sent again when its answer was lost; without, it might undo what somebody else did meanwhile.
        """
        ask = Ask(
            "PATCH",
            _audio(id),
            {"collection": collection},
            {"Content-Type": "application/merge-patch+json", **_if_match(if_match)},
            json=change,
            repeatable=if_match is not None,
        )
        try:
            return _with_etag((yield from self._sent(ask)))
        except PreconditionFailed:
            if not ask.uncertain:
                raise
            record = yield from self.get(id, collection=collection)
            as_it_is = {"lang": record.lang, "metadata": record.metadata}
            if not _holds(change, {name: value for name, value in as_it_is.items() if value}):
                raise
            return record  # it was the answer that got lost

    def delete(self, id: str, *, collection: str | None = None, if_match: str | None = None) -> Steps[None]:
        """Forget a recording: it is never a hit again. Raises NotFound where there is none."""
        ask = Ask("DELETE", _audio(id), {"collection": collection}, _if_match(if_match))
        try:
            yield from self._sent(ask)
        except NotFound:
            if not ask.uncertain:  # else it was the answer that got lost
                raise

    def delete_matching(
        self,
        *,
        filter: Mapping[str, Any] | None = None,
        status: str | None = None,
        collection: str | None = None,
        all: bool = False,
        dry_run: bool = False,
        limit: int | None = None,
    ) -> Steps[Deletion]:
        """Forget all recordings that match, oldest first, or `limit` of them.

        To forget everything (that the key sees, of a `collection`) say `all` and give neither filter nor
        status; with `dry_run` they are only counted. Not sent again where its answer was lost: look what is
        left.
        """
        body = {"filter": filter, "status": status, "collection": collection, "limit": limit}
        body |= {"all": all or None, "dry_run": dry_run or None}
        ask = Ask("POST", "/audio/delete", json=_given(body), repeatable=False)
        done = _parsed(Deletion, (yield from self._sent(ask)))
        matched, deleted = done.matched, done.deleted
        while done.more and not dry_run and limit is None:  # the service does so many in a call
            done = _parsed(Deletion, (yield from self._sent(ask)))
            deleted += done.deleted
        return Deletion(matched, deleted, done.more)

    def content(
        self,
        id: str,
        to: str | os.PathLike[str] | BinaryIO,
        *,
        collection: str | None = None,
        progress: Progress | None = None,
    ) -> Steps[Record]:
        """Write the uploaded bytes to a path, or into a file open for writing bytes; the record they are of.

        A broken connection is taken up where it broke. A path gets the whole recording or nothing: what has
        come lies beside it, in a `.part` file that the next call goes on with. What comes is compared with
        the record's sha256.
        """
        record = yield from self.get(id, collection=collection)
        ask = Ask("GET", f"{_audio(id)}/content", {"collection": collection}, {"Accept-Encoding": "identity"})
        if not isinstance(to, str | os.PathLike):
            ask.sink = Sink(to, record.sha256, record.size_bytes, progress)
            yield from self._sent(ask)
            ask.sink.check()
            return record
        path = Path(to)
        part = path.with_name(f"{path.name}.{record.sha256[:12]}.part")
        with part.open("a+b") as file:
            ask.sink = Sink(file, record.sha256, record.size_bytes, progress)
            yield Work(ask.sink.take_over)
            if not ask.sink.is_full:
                yield from self._sent(ask)
        try:
            ask.sink.check()
        except UnexpectedAnswer:
            part.unlink()
            raise
        part.replace(path)
        return record

    def waveform(
        self,
        id: str,
        *,
        points: int = 400,
        start_s: float | None = None,
        end_s: float | None = None,
        collection: str | None = None,
    ) -> Steps[Waveform]:
        """How loud a recording is over time, in at most so many `points`. NotFound with the code
        `no_waveform` where that was not kept."""
        params = {"points": points, "start_s": start_s, "end_s": end_s, "collection": collection}
        return _parsed(Waveform, (yield from self._sent(Ask("GET", f"{_audio(id)}/waveform", params))))

    def collections(self) -> Steps[tuple[Collection, ...]]:
        """The collections that the key may see, with what is in them."""
        return tuple(_all(Collection, "items", (yield from self._sent(Ask("GET", "/collections")))))

    # --- search

    def search(
        self,
        q: str,
        *,
        lang: str | None = None,
        limit: int = 10,
        collection: str | None = None,
        min_score: MinScore | None = None,
        group_by: GroupBy = "recording",
        filter: Mapping[str, Any] | None = None,
    ) -> Steps[SearchAnswer]:
        """Find recordings by a question in any language. `Question` says what the options mean."""
        return (yield from self._found(Question(q, lang, limit, collection, min_score, group_by, filter)))

    def like(
        self,
        id: str,
        *,
        at_s: float | None = None,
        like_collection: str | None = None,
        limit: int = 10,
        collection: str | None = None,
        min_score: MinScore | None = None,
        group_by: GroupBy = "recording",
        filter: Mapping[str, Any] | None = None,
    ) -> Steps[SearchAnswer]:
        """Find recordings that say what one of them says, or what its segment at the second `at_s` says.
        `like_collection` is needed where several collections have the id; `collection` is where to look."""
        question = Question(
            None, None, limit, collection, min_score, group_by, filter, id, at_s, like_collection
        )
        return (yield from self._found(question))

    def _found(self, question: Question) -> Steps[SearchAnswer]:
        # in a body, since proxies bound and log addresses
        return _parsed(SearchAnswer, (yield from self._sent(Ask("POST", "/search", json=question.body()))))

    def search_many(self, questions: Sequence[Question | str]) -> Steps[tuple[SearchAnswer, ...]]:
        """The answers to any number of questions, in their order; a hundred go at once."""
        bodies = [(Question(q) if isinstance(q, str) else q).body() for q in questions]
        answers: list[SearchAnswer] = []
        for start in range(0, len(bodies), MAX_QUESTIONS):
            ask = Ask("POST", "/search", json={"queries": bodies[start : start + MAX_QUESTIONS]})
            answers += _all(SearchAnswer, "results", (yield from self._sent(ask)))
        return tuple(answers)

    def search_audio(
        self,
        recording: Recording,
        *,
        lang: str | None = None,
        limit: int = 10,
        collection: str | None = None,
        min_score: MinScore | None = None,
        group_by: GroupBy = "recording",
        progress: Progress | None = None,
    ) -> Steps[SearchAnswer]:
        """Find recordings that say what this one says (a path, bytes or an open file). It is not kept."""
        params = {"lang": lang, "limit": limit, "collection": collection, "min_score": min_score}
        ask = Ask(
            "POST", "/search/audio", params | {"group_by": group_by}, source=Source(recording, progress)
        )
        return _parsed(SearchAnswer, (yield from self._sent(ask)))

    # --- the service

    def health(self) -> Steps[None]:
        """Raises where the service is not alive; asked once."""
        yield from self._sent(Ask("GET", "/healthz", patient=False))

    def ready(self) -> Steps[Readiness]:
        """What the service looked at; raises Unavailable where it cannot answer questions now; asked once."""
        return _parsed(Readiness, (yield from self._sent(Ask("GET", "/readyz", patient=False))))

    # --- inside

    def _sent(self, ask: Ask) -> Steps[Reply]:
        """An answer of success, however often it takes. Raises ServiceError, ConnectionFailed or
        UnexpectedAnswer."""
        patience = Patience(self._retries)
        while True:
            had = ask.sink.offset if ask.sink else 0
            error: ClaspError
            cause: Exception | None = None
            begun, after_s = True, None
            try:
                reply = yield ask
                assert reply is not None
                if 200 <= reply.status < 300:
                    return reply
                error = _error(reply)
                again = reply.status in _TRY_AGAIN
                if isinstance(error, ServiceError):
                    again = again or error.code == "idempotency_in_flight"
                    begun, after_s = reply.status != 429, error.retry_after
            except httpx.RequestError as failure:
                kind = TimedOut if isinstance(failure, httpx.TimeoutException) else ConnectionFailed
                error = kind(f"{ask.method} {ask.path}: {failure or type(failure).__name__}")
                cause = failure
                again = isinstance(failure, httpx.TransportError) and not isinstance(failure, _OUR_FAULT)
                begun = not isinstance(failure, _NEVER_BEGUN)
            if ask.sink and ask.sink.offset > had:
                patience.renew()
            again = again and ask.patient and (ask.repeatable or not begun)
            again = again and (ask.source is None or ask.source.can_be_sent)
            pause = patience.pause_s(after_s) if again else None
            if pause is None:
                raise error from cause
            ask.uncertain = ask.uncertain or begun
            yield Pause(pause)


def _audio(id: str) -> str:
    return f"/audio/{quote(id, safe='')}"


def _if_match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"If-Match": etag}


def _given(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def _as_json(value: object) -> str:
    return as_json(value).decode()


def as_json(value: object) -> bytes:
    """Compact JSON; times as RFC 3339 has them. Raises ValueError for what JSON cannot have."""

    def plain(odd: object) -> object:
        if isinstance(odd, datetime):
            return odd.isoformat()
        if isinstance(odd, Mapping):
            return dict(odd)
        raise TypeError(f"{type(odd).__name__} is no JSON")

    return json.dumps(
        value, ensure_ascii=False, separators=(",", ":"), default=plain, allow_nan=False
    ).encode()


def _json(reply: Reply) -> object:
    try:
        return json.loads(reply.content)
    except ValueError:
        raise _unexpected(reply) from None


def _parsed(kind: type[T], reply: Reply) -> T:
    return _as(kind, _json(reply))


def _as(kind: type[T], value: object) -> T:
    try:
        return parse(kind, value)
    except ValueError as error:
        raise UnexpectedAnswer(str(error)) from None


def _all(kind: type[T], member: str, reply: Reply) -> list[T]:
    """Those in a list that is a member of the answer."""
    body = _json(reply)
    if not isinstance(body, dict) or not isinstance(body.get(member), list):
        raise _unexpected(reply)
    return [_as(kind, item) for item in body[member]]


def _with_etag(reply: Reply) -> Record:
    return replace(_parsed(Record, reply), etag=reply.headers.get("etag"))


def _unexpected(reply: Reply) -> UnexpectedAnswer:
    kind = reply.headers.get("content-type", "no type")
    return UnexpectedAnswer(
        f"The answer ({reply.status}, {kind}) is not clasp-search's: is the address right?"
    )


def _error(reply: Reply) -> ClaspError:
    if reply.status < 400:  # a redirect, say, which nobody is followed to with a key
        return _unexpected(reply)
    try:
        problem = json.loads(reply.content)
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    code = problem.get("code")
    return error_class(reply.status, code)(
        reply.status,
        code=code,
        detail=problem.get("detail") or problem.get("title") or "",
        request_id=problem.get("request_id") or reply.headers.get("x-request-id"),
        retry_after=retry_after_s(reply.headers),
        errors=tuple(problem.get("errors") or ()),
    )


def _holds(patch: object, value: object) -> bool:
    """Whether a JSON merge patch would change nothing."""
    if not isinstance(patch, Mapping):
        return patch == value
    return isinstance(value, Mapping) and all(
        name not in value if wanted is None else _holds(wanted, value.get(name, {}))
        for name, wanted in patch.items()
    )
