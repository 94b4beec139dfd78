"""The shapes of requests and answers, as the API description shows them."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
    with_config,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from typing_extensions import TypedDict

from app.answering import Answer
from clasp_core.access import SCOPES, Grant, Scope
from clasp_core.calibration import calibration_of
from clasp_core.catalog import Recording
from clasp_core.errors import InvalidField, NotCalibrated
from clasp_core.filters import Bound, Condition, Filter
from clasp_core.index import Grouping
from clasp_core.language import canonical_tag
from clasp_core.library import MAX_HITS

Status = Literal["pending", "processing", "ready", "failed"]
MAX_QUERY_CHARACTERS = 2000
MAX_QUERIES = 100
MAX_FILTER_VALUES = 1000
MAX_DELETED = 10_000


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


class RecordingPatch(BaseModel):
    """A JSON merge patch (RFC 7396) of a record: `lang` and `metadata`, and nothing else, can be changed."""

    model_config = ConfigDict(extra="forbid")

    lang: Annotated[str | None, Field(description="BCP 47 tag of what is spoken, or null.")] = None
    metadata: Annotated[
        dict[str, Any] | None,
        Field(description="Members to set, or, with null, to remove, at any depth; null removes all."),
    ] = None

    def apply(self, recording: Recording) -> tuple[str | None, dict[str, Any]]:
        """The `lang` and `metadata` that the recording is to have."""
        lang = self.lang if "lang" in self.model_fields_set else recording.lang
        metadata = dict(recording.metadata)
        if "metadata" in self.model_fields_set:
            metadata = {} if self.metadata is None else _merged(metadata, self.metadata)
        return lang, metadata


def _merged(target: object, patch: Any) -> Any:  # noqa: ANN401 - any JSON
    """MergePatch of RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name), value)
    return result


class RecordingPage(BaseModel):
    items: list[RecordingBody]
    next_cursor: Annotated[str | None, Field(description="Give it as `cursor` for the next page.")]


class Either:
    """A union of two as one type: of which form a value is meant to be, `is_second` sees, and errors are told
    of that form alone. Where they are has no step for the union, so that pointers lead into what was sent."""

    def __init__(self, is_second: Callable[[object], bool]) -> None:
        self._is_second = is_second

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        first, second = map(TypeAdapter, get_args(source))
        return core_schema.no_info_wrap_validator_function(
            lambda given, _: (second if self._is_second(given) else first).validate_python(given),
            handler(source),  # describes both
        )


_FilterText = Annotated[str, Field(max_length=MAX_QUERY_CHARACTERS)]
"""A stated length also makes pydantic look at the characters, and refuse lone surrogates."""


_FilterNumber = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True, allow_inf_nan=False)]


def _one_of(kinds: str) -> WrapValidator:
    """One error, instead of one of each member of a union."""

    def validate(given: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(given)
        except ValidationError:
            raise PydanticCustomError("no_value", "Give {kinds}", {"kinds": kinds}) from None

    return WrapValidator(validate)


_A_TEXT = f"a text of at most {MAX_QUERY_CHARACTERS} characters"
_FilterValue = Annotated[_FilterText | _FilterNumber | bool, _one_of(f"{_A_TEXT}, a number, true or false")]
_FilterOrder = Annotated[_FilterText | _FilterNumber, _one_of(f"{_A_TEXT}, or a number")]


def _moment(given: object) -> object:
    """A time with a zone as RFC 3339 writes it, as a time in UTC, in which records have theirs."""
    if isinstance(given, str):
        try:
            when = datetime.fromisoformat(given)
            if when.tzinfo is not None:
                return when.astimezone(UTC)
        except (ValueError, OverflowError):
            pass
    raise PydanticCustomError("no_time", "Give a time such as 2026-03-21T12:00:00Z, with its zone")


_Moment = Annotated[
    datetime, BeforeValidator(_moment), WithJsonSchema({"type": "string", "format": "date-time"})
]
_Length = Annotated[float, Field(allow_inf_nan=False)]

_STRICT = with_config(ConfigDict(extra="forbid"))
_STRICT_SOME = with_config(ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1}))
Operators = TypedDict(
    "Operators",
    {
        "eq": _FilterValue | None,
        "ne": _FilterValue | None,
        "in": Annotated[list[_FilterValue | None], Field(min_length=1, max_length=MAX_FILTER_VALUES)],
        "gt": _FilterOrder,
        "gte": _FilterOrder,
        "lt": _FilterOrder,
        "lte": _FilterOrder,
        "exists": Annotated[bool, Field(strict=True)],
    },
    total=False,
)
OneOf = TypedDict(
    "OneOf", {"in": Annotated[list[_FilterText], Field(min_length=1, max_length=MAX_FILTER_VALUES)]}
)
_STRICT_SOME(Operators)
_STRICT(OneOf)


@_STRICT_SOME
class Times(TypedDict, total=False):
    gt: _Moment
    gte: _Moment
    lt: _Moment
    lte: _Moment


@_STRICT_SOME
class Lengths(TypedDict, total=False):
    gt: _Length
    gte: _Length
    lt: _Length
    lte: _Length


def _some(given: object) -> object:
    if given == {}:
        raise PydanticCustomError("no_operator", "Give at least one operator")
    return given


_SOME = BeforeValidator(_some)
_OR_OPERATORS = Either(lambda given: isinstance(given, dict))
_NameOrSeveral: TypeAlias = Annotated[_FilterText | OneOf, _OR_OPERATORS]
_ValueOrOperators: TypeAlias = Annotated[_FilterValue | Annotated[Operators, _SOME], _OR_OPERATORS]


class FilterBody(BaseModel):
    """Only recordings for which everything given here is true."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[_NameOrSeveral | None, Field(description="An id, or `in` with several.")] = None
    lang: Annotated[
        _NameOrSeveral | None,
        Field(
            description="What is spoken, as the record says it: a tag, compared whole, or `in` with several."
        ),
    ] = None
    created_at: Annotated[Annotated[Times, _SOME] | None, Field(description="When it was uploaded.")] = None
    duration_s: Annotated[
        Annotated[Lengths, _SOME] | None,
        Field(description="How long it is; only recordings that have been embedded have a length."),
    ] = None
    metadata: Annotated[
        dict[_FilterText, _ValueOrOperators],
        Field(
            max_length=32,
            description="Top-level members of the recordings' metadata: the exact value of each, or"
            " operators, all of which hold. `ne` holds without the member, too. Kinds never mix: 1 is 1.0,"
            ' but neither true nor "1"; texts compare by code point.',
        ),
    ] = {}


class DeletionBody(BaseModel):
    """Which recordings to forget: those of which everything given here is true."""

    model_config = ConfigDict(extra="forbid")

    collection: str | None = None
    status: Status | None = None
    filter: FilterBody = FilterBody()
    all: Annotated[
        bool,
        Field(
            strict=True, description="Needed, and only allowed, where neither `filter` nor `status` narrows."
        ),
    ] = False
    dry_run: Annotated[bool, Field(strict=True, description="Only count.")] = False
    limit: Annotated[int, Field(ge=1, le=MAX_DELETED, description="How many to delete at most.")] = (
        MAX_DELETED
    )

    def check(self) -> None:
        """InvalidField where it says neither which nor all, or both: a script's variable was empty, say."""
        if self.all != (self.filter == FilterBody() and self.status is None):
            raise InvalidField(
                "`all` is everything: give no filter and no status with it."
                if self.all
                else "Give a filter or a status; or, to delete everything, `all` alone."
            )


class DeletionAnswer(BaseModel):
    matched: Annotated[int, Field(description="How many there were when the call began.")]
    deleted: int
    more: Annotated[bool, Field(description="Whether there are some still: call again.")]


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


GROUP_BY = "What a hit is, and what `limit` counts: a recording with its best segments, or one segment."


LIKE = "The id of a recording to search by, in place of `q`: what is said in others that is like it."
AT_S = (
    "With `like`, a time in that recording, in seconds: what is like the segment there, or the nearest to it,"
    " and not like the whole."
)
LIKE_COLLECTION = "Where `like` is, needed where several collections that you see have this id."
_NULL = {"type": "null"}
_ONE_OF: list[Any] = [
    {
        "required": ["q"],
        "properties": {"q": {"type": "string"}, "like": _NULL, "at_s": _NULL, "like_collection": _NULL},
    },
    {"required": ["like"], "properties": {"like": {"type": "string"}, "q": _NULL}},
]


class SearchBody(BaseModel):
    """One question: in words (`q`), or by a recording that is there (`like`), which is no hit itself."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"oneOf": _ONE_OF})

    q: Annotated[str | None, Field(max_length=MAX_QUERY_CHARACTERS)] = None
    like: Annotated[str | None, Field(max_length=128, description=LIKE)] = None
    at_s: Annotated[float | None, Field(ge=0, allow_inf_nan=False, description=AT_S)] = None
    like_collection: Annotated[str | None, Field(description=LIKE_COLLECTION)] = None
    lang: Annotated[
        str | None,
        Field(description="BCP 47 tag of the question: a hint for normalising it, never a filter."),
    ] = None
    limit: Annotated[int, Field(ge=1, le=MAX_HITS)] = 10
    collection: str | None = None
    min_score: Annotated[MinScore | None, Field(description=MIN_SCORE)] = None
    group_by: Annotated[Grouping, Field(description=GROUP_BY)] = "recording"
    filter: FilterBody = FilterBody()

    @model_validator(mode="after")
    def _asks_one_thing(self) -> "SearchBody":
        if (self.q is None) == (self.like is None):
            raise PydanticCustomError("one_question", "Give either q or like")
        if self.like is None and (self.at_s, self.like_collection) != (None, None):
            raise PydanticCustomError("one_question", "at_s and like_collection say more of like")
        return self


class SearchesBody(BaseModel):
    """Several questions at once."""

    model_config = ConfigDict(extra="forbid")

    queries: Annotated[list[SearchBody], Field(min_length=1, max_length=MAX_QUERIES)]


Searching: TypeAlias = Annotated[
    SearchBody | SearchesBody, Either(lambda given: isinstance(given, dict) and "queries" in given)
]


class ReadyBody(BaseModel):
    """What `/readyz` looked at."""

    status: Literal["ready"]
    model: Annotated[str, Field(description="Fingerprint of the model that answers.")]
    checks: Annotated[dict[str, str], Field(description="Each is `ok`, or says what is wrong.")]
    degraded: Annotated[list[str], Field(description="Checks that are not well, but stop no answer.")]
    age_s: Annotated[float, Field(description="Seconds since the oldest look.")]


class SessionBody(BaseModel):
    """Who is asking, and what they may do."""

    name: Annotated[str | None, Field(description="The API key's name; null where none was needed.")]
    scopes: Annotated[list[Scope], Field(description="What is allowed: with `admin`, all three.")]
    collections: Annotated[list[str] | None, Field(description="The only ones to be seen; null: all.")]
    anonymous: Annotated[bool, Field(description="Whether this service lets everybody in, without a key.")]

    @classmethod
    def of(cls, grant: Grant) -> "SessionBody":
        return cls(
            name=grant.name,
            scopes=[scope for scope in SCOPES if grant.allows(scope)],
            collections=None if grant.collections is None else sorted(grant.collections),
            anonymous=grant.name is None,
        )


class SessionKey(BaseModel):
    """A key that a browser is to present from now on."""

    model_config = ConfigDict(extra="forbid")

    key: Annotated[str, Field(min_length=1, max_length=1024)]
    remember: Annotated[
        bool, Field(strict=True, description="For 30 days, and not only until the browser is closed.")
    ] = False


class QueryEcho(BaseModel):
    text: Annotated[
        str | None, Field(description="As asked; null where the query was a recording (sent, or `like`).")
    ]
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
            " has an answer; absent where nobody measured it (and where the query was a recording).",
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


class WaveformBody(BaseModel):
    """How loud a span of a recording is: peaks of parts of equal length, in order."""

    start_s: Annotated[float, Field(description="Where the first part begins: at or just before `start_s`.")]
    end_s: Annotated[float, Field(description="Where the last part ends.")]
    peaks: Annotated[
        list[float],
        Field(description="Largest magnitudes, 0 to 1. Fewer than `points` where no more were kept."),
    ]


class CollectionBody(BaseModel):
    name: str
    recordings: Annotated[int, Field(description="Of any status.")]
    ready: int
    failed: int
    duration_s: Annotated[float, Field(description="Of what has been decoded.")]
    segments: Annotated[int, Field(description="What can be found.")]


class CollectionList(BaseModel):
    items: Annotated[list[CollectionBody], Field(description="Those with a recording, by name.")]


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
    """Raises InvalidLanguage."""
    langs = _several(body.lang)
    bounds = [
        Bound("created_at", order, when.replace(tzinfo=None)) for order, when in _orders(body.created_at)
    ]
    bounds += [Bound("duration_s", order, length) for order, length in _orders(body.duration_s)]
    return Filter(
        within=within,
        ids=_several(body.id),
        langs=None if langs is None else frozenset(filter(None, map(canonical_tag, langs))),
        bounds=tuple(bounds),
        metadata=tuple(
            Condition.of(name, relation, value)
            for name, wanted in sorted(body.metadata.items())
            for relation, value in _conditions(wanted)
        ),
    )


def _conditions(wanted: Any) -> Any:  # noqa: ANN401 - pydantic has looked at it
    return wanted.items() if isinstance(wanted, dict) else [("eq", wanted)]


def _several(given: str | OneOf | None) -> frozenset[str] | None:
    if given is None:
        return None
    return frozenset({given} if isinstance(given, str) else given["in"])


def _orders(given: Any) -> Any:  # noqa: ANN401 - one for times and for lengths
    return () if given is None else given.items()
