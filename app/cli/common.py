"""What the verbs share: options, JSON on standard output, progress on standard error."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Answer with JSON.")]
Lang = Annotated[str | None, typer.Option(help="BCP 47 language tag.")]


def fail(reason: str) -> NoReturn:
    """One line on standard error, exit status 1."""
    sys.stderr.write(f"clasp: {reason}\n")
    raise SystemExit(1)


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


def progress_bar(label: str, *, hidden: bool) -> Any:  # noqa: ANN401 - rich's own type is generic
    from rich.progress import track

    def wrap(items: Any, total: int) -> Any:  # noqa: ANN401
        console = Console(stderr=True)
        return track(items, label, total=total, console=console, disable=hidden or not console.is_terminal)

    return wrap


@contextlib.contextmanager
def transfers(*, hidden: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar for each file on its way; yields what to call with its name, the bytes there, and all of them."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
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

    console = Console(stderr=True)
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
