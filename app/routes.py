"""Every endpoint, thin: what HTTP says is turned into calls of the library, and back."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import anyio
import orjson
import structlog
from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, BeforeValidator, ValidationError, WithJsonSchema
from starlette.concurrency import run_in_threadpool
from starlette.responses import MalformedRangeHeader, RangeNotSatisfiable

from app import schemas, uploads
from app.access import (
    Admin,
    Anyone,
    Gate,
    Reader,
    Writer,
    destination,
    drop_cookie,
    refuse_other_origins,
    set_cookie,
    visible,
)
from app.answering import Answer, EngineChanged
from app.errors import HttpError, problem
from app.preconditions import etag_of, is_among, operation_name, require, unless_known
from app.schemas import (
    GROUP_BY,
    MAX_QUERY_CHARACTERS,
    MIN_SCORE,
    CollectionBody,
    CollectionList,
    DeletionAnswer,
    DeletionBody,
    FilterBody,
    MinScore,
    QueryEcho,
    ReadyBody,
    RecordingBody,
    RecordingPage,
    RecordingPatch,
    SearchAnswer,
    SearchAnswers,
    SearchBody,
    Searching,
    SessionBody,
    SessionKey,
    Status,
    WaveformBody,
)
from app.service import Service
from clasp_core.access import Grant
from clasp_core.catalog import Recording
from clasp_core.errors import DatabaseUnavailable, DataDamaged, EmptyQuery, InvalidField, RecordingNotFound
from clasp_core.index import Grouping
from clasp_core.language import canonical_tag, normalize_text
from clasp_core.library import MAX_HITS, Question
from clasp_core.limits import Admission
from clasp_core.store import Stored
from clasp_core.tracing import span
from clasp_core.types import Seconds

_log = structlog.get_logger()

MAX_WAIT_S: Seconds = 60.0
MAX_METADATA_BYTES = 32 * 1024
MAX_METADATA_DEPTH = 32
MAX_POINTS = 10_000

PROBLEM: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "Any error.",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}}},
    }
}
# A query parameter left empty, as an HTML form sends it (`&collection=`), is one not given.
_EMPTY_IS_ABSENT = BeforeValidator(lambda given: None if given == "" else given)
OptionalText = Annotated[str | None, _EMPTY_IS_ABSENT]
Collection = Annotated[
    str | None,
    Query(description="Where to look; needed where several collections that you see have this id."),
    _EMPTY_IS_ABSENT,
]
OptionalStatus = Annotated[Status | None, _EMPTY_IS_ABSENT]
OptionalScore = Annotated[MinScore | None, Query(description=MIN_SCORE), _EMPTY_IS_ABSENT]

GroupBy = Annotated[Grouping, Query(description=GROUP_BY)]
# Where a header is given several times, all of it counts (or is refused), but clients need not know of that.
_AS_TEXT = WithJsonSchema({"type": "string"})
IfNoneMatch = Annotated[list[str] | None, Header(), _AS_TEXT]
IfMatch = Annotated[
    list[str] | None,
    Header(description="Only if the record's `ETag` is one of these; else 412 `precondition_failed`."),
    _AS_TEXT,
]
IDEMPOTENCY_KEY = (
    "A name for this upload: sent again within 24 hours, with the same recording and fields, it does nothing"
    " and is answered the same, with the record as it is by then."
)
MERGE_PATCH_TYPES = ("application/merge-patch+json", "application/json")
_ETAG = {"ETag": {"description": "Changes whenever the record does.", "schema": {"type": "string"}}}
Parsed = TypeVar("Parsed", bound=BaseModel)

_FORM_FIELDS = {
    "id": {"type": "string", "description": "The recording's id; by default a new UUID."},
    "lang": {"type": "string", "description": "BCP 47 tag of what is spoken."},
    "collection": {
        "type": "string",
        "description": "By default `default`; or the one that the key is for, if it is for one.",
    },
    "metadata": {"type": "string", "description": "A JSON object, kept and returned as it is."},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _form(fields: dict[str, Any], other: dict[str, Any] | None = None) -> dict[str, Any]:
    recording = {"file": {"type": "string", "format": "binary"}}
    form = {"type": "object", "required": ["file"], "properties": recording | fields}
    return {
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, "audio/*": _BINARY} | (other or {}),
        }
    }


async def get_service(request: Request) -> Service:  # not async, it would be given a thread each time
    service: Service = request.app.state.service
    return service


ServiceHere = Annotated[Service, Depends(get_service)]
api = APIRouter(responses=PROBLEM)
operations = APIRouter(responses=PROBLEM)


# --- recordings


@api.post(
    "/audio",
    status_code=202,
    response_model=RecordingBody,
    responses={
        200: {
            "description": "These bytes are in the collection already: the first record.",
            "model": RecordingBody,
        },
        201: {"description": "Searchable (only with `Prefer: wait=SECONDS`).", "model": RecordingBody},
        202: {"description": "Safe on disk, waiting to be embedded."},
    },
    openapi_extra=_form(_FORM_FIELDS, {"application/json": {"schema": uploads.UrlBody.model_json_schema()}}),
    summary="Index a recording",
)
async def upload_recording(
    request: Request,
    service: ServiceHere,
    grant: Writer,
    id: Annotated[str | None, Query(description="With a raw body; else a form field.")] = None,
    lang: Annotated[str | None, Query(description="With a raw body; else a form field.")] = None,
    collection: Annotated[str | None, Query(description="With a raw body; else a form field.")] = None,
    metadata: Annotated[str | None, Query(description="With a raw body; else a form field.")] = None,
    prefer: Annotated[str | None, Header(description="`wait=SECONDS` (RFC 7240), at most 60.")] = None,
    idempotency_key: Annotated[list[str] | None, Header(description=IDEMPOTENCY_KEY), _AS_TEXT] = None,
) -> Response:
    wait_s = _preferred_wait(prefer)
    once = operation_name(grant.name, idempotency_key or [])
    given = {"id": id, "lang": lang, "collection": collection, "metadata": metadata}
    library, settings = service.library, service.settings
    admission = Admission(grant.key, grant.quota, settings.max_pending)

    def expect(least: int, most: int) -> None:
        library.catalog.expect(least, most, admission, within=grant.collections)

    async with (
        service.in_flight.only(once),
        uploads.receive(
            request,
            library.store,
            settings.max_upload_bytes,
            settings.upload_idle_s,
            expect=expect,
            fetcher=service.fetcher,
        ) as received,
    ):
        fields = {name: value for name, value in given.items() if value is not None} | received.fields
        with span("register"):
            recording, created = await run_in_threadpool(
                library.register,
                received.upload,
                recording_id=fields.get("id"),
                collection=destination(grant, fields.get("collection")),
                lang=fields.get("lang") or None,
                media_type=received.media_type,
                metadata=_metadata(fields.get("metadata")),
                within=grant.collections,
                once=once,
                admission=admission,
            )
    request.scope["recording"] = recording.id
    headers = {"Location": f"/audio/{recording.id}"}
    if not created:
        return _json(RecordingBody.of(recording, duplicate=True), 200, headers)
    if wait_s is not None:
        headers["Preference-Applied"] = f"wait={wait_s:g}"
        recording = await _settled(service, request, recording, wait_s)
    # one that is ready already was uploaded before, by the same request: then the answer is the same, too
    status = 201 if recording.status == "ready" and wait_s is not None else 202
    return _json(RecordingBody.of(recording), status, headers)


@api.get(
    "/audio",
    openapi_extra={
        "parameters": [
            {
                "name": "filter",
                "in": "query",
                "description": "What `filter` of `POST /search` takes; the same for every page. An"
                " address has less than 64 KiB: what is longer can only be searched by.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/FilterBody"}}},
            }
        ]
    },
    summary="List recordings, newest first",
)
def list_recordings(
    service: ServiceHere,
    grant: Reader,
    collection: OptionalText = None,
    status: OptionalStatus = None,
    limit: Annotated[int, Query(ge=1, le=MAX_HITS)] = 100,
    cursor: str | None = None,
    filter: Annotated[str | None, Query(include_in_schema=False), _EMPTY_IS_ABSENT] = None,
) -> RecordingPage:
    body = FilterBody() if filter is None else _parsed(FilterBody, filter, "query", "filter")
    wanted = schemas.filter_of(body, visible(grant, collection))
    found, following = service.library.page(wanted=wanted, status=status, cursor=cursor, limit=limit)
    return RecordingPage(items=[RecordingBody.of(recording) for recording in found], next_cursor=following)


@api.post("/audio/delete", summary="Forget recordings by a filter")
def delete_recordings(service: ServiceHere, grant: Writer, body: DeletionBody) -> DeletionAnswer:
    body.check()
    library = service.library
    wanted = schemas.filter_of(body.filter, visible(grant, body.collection))
    matched = library.catalog.count(wanted, status=body.status)
    if body.dry_run:
        return DeletionAnswer(matched=matched, deleted=0, more=matched > 0)
    deleted = library.delete_matching(wanted, status=body.status, limit=body.limit)
    more = deleted == body.limit and library.catalog.count(wanted, status=body.status) > 0
    return DeletionAnswer(matched=matched, deleted=deleted, more=more)


@api.get(
    "/audio/{id}",
    response_model=RecordingBody,
    responses={200: {"headers": _ETAG}, 304: {"description": "It is as `If-None-Match` says."}},
    summary="One recording",
)
def get_recording(
    service: ServiceHere,
    grant: Reader,
    id: str,
    collection: Collection = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    answer = _record(service.library.catalog.get(id, within=visible(grant, collection)))
    if is_among(etag := answer.headers["ETag"], if_none_match or []):
        return Response(status_code=304, headers={"ETag": etag})
    return answer


@api.patch(
    "/audio/{id}",
    response_model=RecordingBody,
    responses={200: {"description": "The record as it is now.", "headers": _ETAG}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": RecordingPatch.model_json_schema()} for kind in MERGE_PATCH_TYPES},
        }
    },
    summary="Change a recording's lang and metadata (JSON merge patch)",
)
async def patch_recording(
    request: Request,
    service: ServiceHere,
    grant: Writer,
    id: str,
    collection: Collection = None,
    if_match: IfMatch = None,
) -> Response:
    within = visible(grant, collection)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in MERGE_PATCH_TYPES:
        raise HttpError("unsupported_media_type", f"Send the change as {' or '.join(MERGE_PATCH_TYPES)}.")
    patch = _parsed(RecordingPatch, await request.body(), "body")
    if _is_deeper(patch.metadata, MAX_METADATA_DEPTH):  # before it is walked through
        raise InvalidField(f"metadata is nested more than {MAX_METADATA_DEPTH} levels deep.")

    def change(recording: Recording) -> tuple[str | None, dict[str, Any]]:
        _check(recording, if_match)
        lang, metadata = patch.apply(recording)
        _bounded(metadata)
        return lang, metadata

    request.scope["recording"] = id
    return _record(await run_in_threadpool(service.library.amend, id, change, within=within))


@api.get(
    "/audio/{id}/content",
    summary="The uploaded bytes",
    response_class=FileResponse,
    responses={
        200: {"content": {"audio/*": _BINARY, "application/octet-stream": _BINARY}},
        206: {"description": "The byte range that was asked for."},
        304: {"description": "The client has these bytes: the ETag is one that `If-None-Match` names."},
    },
)
@api.head("/audio/{id}/content", include_in_schema=False)
def get_content(
    service: ServiceHere,
    grant: Reader,
    id: str,
    collection: Collection = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    recording = service.library.catalog.get(id, within=visible(grant, collection))
    etag = f'"{recording.sha256}"'
    if is_among(etag, if_none_match or []):
        return Response(status_code=304, headers={"ETag": etag})
    try:
        stored = service.library.store.find(recording.sha256)
    except FileNotFoundError:
        service.library.catalog.get(id, within=visible(grant, collection))  # it may be deleted by now
        raise DataDamaged(f"The bytes of recording {id!r} are missing. Upload it again.") from None
    if stored.size_bytes != recording.size_bytes:
        raise DataDamaged(f"The bytes of recording {id!r} are damaged. Upload it again.")
    media_type = recording.media_type or "application/octet-stream"
    return _Content(stored, media_type, etag)


@api.get(
    "/audio/{id}/waveform",
    response_model=WaveformBody,
    responses={200: {"headers": _ETAG}, 304: {"description": "It is as `If-None-Match` says."}},
    summary="What its waveform is drawn from",
)
def get_waveform(
    service: ServiceHere,
    grant: Reader,
    id: str,
    points: Annotated[int, Query(ge=1, le=MAX_POINTS, description="How many peaks at most.")] = 400,
    start_s: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0,
    end_s: Annotated[
        float | None, Query(ge=0, allow_inf_nan=False, description="By default the end."), _EMPTY_IS_ABSENT
    ] = None,
    collection: Collection = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    if end_s is not None and end_s < start_s:
        raise InvalidField("end_s is before start_s.")
    recording, kept = service.library.catalog.waveform(id, within=visible(grant, collection))
    length_s = recording.duration_s or 0.0
    from_s, to_s, peaks = kept.between(start_s, length_s if end_s is None else min(end_s, length_s), points)
    body = WaveformBody(
        start_s=round(from_s, 3), end_s=round(min(to_s, length_s), 3), peaks=peaks.round(4).tolist()
    )
    kept_by_the_client = {"Cache-Control": "private, no-cache"}
    return unless_known(
        body.model_dump_json().encode(), "application/json", kept_by_the_client, if_none_match or []
    )


class _Content(FileResponse):
    """Stored bytes in ranges. What cannot be read is no range (RFC 9110, 14.2); errors are in our form.

    They are somebody's: whatever a browser takes them for, it is no page of ours, and runs nothing.
    """

    def __init__(self, stored: Stored, media_type: str, etag: str) -> None:
        stat = os.stat_result(
            (0,) * 6 + (stored.size_bytes, 0, stored.modified_at, 0)
        )  # of which two are asked
        headers = {"ETag": etag, "Content-Security-Policy": "sandbox; default-src 'none'"}
        super().__init__("", media_type=media_type, headers=headers, stat_result=stat)
        self._stored = stored

    @contextlib.asynccontextmanager
    async def _open_file(self) -> AsyncIterator[anyio.AsyncFile[bytes]]:
        file = anyio.wrap_file(await run_in_threadpool(self._stored.open))
        try:
            yield file
        finally:
            with anyio.CancelScope(shield=True):  # also where the client has gone
                await file.aclose()

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            return []
        except RangeNotSatisfiable:
            raise HttpError(
                "range_not_satisfiable",
                f"The recording has {file_size} bytes.",
                {"Content-Range": f"bytes */{file_size}"},
            ) from None


@api.delete("/audio/{id}", status_code=204, summary="Forget a recording")
def delete_recording(
    request: Request,
    service: ServiceHere,
    grant: Writer,
    id: str,
    collection: Collection = None,
    if_match: IfMatch = None,
) -> Response:
    service.library.delete(
        id, within=visible(grant, collection), check=lambda recording: _check(recording, if_match)
    )
    request.scope["recording"] = id
    return Response(status_code=204)


@api.get("/collections", summary="Collections, and what is in them")
def list_collections(service: ServiceHere, grant: Reader) -> CollectionList:
    found = service.library.catalog.collections(within=grant.collections)
    return CollectionList(items=[CollectionBody(**one._asdict()) for one in found])


# --- search


@api.get("/search", summary="Find recordings by a question in any language, or by a recording")
async def search(
    service: ServiceHere,
    grant: Reader,
    q: Annotated[
        str | None,
        Query(max_length=MAX_QUERY_CHARACTERS, description="The question; either this or `like` is needed."),
    ] = None,
    like: Annotated[str | None, Query(max_length=128, description=schemas.LIKE), _EMPTY_IS_ABSENT] = None,
    at_s: Annotated[
        float | None, Query(ge=0, allow_inf_nan=False, description=schemas.AT_S), _EMPTY_IS_ABSENT
    ] = None,
    like_collection: Annotated[
        str | None, Query(description=schemas.LIKE_COLLECTION), _EMPTY_IS_ABSENT
    ] = None,
    lang: Annotated[
        str | None, Query(description="BCP 47 tag of the question: a hint, never a filter.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_HITS)] = 10,
    collection: OptionalText = None,
    min_score: OptionalScore = None,
    group_by: GroupBy = "recording",
) -> SearchAnswer:
    given = {
        "q": q,
        "like": like,
        "at_s": at_s,
        "like_collection": like_collection,
        "lang": lang,
        "limit": limit,
        "collection": collection,
        "min_score": min_score,
        "group_by": group_by,
    }
    return await _answer(service, grant, _validated(SearchBody, given, "query"))


@api.post("/search", summary="One question with filters, or several questions")
async def search_json(
    service: ServiceHere, grant: Reader, body: Annotated[Searching, Body()]
) -> SearchAnswer | SearchAnswers:
    if isinstance(body, SearchBody):
        return await _answer(service, grant, body)
    results = await asyncio.gather(*(_answer(service, grant, question) for question in body.queries))
    return SearchAnswers(results=results)


@api.post(
    "/search/audio",
    openapi_extra=_form({"lang": _FORM_FIELDS["lang"]}),
    summary="Find recordings that say what a recording says",
)
async def search_by_recording(
    request: Request,
    service: ServiceHere,
    grant: Reader,
    lang: Annotated[str | None, Query(description="With a raw body; else a form field.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_HITS)] = 10,
    collection: OptionalText = None,
    min_score: OptionalScore = None,
    group_by: GroupBy = "recording",
) -> SearchAnswer:
    settings = service.settings
    service.answerer.check_room()
    started = time.perf_counter()
    async with uploads.receive(
        request, service.library.store, settings.max_upload_bytes, settings.upload_idle_s
    ) as received:
        among = schemas.filter_of(FilterBody(), visible(grant, collection))
        question = Question(limit, among, _number(min_score), group_by)
        lang = canonical_tag(received.fields.get("lang", lang) or None)
        answer = await _answer_to_recording(service, received.upload.path, lang, question, started)
    echo = QueryEcho(text=None, lang=lang, normalized=None)
    return SearchAnswer.of(echo, answer, time.perf_counter() - started, min_score)


async def _answer_to_recording(
    service: Service, path: Path, lang: str | None, question: Question, started: float
) -> Answer:
    """Embeds it again where the library was switched to another model in the middle."""
    while True:
        engine = service.answerer.engine
        with span("embed"):
            vector = await service.answerer.embed(engine, path, lang)
        encode_s = time.perf_counter() - started
        with contextlib.suppress(EngineChanged):
            answer = await service.answerer.ask(vector, question, made_by=engine)
            return replace(answer, encode_s=encode_s)


async def _answer(service: Service, grant: Grant, body: SearchBody) -> SearchAnswer:
    started = time.perf_counter()
    if service.settings.log_questions and body.q is not None:
        _log.info("question", q=body.q, lang=body.lang)
    among = schemas.filter_of(body.filter, visible(grant, body.collection))
    question = Question(body.limit, among, _number(body.min_score), body.group_by)
    if body.like is not None:
        echo = QueryEcho(text=None, lang=None, normalized=None)
        answer = await _answer_to_like(
            service, body.like, body.at_s, visible(grant, body.like_collection), question
        )
    else:
        lang, normalized = _normalized(body.q or "", body.lang)
        echo = QueryEcho(text=body.q, lang=lang, normalized=normalized)
        answer = await service.answerer.ask(normalized, question)
    return SearchAnswer.of(echo, answer, time.perf_counter() - started, body.min_score)


async def _answer_to_like(
    service: Service,
    recording_id: str,
    at_s: Seconds | None,
    within: frozenset[str] | None,
    question: Question,
) -> Answer:
    """Looks its vector up again where the library was switched to another model in the middle."""
    while True:
        engine = service.answerer.engine
        recording, vector = await run_in_threadpool(
            engine.library.direction, recording_id, at_s=at_s, within=within
        )
        with contextlib.suppress(EngineChanged):
            return await service.answerer.ask(vector, replace(question, besides=recording), made_by=engine)


def _normalized(text: str, lang: str | None) -> tuple[str | None, str]:
    lang = canonical_tag(lang)
    normalized = normalize_text(text, lang)
    if not normalized:
        raise EmptyQuery("The question is empty.")
    return lang, normalized


def _number(min_score: float | Literal["auto"] | None) -> float | None:
    """What the library can narrow by; `auto` is for the answer, which knows its model."""
    return None if min_score == "auto" else min_score


# --- sessions of browsers


@api.get("/session", summary="Who is asking, and what they may do")
def get_session(grant: Anyone, response: Response) -> SessionBody:
    response.headers["Cache-Control"] = "no-store"
    return SessionBody.of(grant)


@api.post(
    "/session",
    status_code=204,
    responses={204: {"description": "The key is valid; the cookie `clasp_key` holds it, if one is needed."}},
    summary="Let a browser present a key as a cookie",
)
async def open_session(request: Request, body: SessionKey) -> Response:
    refuse_other_origins(request.headers)  # which would have somebody upload under their key
    gate: Gate = request.app.state.gate
    grant = await gate.admit(request.scope, body.key)
    answer = Response(status_code=204)
    if grant.name is not None:
        set_cookie(answer, request, body.key, remember=body.remember)
    return answer


@api.delete("/session", status_code=204, summary="Have a browser forget its key")
async def close_session(request: Request) -> Response:
    refuse_other_origins(request.headers)
    answer = Response(status_code=204)
    drop_cookie(answer)
    return answer


# --- operation


@operations.get("/healthz", summary="Alive")
async def alive() -> dict[str, str]:
    return {"status": "ok"}


@operations.get("/readyz", summary="Ready to answer", response_model=ReadyBody)
async def ready(service: ServiceHere) -> Response:
    readiness = service.readiness()
    members: dict[str, Any] = {
        "checks": {name: trouble or "ok" for name, trouble in readiness.checks.items()},
        "degraded": readiness.degraded,
        "age_s": round(readiness.age_s, 1),
    }
    if (reason := readiness.why_not) is not None:
        return problem("not_ready", reason, **members)
    return JSONResponse({"status": "ready", "model": service.model.fingerprint} | members)


@operations.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
def metrics(service: ServiceHere, _: Admin) -> Response:
    service.observe()
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


# --- inside


def _json(body: RecordingBody, status: int, headers: dict[str, str]) -> Response:
    content = body.model_dump_json(by_alias=True)
    return Response(content, status, headers, media_type="application/json")


def _record(recording: Recording) -> Response:
    """The record as `GET` answers it, with the ETag of just that."""
    answer = _json(RecordingBody.of(recording), 200, {})
    answer.headers["ETag"] = etag_of(bytes(answer.body))
    return answer


def _check(recording: Recording, if_match: list[str] | None) -> None:
    if if_match is not None:
        require(_record(recording).headers["ETag"], if_match)


def _parsed(model: type[Parsed], text: str | bytes, *place: str) -> Parsed:
    """JSON as one of our bodies; errors are told as FastAPI tells its own, with their place in the
    request."""
    try:
        given = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        kind = "json_invalid" if place == ("body",) else "json_type"
        raise RequestValidationError([{"type": kind, "loc": place, "msg": f"Not JSON: {error}"}]) from None
    return _validated(model, given, *place)


def _validated(model: type[Parsed], given: object, *place: str) -> Parsed:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        found = [dict(item) | {"loc": (*place, *item["loc"])} for item in error.errors()]
        raise RequestValidationError(found) from None


def _metadata(text: str | None) -> dict[str, Any]:
    if not text:
        return {}
    if len(text.encode()) > MAX_METADATA_BYTES:
        raise InvalidField(f"metadata is larger than {MAX_METADATA_BYTES} bytes.")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidField(f"metadata is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidField("metadata must be a JSON object.")
    _bounded(value)
    return value


def _bounded(metadata: dict[str, Any]) -> None:
    """Raises InvalidField for what is larger or deeper than metadata may be."""
    if _is_deeper(metadata, MAX_METADATA_DEPTH):
        raise InvalidField(f"metadata is nested more than {MAX_METADATA_DEPTH} levels deep.")
    if len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode()) > MAX_METADATA_BYTES:
        raise InvalidField(f"metadata is larger than {MAX_METADATA_BYTES} bytes.")


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    members = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(member, levels - 1) for member in members)


def _preferred_wait(prefer: str | None) -> Seconds | None:
    """The `wait` preference in seconds; other preferences and unusable values are ignored (RFC 7240, 2)."""
    for preference in (prefer or "").replace(";", ",").split(","):
        name, _, value = preference.strip().partition("=")
        if name.strip().lower() == "wait":
            try:
                seconds = float(value.strip().strip('"'))
            except ValueError:
                return None
            return min(seconds, MAX_WAIT_S) if seconds >= 0 else None
    return None


async def _settled(service: Service, request: Request, recording: Recording, wait_s: Seconds) -> Recording:
    """The recording once it is ready or failed, or as it is when the time is over, the client has gone, or
    the service ends."""
    began = time.monotonic()
    while recording.status in ("pending", "processing") and (waited := time.monotonic() - began) < wait_s:
        if service.leaving:
            break
        # rarer and rarer, so that many who wait long are no burden to the catalogue
        await anyio.sleep(min(max(0.05, waited / 8), 0.5, wait_s - waited))
        if await request.is_disconnected():
            break
        try:
            recording = await run_in_threadpool(
                service.library.catalog.get, recording.id, within={recording.collection}
            )
        except RecordingNotFound:
            raise HttpError(
                "recording_not_found", "The recording was deleted while it was waited for."
            ) from None
        except DatabaseUnavailable:  # it is registered all the same
            continue
    return recording
