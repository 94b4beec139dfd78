"""The shapes of requests and answers, as the API description shows them."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from app.answering import Answer
from clasp_core.calibration import calibration_of
from clasp_core.catalog import Filter, Recording
from clasp_core.errors import NotCalibrated
from clasp_core.library import MAX_HITS

Status = Literal["pending", "processing", "ready", "failed"]
MAX_QUERY_CHARACTERS = 2000
MAX_QUERIES = 100


class RecordingError(BaseModel):
    code: str
    detail: str


class Links(BaseModel):
    self_: Annotated[str, Field(serialization_alias="self")]
    content: str


class RecordingBody(BaseModel):
    """A recording as it stands."""

    id: str
    status: Status
    duration_s: float | None
    segments: Annotated[int | None, Field(description="How many searchable segments it has.")]
    lang: str | None
    collection: str
    metadata: dict[str, Any]
    sha256: str
    size_bytes: int
    media_type: str | None
    created_at: datetime
    error: Annotated[RecordingError | None, Field(description="Why it cannot be searched, when `failed`.")]
    links: Links
    duplicate: Annotated[
        bool | None, Field(description="True where an upload's bytes were in this collection already.")
    ] = None

    @classmethod
    def of(cls, recording: Recording, *, duplicate: bool | None = None) -> "RecordingBody":
        error = None
        if recording.error_code is not None:
            error = RecordingError(code=recording.error_code, detail=recording.error_detail or "")
        return cls(
            id=recording.id,
            status=recording.status,
            duration_s=recording.duration_s,
            segments=recording.segments,
            lang=recording.lang,
            collection=recording.collection,
            metadata=dict(recording.metadata),
            sha256=recording.sha256,
            size_bytes=recording.size_bytes,
            media_type=recording.media_type,
            created_at=recording.created_at.replace(tzinfo=UTC),
            error=error,
            links=links(recording),
            duplicate=duplicate,
        )


def links(recording: Recording) -> Links:
    return Links(self_=f"/audio/{recording.id}", content=f"/audio/{recording.id}/content")


class RecordingPage(BaseModel):
    items: list[RecordingBody]
    next_cursor: Annotated[str | None, Field(description="Give it as `cursor` for the next page.")]


_FilterText = Annotated[str, Field(max_length=MAX_QUERY_CHARACTERS)]
"""A stated length also makes pydantic look at the characters, and refuse lone surrogates."""


class FilterBody(BaseModel):
    """Only recordings for which everything given here is true."""

    model_config = ConfigDict(extra="forbid")

    lang: str | None = None
    metadata: Annotated[
        dict[_FilterText, _FilterText | int | float | bool],
        Field(
            max_length=32,
            description="Members of the recordings' metadata that must have exactly these values.",
        ),
    ] = {}


def _number_or_auto(given: object, number: Callable[[object], float]) -> object:
    if isinstance(given, bool):  # which pydantic takes for 0 or 1
        raise ValueError("Input should be a number or auto")
    return given if given == "auto" else number(given)


class _NumberOrAuto:
    """One type to pydantic, whose errors then point at the field and not into a union."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            _number_or_auto,
            core_schema.float_schema(ge=-1, le=1),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            "anyOf": [{"type": "number", "minimum": -1, "maximum": 1}, {"type": "string", "const": "auto"}]
        }


MinScore: TypeAlias = Annotated[float | Literal["auto"], _NumberOrAuto()]
MIN_SCORE = (
    "Only hits with this score or more. `auto`: only those that are likely enough to be right, by what was"
    " measured of the model in the question's language (`lang`) and with so much to search."
)


class SearchBody(BaseModel):
    """One question."""

    model_config = ConfigDict(extra="forbid")

    q: Annotated[str, Field(max_length=MAX_QUERY_CHARACTERS)]
    lang: Annotated[
        str | None,
        Field(description="BCP 47 tag of the question: a hint for normalising it, never a filter."),
    ] = None
    limit: Annotated[int, Field(ge=1, le=MAX_HITS)] = 10
    collection: str | None = None
    min_score: Annotated[MinScore | None, Field(description=MIN_SCORE)] = None
    filter: FilterBody = FilterBody()


class SearchesBody(BaseModel):
    """Several questions at once."""

    model_config = ConfigDict(extra="forbid")

    queries: Annotated[list[SearchBody], Field(min_length=1, max_length=MAX_QUERIES)]


class QueryEcho(BaseModel):
    text: Annotated[str | None, Field(description="As asked; null where the query was a recording.")]
    lang: str | None
    normalized: Annotated[str | None, Field(description="What was searched for.")]


class ModelEcho(BaseModel):
    name: str
    fingerprint: str


class Took(BaseModel):
    """Milliseconds."""

    encode: float
    search: float
    total: float


class SegmentBody(BaseModel):
    start_s: float
    end_s: float
    score: float
    transcript: Annotated[
        str | None,
        Field(
            exclude_if=lambda transcript: transcript is None,
            description="What is said there, as the model heard it; absent where it wrote nothing down.",
        ),
    ] = None


class HitLinks(BaseModel):
    content: str


class HitBody(BaseModel):
    rank: int
    id: str
    score: Annotated[float, Field(description="Cosine of the query and the recording's best segment.")]
    confidence: Annotated[
        float | None,
        Field(
            exclude_if=lambda confidence: confidence is None,
            description="Probability that a best hit with this score is right, where every second question"
            " has an answer; absent where nobody measured it (and for questions by sound).",
        ),
    ] = None
    segments: Annotated[list[SegmentBody], Field(description="The matching segments, best first.")]
    lang: str | None
    collection: str
    duration_s: float | None
    metadata: dict[str, Any]
    links: HitLinks


class SearchAnswer(BaseModel):
    query: QueryEcho
    model: ModelEcho
    took_ms: Took
    hits: list[HitBody]

    @classmethod
    def of(
        cls,
        query: QueryEcho,
        answer: Answer,
        total_s: float,
        min_score: float | Literal["auto"] | None = None,
    ) -> "SearchAnswer":
        """Raises NotCalibrated where `min_score` is "auto" and the model's scores were not measured."""
        in_words = query.normalized is not None
        try:
            calibration = calibration_of(answer.model)
        except NotCalibrated:
            if min_score == "auto":
                raise
            calibration = None
        shown = [
            hit
            for hit in answer.hits
            if calibration is None
            or min_score != "auto"
            or hit.score >= calibration.min_score(query.lang, hit.among, by_sound=not in_words)
        ]
        hits = [
            HitBody(
                rank=hit.rank,
                id=hit.recording.id,
                score=hit.score,
                confidence=calibration.confidence(hit.score, query.lang, hit.among)
                if calibration is not None and in_words
                else None,
                segments=[
                    SegmentBody(
                        start_s=round(s.start_s, 3),
                        end_s=round(s.end_s, 3),
                        score=s.score,
                        transcript=s.transcript,
                    )
                    for s in hit.segments
                ],
                lang=hit.recording.lang,
                collection=hit.recording.collection,
                duration_s=hit.recording.duration_s,
                metadata=dict(hit.recording.metadata),
                links=HitLinks(content=links(hit.recording).content),
            )
            for hit in shown
        ]
        took = {"encode": answer.encode_s, "search": answer.search_s, "total": total_s}
        return cls(
            query=query,
            model=ModelEcho(name=answer.model.name, fingerprint=answer.model.fingerprint),
            took_ms=Took(**{stage: round(1000 * seconds, 3) for stage, seconds in took.items()}),
            hits=hits,
        )


class SearchAnswers(BaseModel):
    results: list[SearchAnswer]


class ProblemBody(BaseModel):
    """Every error, from every layer (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: Annotated[str, Field(description="Stable; docs/errors.md lists them.")]
    request_id: str
    errors: list[dict[str, str]] | None = None


def filter_of(body: FilterBody, within: frozenset[str] | None) -> Filter:
    return Filter(within=within, lang=body.lang, metadata=tuple(sorted(body.metadata.items())))
