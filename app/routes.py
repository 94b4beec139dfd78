"""Every endpoint, thin: what HTTP says is turned into calls of the library, and back."""

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import orjson
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BeforeValidator
from starlette.concurrency import run_in_threadpool
from starlette.responses import MalformedRangeHeader, RangeNotSatisfiable

from app import schemas, uploads
from app.access import Admin, Reader, Writer, destination, visible
from app.answering import Answer, EngineChanged
from app.errors import HttpError, problem
from app.schemas import (
    MAX_QUERY_CHARACTERS,
    MIN_SCORE,
    FilterBody,
    MinScore,
    QueryEcho,
    RecordingBody,
    RecordingPage,
    SearchAnswer,
    SearchAnswers,
    SearchBody,
    SearchesBody,
    Status,
)
from app.service import Service
from clasp_core.access import Grant
from clasp_core.catalog import Recording
from clasp_core.errors import DataDamaged, EmptyQuery, InvalidField, RecordingNotFound
from clasp_core.language import canonical_tag, normalize_text
from clasp_core.library import MAX_HITS, Question
from clasp_core.types import Seconds

MAX_WAIT_S: Seconds = 60.0
MAX_METADATA_BYTES = 32 * 1024
MAX_METADATA_DEPTH = 32

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


def _form(fields: dict[str, Any]) -> dict[str, Any]:
    recording = {"file": {"type": "string", "format": "binary"}}
    form = {"type": "object", "required": ["file"], "properties": recording | fields}
    return {
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, "audio/*": _BINARY},
        }
    }


def get_service(request: Request) -> Service:
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
    openapi_extra=_form(_FORM_FIELDS),
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
) -> Response:
    wait_s = _preferred_wait(prefer)
    given = {"id": id, "lang": lang, "collection": collection, "metadata": metadata}
    library = service.library
    async with uploads.receive(request, library.store, service.settings.max_upload_bytes) as received:
        fields = {name: value for name, value in given.items() if value is not None} | received.fields
        recording, created = await run_in_threadpool(
            library.register,
            received.upload,
            recording_id=fields.get("id"),
            collection=destination(grant, fields.get("collection")),
            lang=fields.get("lang") or None,
            media_type=received.media_type,
            metadata=_metadata(fields.get("metadata")),
            within=grant.collections,
        )
    headers = {"Location": f"/audio/{recording.id}"}
    if not created:
        return _json(RecordingBody.of(recording, duplicate=True), 200, headers)
    if wait_s is not None:
        headers["Preference-Applied"] = f"wait={wait_s:g}"
        recording = await _settled(service, recording, wait_s)
    status = 201 if recording.status == "ready" else 202
    return _json(RecordingBody.of(recording), status, headers)


@api.get("/audio", summary="List recordings, newest first")
def list_recordings(
    service: ServiceHere,
    grant: Reader,
    collection: OptionalText = None,
    status: OptionalStatus = None,
    limit: Annotated[int, Query(ge=1, le=MAX_HITS)] = 100,
    cursor: str | None = None,
) -> RecordingPage:
    found, following = service.library.page(
        status=status, cursor=cursor, limit=limit, within=visible(grant, collection)
    )
    return RecordingPage(items=[RecordingBody.of(recording) for recording in found], next_cursor=following)


@api.get("/audio/{id}", summary="One recording")
def get_recording(
    service: ServiceHere, grant: Reader, id: str, collection: Collection = None
) -> RecordingBody:
    return RecordingBody.of(service.library.catalog.get(id, within=visible(grant, collection)))


@api.get(
    "/audio/{id}/content",
    summary="The uploaded bytes",
    response_class=FileResponse,
    responses={
        200: {"content": {"audio/*": _BINARY}},
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
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    recording = service.library.catalog.get(id, within=visible(grant, collection))
    etag = f'"{recording.sha256}"'
    known = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
    if known & {etag, "*"}:
        return Response(status_code=304, headers={"ETag": etag})
    path = service.library.store.path(recording.sha256)
    try:
        stat = path.stat()
    except FileNotFoundError:
        service.library.catalog.get(id, within=visible(grant, collection))  # it may be deleted by now
        raise DataDamaged(f"The bytes of recording {id!r} are missing. Upload it again.") from None
    if stat.st_size != recording.size_bytes:
        raise DataDamaged(f"The bytes of recording {id!r} are damaged. Upload it again.")
    media_type = recording.media_type or "application/octet-stream"
    return _Content(path, media_type=media_type, headers={"ETag": etag}, stat_result=stat)


class _Content(FileResponse):
    """A file in byte ranges. One that cannot be read is no range (RFC 9110, 14.2); errors are in our form."""

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
def delete_recording(service: ServiceHere, grant: Writer, id: str, collection: Collection = None) -> Response:
    service.library.delete(id, within=visible(grant, collection))
    return Response(status_code=204)


# --- search


@api.get("/search", summary="Find recordings by a question in any language")
async def search(
    service: ServiceHere,
    grant: Reader,
    q: Annotated[str, Query(max_length=MAX_QUERY_CHARACTERS)],
    lang: Annotated[
        str | None, Query(description="BCP 47 tag of the question: a hint, never a filter.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_HITS)] = 10,
    collection: OptionalText = None,
    min_score: OptionalScore = None,
) -> SearchAnswer:
    body = SearchBody(q=q, lang=lang, limit=limit, collection=collection, min_score=min_score)
    return await _answer(service, grant, body)


@api.post("/search", summary="One question with filters, or several questions")
async def search_json(
    service: ServiceHere, grant: Reader, body: SearchBody | SearchesBody
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
) -> SearchAnswer:
    started = time.perf_counter()
    async with uploads.receive(request, service.library.store, service.settings.max_upload_bytes) as received:
        among = schemas.filter_of(FilterBody(), visible(grant, collection))
        question = Question(limit, among, _number(min_score))
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
        vector = await run_in_threadpool(engine.embed_recording, path, lang)
        encode_s = time.perf_counter() - started
        with contextlib.suppress(EngineChanged):
            answer = await service.answerer.ask(vector, question, made_by=engine)
            return replace(answer, encode_s=encode_s)


async def _answer(service: Service, grant: Grant, body: SearchBody) -> SearchAnswer:
    started = time.perf_counter()
    lang, normalized = _normalized(body)
    narrowed = body.filter.model_copy(update={"lang": canonical_tag(body.filter.lang)})
    among = schemas.filter_of(narrowed, visible(grant, body.collection))
    question = Question(body.limit, among, _number(body.min_score))
    answer = await service.answerer.ask(normalized, question)
    echo = QueryEcho(text=body.q, lang=lang, normalized=normalized)
    return SearchAnswer.of(echo, answer, time.perf_counter() - started, body.min_score)


def _normalized(body: SearchBody) -> tuple[str | None, str]:
    lang = canonical_tag(body.lang)
    normalized = normalize_text(body.q, lang)
    if not normalized:
        raise EmptyQuery("The question is empty.")
    return lang, normalized


def _number(min_score: float | Literal["auto"] | None) -> float | None:
    """What the library can narrow by; `auto` is for the answer, which knows its model."""
    return None if min_score == "auto" else min_score


# --- operation


@operations.get("/healthz", summary="Alive")
async def alive() -> dict[str, str]:
    return {"status": "ok"}


@operations.get("/readyz", summary="Ready to answer")
async def ready(service: ServiceHere) -> Response:
    if (reason := await run_in_threadpool(service.why_not_ready)) is not None:
        return problem("not_ready", reason)
    return JSONResponse({"status": "ready", "model": service.model.fingerprint})


@operations.get("/metrics", summary="Prometheus metrics")
def metrics(service: ServiceHere, _: Admin) -> Response:
    service.observe_library()
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


# --- inside


def _json(body: RecordingBody, status: int, headers: dict[str, str]) -> Response:
    content = orjson.dumps(body.model_dump(mode="json", by_alias=True))
    return Response(content, status, headers, media_type="application/json")


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
    if _is_deeper(value, MAX_METADATA_DEPTH):
        raise InvalidField(f"metadata is nested more than {MAX_METADATA_DEPTH} levels deep.")
    return value


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


async def _settled(service: Service, recording: Recording, wait_s: Seconds) -> Recording:
    """The recording once it is ready or failed, or as it is when the time is over."""
    deadline = time.monotonic() + wait_s
    while recording.status in ("pending", "processing") and time.monotonic() < deadline:
        await anyio.sleep(0.05)
        try:
            recording = await run_in_threadpool(
                service.library.catalog.get, recording.id, within={recording.collection}
            )
        except RecordingNotFound:
            raise HttpError(
                "recording_not_found", "The recording was deleted while it was waited for."
            ) from None
    return recording
