"""What the verbs share: options, JSON on standard output, progress on standard error."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Answer with JSON.")]
Lang = Annotated[str | None, typer.Option(help="BCP 47 language tag.")]
EXIT_STATUS = "Exit status: 0 done, 1 it failed, 2 wrong usage."


def verbs(**more: Any) -> typer.Typer:  # noqa: ANN401
    """A module's verbs, whose help is plain text."""
    return typer.Typer(rich_markup_mode=None, no_args_is_help=True, **more)


def examples(*lines: str, after: str = "") -> str:
    """The end of a verb's help. Click keeps the lines of what stands behind \\b."""
    shown = "".join(f"\n  {line}" for line in lines)
    return f"\b\nExamples:{shown}" + (f"\n\n{after}" if after else "")


def fail(reason: str) -> NoReturn:
    """One line on standard error, exit status 1."""
    sys.stderr.write(f"clasp: {reason}\n")
    raise SystemExit(1)


def of_setting(error: Any) -> str:  # noqa: ANN401 - pydantic's ValidationError, which is imported late
    """What is wrong with a setting. Not its value: it may be a secret."""
    first = error.errors()[0]
    return f"setting CLASP_{'_'.join(map(str, first['loc'])).upper().removeprefix('CLASP_')}: {first['msg']}"


def listed(names: str) -> tuple[str, ...]:
    """Names by commas."""
    return tuple(name for name in names.split(",") if name)


def normalized(text: str, lang: str | None) -> str:
    from clasp_core.errors import EmptyQuery
    from clasp_core.language import canonical_tag, normalize_text

    text = normalize_text(text, canonical_tag(lang))
    if not text:
        raise EmptyQuery("The text is empty.")
    return text


def on_stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def print_table(table: "Table") -> None:
    """As wide as the terminal; in a pipe as wide as it is, so that `grep` finds whole lines."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100_000
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def size(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"


def clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"


def known_models(incomplete: str) -> list[str]:
    """For completion: models by name."""
    from clasp_core.models import AVAILABLE

    return [name for name in AVAILABLE if name.startswith(incomplete)]


def known_collections(incomplete: str) -> list[str]:
    """For completion: what the library has, if it can be read without ado."""
    from app.opening import read_configured_catalog
    from app.settings import Settings

    try:
        with read_configured_catalog(Settings()) as catalog:
            names = [summary.name for summary in catalog.collections()]
    except Exception:  # nobody wants to read of trouble in the middle of a line
        return []
    return [name for name in names if name.startswith(incomplete)]


def progress_bar(label: str, *, hidden: bool) -> Any:  # noqa: ANN401 - rich's own type is generic
    from rich.progress import track

    def wrap(items: Any, total: int) -> Any:  # noqa: ANN401
        console = on_stderr()
        return track(items, label, total=total, console=console, disable=hidden or not console.is_terminal)

    return wrap


@contextlib.contextmanager
def transfers(*, hidden: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar for each file on its way; yields what to call with its name, the bytes there, and all of them."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    console = on_stderr()
    tasks: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        disable=hidden or not console.is_terminal,
    ) as bars:

        def advance(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield advance


@contextlib.contextmanager
def stages(*, hidden: bool) -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar for each stage of a training; yields what to call with its name, done, all, and a note."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = on_stderr()
    tasks: dict[str, TaskID] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=hidden or not console.is_terminal,
    ) as bars:

        def advance(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield advance


def print_json(value: Any) -> None:  # noqa: ANN401
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
