"""`clasp index`: files into the library; and `clasp reindex`: another model for it."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.common import (
    EXIT_STATUS,
    AsJson,
    Lang,
    examples,
    fail,
    known_collections,
    known_models,
    on_stderr,
    print_json,
    size,
    stages,
    verbs,
)
from app.settings import Settings

if TYPE_CHECKING:
    from app.indexing import Failure, Outcome

cli = verbs()

PLAIN_EVERY_S = 10.0
"""How often a line says how far it is, where standard error is no terminal."""
_LISTED = 50

_REMEDIES = {
    "undecodable_audio": "no readable sound: convert them (ffmpeg -i FILE FILE.flac), or leave them out",
    "empty_audio": "shorter than a tenth of a second: leave them out",
    "silent_audio": "nothing is heard in them: leave them out",
    "non_finite_audio": "samples that are no numbers: export them again",
    "audio_too_long": "cut them, or raise CLASP_MAX_DURATION_S",
    "processing_failed": "run the same command again: these are tried afresh",
    "recording_not_found": "run the same command again if they are to be kept",
    "file": "see that they are there, not empty, readable for you, and within CLASP_MAX_UPLOAD_BYTES",
}
"""What to do about files that failed, by the code of the error."""


@cli.command(
    help="Index recordings: files, or folders with everything in them. Safe to run again, and quick then:"
    " what is in the library already, by its bytes, is read once and left alone.",
    epilog=examples(
        "clasp index ~/recordings",
        "clasp index interview.m4a --lang fa --collection interviews",
        "clasp index ~/incoming --watch",
        after=EXIT_STATUS,
    ),
)
def index(
    paths: Annotated[list[Path], typer.Argument(exists=True, help="Files or folders.")],
    lang: Lang = None,
    collection: Annotated[
        str, typer.Option(help="Name of the collection.", autocompletion=known_collections)
    ] = "default",
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Then go on with what appears in the folders, until Ctrl-C. Removing a file there removes"
            " no recording.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    from app.indexing import SETTLED_AFTER_S, FileIndexer, files_of
    from app.opening import open_configured_library
    from clasp_core.language import canonical_tag
    from clasp_core.library import check_name

    if watch and not all(path.is_dir() for path in paths):
        raise typer.BadParameter("--watch looks at folders: name the folder the file is in")
    lang, collection = canonical_tag(lang), check_name("collection", collection)
    settings = Settings()
    model, library = open_configured_library(settings)
    try:
        with _shown(hidden=as_json or watch) as observe:
            indexer = FileIndexer(
                library,
                model,
                settings,
                lang=lang,
                collection=collection,
                observe=observe,
                settled=_told(as_json) if watch else lambda path, fate, reason: None,
            )
            _stop_on_signals(indexer.stop)
            if watch:
                if not as_json:
                    sys.stderr.write(
                        f"watching {', '.join(map(str, paths))}: files are indexed once they are"
                        f" {SETTLED_AFTER_S:g} s old; what is removed here stays in the library."
                        " Ctrl-C ends it.\n"
                    )
                indexer.watch(paths)
            else:
                indexer.index(list(files_of(paths)))
    finally:
        library.close()
    outcome = indexer.outcome
    left = outcome.files - outcome.done
    if as_json:
        print_json(outcome.as_json())
    else:
        if not watch:
            _list_failures(outcome.failed)
        sys.stdout.write(
            f"{outcome.indexed} indexed, {outcome.known} known already, {len(outcome.failed)} failed\n"
        )
    if outcome.stopped and left:
        fail(f"stopped; {left} files are left. What is done is kept: run the same command again to go on")
    if outcome.failed and not outcome.indexed and not outcome.known and not watch:
        fail("no recording could be indexed")


def _stop_on_signals(stop: Callable[[], None]) -> None:
    """The first signal stops it in order, the next one at once."""

    def handle(number: int, _: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


@contextmanager
def _shown(*, hidden: bool) -> Iterator[Callable[["Outcome"], None]]:
    """Progress on standard error: a bar on a terminal, else a line now and then; yields what to tell it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    console = on_stderr()
    began = told = time.monotonic()
    if hidden or not console.is_terminal:

        def tell(outcome: "Outcome") -> None:
            nonlocal told
            if not hidden and time.monotonic() - told > PLAIN_EVERY_S:
                told = time.monotonic()
                figures = ", ".join(_figures(outcome, told - began))
                sys.stderr.write(f"{outcome.done} of {outcome.files} files, {figures}\n")

        yield tell
        return
    bar = Progress(
        TextColumn("indexing"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn(
            "{task.fields[current]}", style="dim", table_column=Column(no_wrap=True, ratio=1), markup=False
        ),
        console=console,
        expand=True,
    )
    with bar:
        task = bar.add_task("", total=None, figures="", current="")

        def draw(outcome: "Outcome") -> None:
            figures = "  ".join(_figures(outcome, time.monotonic() - began))
            bar.update(
                task, completed=outcome.done, total=outcome.files, figures=figures, current=outcome.current
            )

        yield draw


def _figures(outcome: "Outcome", elapsed_s: float) -> list[str]:
    """How much and how fast, in a few words each. What is left is guessed by bytes."""
    figures = [f"{size(outcome.done_bytes)} of {size(outcome.size_bytes)}"]
    if outcome.sound_s:
        figures.append(
            f"{outcome.sound_s / 3600:.2f} h of sound at {outcome.sound_s / elapsed_s:.1f} x real time"
        )
    figures.append(f"{60 * outcome.done / elapsed_s:.0f} files/min")
    if 0 < outcome.done_bytes < outcome.size_bytes:
        left_s = round(elapsed_s * (outcome.size_bytes / outcome.done_bytes - 1))
        figures.append(f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left")
    if outcome.failed:
        figures.append(f"{len(outcome.failed)} failed")
    return figures


def _told(as_json: bool) -> Callable[[Path, str, str], None]:
    """One line for each file, as it is done."""
    from app.indexing import as_text

    def tell(path: Path, fate: str, reason: str) -> None:
        if as_json:
            print_json({"path": as_text(path), "status": fate} | ({"reason": reason} if reason else {}))
        else:
            sys.stdout.write(f"{fate:7}  {as_text(path)}{f': {reason}' if reason else ''}\n")
        sys.stdout.flush()

    return tell


def _list_failures(failed: "list[Failure]") -> None:
    from app.indexing import as_text

    for failure in failed[:_LISTED]:
        sys.stderr.write(f"{as_text(failure.path)}: {failure.reason}\n")
    if len(failed) > _LISTED:
        sys.stderr.write(f"... and {len(failed) - _LISTED} more, which --json lists\n")
    for code in dict.fromkeys(failure.code for failure in failed):
        if (remedy := _REMEDIES.get(code)) is not None:
            count = sum(failure.code == code for failure in failed)
            sys.stderr.write(f"what to do about {count} of them: {remedy}\n")


@cli.command(
    help="Embed all recordings by another model, then switch to it; a running service goes on.",
    epilog=examples("clasp reindex --model hybrid", after=EXIT_STATUS),
)
def reindex(
    model: Annotated[
        str | None,
        typer.Option(help="Model name or folder; default CLASP_MODEL.", autocompletion=known_models),
    ] = None,
    as_json: AsJson = False,
) -> None:
    from app.opening import open_configured_library
    from clasp_core.reindex import Reindexer

    settings = Settings()
    coming, library = open_configured_library(settings, model, reindex=True)
    try:
        reindexer = Reindexer(library, coming.speech_encoder, max_duration_s=settings.max_duration_s)
        _stop_on_signals(reindexer.stop)
        with stages(hidden=as_json) as advance:
            outcome = reindexer.run(
                observe=lambda done: advance("embedding anew", done.total - done.left, done.total, "")
            )
    finally:
        library.close()
    named = f"{coming.name} ({coming.fingerprint})"
    if as_json:
        print_json(
            {
                "model": {"name": coming.name, "fingerprint": coming.fingerprint},
                "result": outcome.result,
                "embedded": outcome.embedded,
                "failed": [{"id": key, "reason": reason} for key, reason in outcome.failed.items()],
            }
        )
    elif outcome.result == "nothing to do":
        sys.stdout.write(f"nothing to do: the library is searched by {named} already\n")
    else:
        for key, reason in outcome.failed.items():
            sys.stderr.write(f"{key}: {reason}\n")
        sys.stdout.write(f"{outcome.embedded} embedded, {len(outcome.failed)} failed\n")
    if outcome.result == "stopped":
        fail("stopped before the switch; run it again to go on from here")
    if outcome.result == "switched" and not as_json:
        sys.stdout.write(f"switched: the library is searched by {named} from now on\n")
        if model not in (None, settings.model):
            sys.stdout.write("Set CLASP_MODEL to it before anything is started anew.\n")
