"""`clasp search`, and `clasp embed`, which says what it searches by."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from app.cli.common import (
    EXIT_STATUS,
    AsJson,
    Lang,
    clock,
    examples,
    fail,
    known_collections,
    normalized,
    print_json,
    print_table,
    verbs,
)
from app.settings import Settings

if TYPE_CHECKING:
    from clasp_core.filters import Filter
    from clasp_core.library import Hit
    from clasp_core.models import Model

cli = verbs()

_WIDE = 120
"""Columns from which ids have room beside titles."""


class _Search(TyperCommand):
    """`--play` alone is `--play 1`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        ends = args.index("--") if "--" in args else len(args)
        for place in range(ends):
            if args[place] == "--play" and not (args[place + 1 : place + 2] or ["-"])[0].isdigit():
                args[place] = "--play=1"
        return super().parse_args(ctx, args)


@cli.command(
    cls=_Search,
    help="Find recordings by a question in any language.",
    epilog=examples(
        'clasp search "the train is late because of a tree"',
        'clasp search "زنبورها در زمستان" --lang fa --min-score auto --play',
        """clasp search "strike" --filter '{"metadata": {"show": "news"}}' --group-by segment""",
        "clasp search --like bees --at 12.5",
        after=EXIT_STATUS,
    ),
)
def search(
    text: Annotated[str | None, typer.Argument(help="The question; or give --like.")] = None,
    lang: Lang = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many hits.")] = 10,
    collection: Annotated[
        str | None, typer.Option(help="Search this collection only.", autocompletion=known_collections)
    ] = None,
    min_score: Annotated[
        str | None, typer.Option(metavar="auto|FLOAT", help="Only hits scoring so much; auto: likely ones.")
    ] = None,
    filter_: Annotated[
        str | None,
        typer.Option("--filter", metavar="JSON", help="Only among these recordings; as over HTTP."),
    ] = None,
    group_by: Annotated[str, typer.Option(metavar="recording|segment", help="What a hit is.")] = "recording",
    like: Annotated[
        str | None, typer.Option(metavar="ID", help="Find what is like this recording, in TEXT's place.")
    ] = None,
    at: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="With --like: like what is said there.")
    ] = None,
    play: Annotated[
        int | None,
        typer.Option(
            metavar="[RANK]", min=1, help="Play that hit's best segment; without RANK, the first's."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    from app.opening import open_configured_library
    from clasp_core.calibration import calibration_of
    from clasp_core.errors import NotCalibrated
    from clasp_core.language import canonical_tag
    from clasp_core.library import Question

    if (text is None) == (like is None):
        raise typer.BadParameter("give either a question or --like ID")
    if at is not None and like is None:
        raise typer.BadParameter("--at SECONDS belongs to --like ID")
    lowest = _number(min_score)
    if group_by not in ("recording", "segment"):
        raise typer.BadParameter("--group-by is recording or segment")
    among = replace(_filter(filter_), collection=collection)
    if play is not None:
        from app.cli import playing

        playing.player()  # before anything that takes long
    settings = Settings()
    model, library = open_configured_library(settings)
    try:
        tag = canonical_tag(lang)
        try:
            calibration = calibration_of(model)
        except NotCalibrated:
            if min_score == "auto":
                raise
            calibration = None
        question = Question(limit, among, lowest, "segment" if group_by == "segment" else "recording")
        if like is not None:
            within = None if collection is None else {collection}
            recording, vector = library.direction(like, at_s=at, within=within)
            vectors, question = vector[None], replace(question, besides=recording)
        else:
            vectors = model.text_encoder().encode([normalized(text or "", lang)])
        (hits,) = library.search(vectors, [question])
        confidences: list[float | None] = [None] * len(hits)
        if calibration is not None:
            by_sound = like is not None
            if min_score == "auto":
                hits = [
                    hit
                    for hit in hits
                    if hit.score >= calibration.min_score(tag, hit.among, by_sound=by_sound)
                ]
            if not by_sound:
                confidences = [calibration.confidence(hit.score, tag, hit.among) for hit in hits]
            confidences = confidences[: len(hits)]
        if as_json:
            _answer(model, hits, confidences)
        elif hits:
            _show(hits, confidences)
        else:
            narrowed = any(given is not None for given in (filter_, min_score, like))
            sys.stdout.write("nothing found\n" if narrowed else "nothing is indexed here yet\n")
        if play is not None:
            if play > len(hits):
                fail(f"there is no hit of rank {play} to play")
            sys.stdout.flush()
            hit = hits[play - 1]
            playing.play(
                library, hit.recording.sha256, hit.segments[0], max_duration_s=settings.max_duration_s
            )
    finally:
        library.close()


def _answer(model: "Model", hits: "Sequence[Hit]", confidences: Sequence[float | None]) -> None:
    """As the HTTP answer, without what concerns only that."""
    print_json(
        {
            "model": {"name": model.name, "fingerprint": model.fingerprint},
            "hits": [
                {
                    "rank": hit.rank,
                    "id": hit.recording.id,
                    "score": hit.score,
                    **({} if confidence is None else {"confidence": confidence}),
                    "segments": [
                        {"start_s": s.start_s, "end_s": s.end_s, "score": s.score}
                        | ({} if s.transcript is None else {"transcript": s.transcript})
                        for s in hit.segments
                    ],
                    "lang": hit.recording.lang,
                    "collection": hit.recording.collection,
                    "metadata": dict(hit.recording.metadata),
                }
                for hit, confidence in zip(hits, confidences, strict=True)
            ],
        }
    )


def _show(hits: "Sequence[Hit]", confidences: Sequence[float | None]) -> None:
    """Words last: what is written from right to left then moves nothing that stands behind it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    named = [_name(hit) for hit in hits]
    rows: dict[str, list[str]] = {
        "rank": [str(hit.rank) for hit in hits],
        "time": [f"{clock(hit.segments[0].start_s)}-{clock(hit.segments[0].end_s)}" for hit in hits],
        "score": [f"{hit.score:.3f}" for hit in hits],
        "conf.": ["" if confidence is None else f"{confidence:.2f}" for confidence in confidences],
        "lang": [hit.recording.lang or "" for hit in hits],
        "recording": named,
        "id": [
            hit.recording.id if hit.recording.id != name else ""
            for hit, name in zip(hits, named, strict=True)
        ],
        "heard": [hit.segments[0].transcript or "" for hit in hits],
    }
    if sys.stdout.isatty() and Console().width < _WIDE:
        del rows["id"]
    shown = {heading: cells for heading, cells in rows.items() if any(cells)}
    table = Table(box=None, pad_edge=False)
    for heading in shown:
        words = heading in ("recording", "id", "heard")
        table.add_column(heading, no_wrap=not words, overflow="fold", min_width=8 if words else None)
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*map(Text, cells))
    print_table(table)


def _name(hit: "Hit") -> str:
    """What people know it by: its title, or the file it was; else its id."""
    metadata = hit.recording.metadata
    found = next((metadata[key] for key in ("title", "path") if isinstance(metadata.get(key), str)), "")
    return str(found) or hit.recording.id


def _filter(text: str | None) -> "Filter":
    from clasp_core.filters import EVERYTHING

    if text is None:
        return EVERYTHING
    from pydantic import ValidationError

    from app.schemas import FilterBody, filter_of

    try:
        return filter_of(FilterBody.model_validate(json.loads(text)), None)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--filter is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise typer.BadParameter(f"--filter{f' at {place}' if place else ''}: {first['msg']}") from None


def _number(min_score: str | None) -> float | None:
    if min_score in (None, "auto"):
        return None
    try:
        number = float(min_score or "")
    except ValueError:
        number = float("nan")
    if not -1 <= number <= 1:
        raise typer.BadParameter("--min-score is a number from -1 to 1, or auto")
    return number


@cli.command(
    help="The unit vector of a text or of a recording, as JSON.",
    epilog=examples('clasp embed --text "the train is late"', after=EXIT_STATUS),
)
def embed(
    text: Annotated[str | None, typer.Option(help="A text.")] = None,
    audio: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A recording.")] = None,
    lang: Lang = None,
    as_json: AsJson = True,
) -> None:
    from app.opening import open_configured_model
    from clasp_core.ingest import embed_recording
    from clasp_core.language import canonical_tag
    from clasp_core.library import mean_vector

    if (text is None) == (audio is None):
        raise typer.BadParameter("give either --text or --audio")
    settings = Settings()
    model = open_configured_model(settings)
    if audio is not None:
        encoder, tag = model.speech_encoder(), canonical_tag(lang)
        segments = embed_recording(encoder, audio, max_duration_s=settings.max_duration_s, lang=tag)
        vector = mean_vector(segments)
    else:
        vector = model.text_encoder().encode([normalized(text or "", lang)])[0]
    print_json({"model": model.fingerprint, "dim": model.dim, "vector": vector.tolist()})
