"""The command line: `clasp VERB`. Each verb loads only what it needs.

Exit status: 0 done; 1 it failed, with one clear line on standard error; 2 wrong usage.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from app.settings import Settings
from clasp_core.errors import ClaspError
from clasp_core.systems import SYSTEMS

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find what was said in recordings, in any language, without transcribing them.",
)
models_cli = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Models and their weights.")
cli.add_typer(models_cli, name="models")

AsJson = Annotated[bool, typer.Option("--json", help="Answer with JSON.")]
Lang = Annotated[str | None, typer.Option(help="BCP 47 language tag.")]
Collection = Annotated[str, typer.Option(help="Name of the collection.")]

_FETCHABLE = (
    "hubert-large, wav2vec2-base, labse, xlm-r, efficientnet-b7, clasp-concat, clasp-gating, lasp-concat,"
    f" lasp-gating; or a system, for all that is published of it: {', '.join(SYSTEMS)}."
)
_SERVE_HELP = f"""Serve the HTTP API, with one ingest worker.

Settings, from the environment or a .env file:

{Settings.described()}
"""


def main() -> None:
    """Entry point: expected errors become one line and exit status 1."""
    try:
        cli()
    except ClaspError as error:
        _fail(error.detail)
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"setting CLASP_{'_'.join(map(str, first['loc'])).upper()}: {first['msg']}")
    except OSError as error:
        _fail(str(error))


def _fail(reason: str) -> NoReturn:
    sys.stderr.write(f"clasp: {reason}\n")
    raise SystemExit(1)


@cli.command(help=_SERVE_HELP)
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind to.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind to.", min=0, max=65535)] = None,
) -> None:
    import signal
    import socket

    import uvicorn

    from app.main import create_app
    from app.telemetry import configure_logging

    settings = Settings()
    configure_logging(settings.log_level)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit())  # uvicorn raises the signal again when it has shut down
    app = create_app(settings)
    address = (host if host is not None else settings.host, port if port is not None else settings.port)
    try:
        listening = socket.create_server(
            address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        _fail(f"cannot listen on {address[0]} port {address[1]}: {error.strerror or error}")
    server = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=15)
    uvicorn.Server(server).run([listening])


@cli.command(help="Run one more ingest worker on the same data directory.")
def worker(
    supervised: Annotated[bool, typer.Option(hidden=True)] = False,
    owner: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    from app.telemetry import configure_logging
    from app.workers import work

    settings = Settings()
    configure_logging(settings.log_level)
    work(settings, owner=owner, supervised=supervised)


@cli.command(help="Index recordings: files, or folders with everything in them. Safe to run again.")
def index(
    paths: Annotated[list[Path], typer.Argument(exists=True, help="Files or folders.")],
    lang: Lang = None,
    collection: Collection = "default",
    as_json: AsJson = False,
) -> None:
    from app.indexing import index_files
    from app.opening import open_configured_library

    settings = Settings()
    model, library = open_configured_library(settings)
    try:
        outcome = index_files(
            library,
            model,
            list(_files(paths)),
            settings=settings,
            lang=lang,
            collection=collection,
            quiet=as_json,
        )
    finally:
        library.close()
    if as_json:
        _print_json(outcome.as_json())
    else:
        for path, reason in outcome.failed:
            sys.stderr.write(f"{path}: {reason}\n")
        sys.stdout.write(
            f"{outcome.indexed} indexed, {outcome.known} known already, {len(outcome.failed)} failed\n"
        )
    if outcome.failed and not outcome.indexed and not outcome.known:
        _fail("no recording could be indexed")


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(
                file
                for file in path.rglob("*")
                if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
            )
        else:
            yield path


@cli.command(help="Embed all recordings by another model, then switch to it; a running service goes on.")
def reindex(
    model: Annotated[str | None, typer.Option(help="Model name or folder; default CLASP_MODEL.")] = None,
    as_json: AsJson = False,
) -> None:
    from app.indexing import reindex_library
    from app.opening import open_configured_library

    settings = Settings()
    coming, library = open_configured_library(settings, model, reindex=True)
    try:
        outcome = reindex_library(library, coming, settings=settings, quiet=as_json)
    finally:
        library.close()
    named = f"{coming.name} ({coming.fingerprint})"
    if as_json:
        _print_json(
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
        _fail("stopped before the switch; run it again to go on from here")
    if outcome.result == "switched" and not as_json:
        sys.stdout.write(f"switched: the library is searched by {named} from now on\n")
        if model not in (None, settings.model):
            sys.stdout.write("Set CLASP_MODEL to it before anything is started anew.\n")


@cli.command(help="Find recordings by a question in any language.")
def search(
    text: Annotated[str, typer.Argument(help="The question.")],
    lang: Lang = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many recordings.")] = 10,
    collection: Annotated[str | None, typer.Option(help="Search this collection only.")] = None,
    as_json: AsJson = False,
) -> None:
    from app.opening import open_configured_library
    from clasp_core.catalog import Filter
    from clasp_core.library import Question

    model, library = open_configured_library(Settings())
    try:
        vectors = model.text_encoder().encode([_normalized(text, lang)])
        (hits,) = library.search(vectors, [Question(limit, Filter(collection=collection))])
    finally:
        library.close()
    if as_json:
        _print_json(
            {
                "model": {"name": model.name, "fingerprint": model.fingerprint},
                "hits": [
                    {
                        "rank": hit.rank,
                        "id": hit.recording.id,
                        "score": hit.score,
                        "segments": [
                            {"start_s": s.start_s, "end_s": s.end_s, "score": s.score} for s in hit.segments
                        ],
                        "lang": hit.recording.lang,
                        "collection": hit.recording.collection,
                        "metadata": dict(hit.recording.metadata),
                    }
                    for hit in hits
                ],
            }
        )
        return
    table = Table("rank", "score", "time", "recording", box=None)
    for hit in hits:
        best = hit.segments[0]
        name = str(hit.recording.metadata.get("path", hit.recording.id))
        table.add_row(str(hit.rank), f"{hit.score:.3f}", f"{_clock(best.start_s)}-{_clock(best.end_s)}", name)
    Console().print(table if hits else "nothing is indexed here yet")


@cli.command(help="The unit vector of a text or of a recording, as JSON.")
def embed(
    text: Annotated[str | None, typer.Option(help="A text.")] = None,
    audio: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A recording.")] = None,
    lang: Lang = None,
    as_json: AsJson = True,
) -> None:
    from app.opening import open_configured_model
    from clasp_core.ingest import embed_recording, mean_vector

    if (text is None) == (audio is None):
        raise typer.BadParameter("give either --text or --audio")
    settings = Settings()
    model = open_configured_model(settings)
    if audio is not None:
        encoder = model.speech_encoder()
        vector = mean_vector(embed_recording(encoder, audio, max_duration_s=settings.max_duration_s))
    else:
        vector = model.text_encoder().encode([_normalized(text or "", lang)])[0]
    _print_json({"model": model.fingerprint, "dim": model.dim, "vector": vector.tolist()})


@cli.command(help="Retrieval figures of a model on a manifest of recordings with transcripts.")
def evaluate(
    manifest: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    audio_root: Annotated[Path | None, typer.Option(exists=True, file_okay=False)] = None,
    model: Annotated[str | None, typer.Option(help="Model name or folder; default CLASP_MODEL.")] = None,
    by: Annotated[str, typer.Option(help="Also inside each group of these fields, e.g. lang,source.")] = "",
    split: Annotated[str | None, typer.Option(help="Only items of this split.")] = None,
    protocol: Annotated[str, typer.Option(help="`clean`, or `paper` for the paper's own rules.")] = "clean",
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Paper: rank among so many, drawn at random; default all.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Paper: cosine from which a pair is predicted, for macro_f1; 0.5.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    from app.opening import open_configured_model
    from clasp_core.evaluation import evaluate_manifest

    if protocol not in ("clean", "paper"):
        raise typer.BadParameter("--protocol is clean or paper")
    if protocol == "clean" and (candidates is not None or threshold is not None):
        raise typer.BadParameter("--candidates and --threshold belong to --protocol paper")
    evaluated = open_configured_model(Settings(), model)
    report = evaluate_manifest(
        evaluated,
        manifest,
        audio_root=audio_root,
        split=split,
        by=[field for field in by.split(",") if field],
        protocol=protocol,
        candidates=candidates,
        threshold=0.5 if threshold is None else threshold,
        progress=_progress_bar("embedding", hidden=as_json),
    )
    if out is not None:
        out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        _print_json(report)
    else:
        _print_report(report)


@cli.command(help="Train a model from a manifest, as a TOML file says.")
def train(config: Annotated[Path, typer.Argument(exists=True, dir_okay=False)]) -> None:
    import logging

    from clasp_core.training import read_config
    from clasp_core.training import train as run

    logging.basicConfig(level="INFO", format="%(message)s")
    sys.stdout.write(f"{run(read_config(config))}\n")


@models_cli.command(
    "list", help="Every model, where its parts come from, and whether they are on this machine."
)
def list_models(as_json: AsJson = False) -> None:
    from clasp_core.models import AVAILABLE, open_model

    settings = Settings()
    described: list[dict[str, Any]] = []
    for name in AVAILABLE:
        model = open_model(name, models_dir=settings.models_dir)
        parts = model.parts()
        available = all(part.path is not None for part in parts)
        described.append(
            {
                "name": name,
                "about": model.about,
                "fingerprint": model.fingerprint if available else None,
                "dim": model.dim,
                "available": available,
                "parts": [
                    {
                        "role": part.role,
                        "key": part.key,
                        "title": part.title,
                        "licence": part.licence,
                        "source": part.source,
                        "bytes": part.size_bytes,
                        "path": str(part.path) if part.path else None,
                    }
                    for part in parts
                ],
            }
        )
    if as_json:
        _print_json({"models": described})
        return
    roles = ("speech", "spectrogram", "fusion", "text")
    models = Table("model", "ready", *roles, "about", box=None)
    parts_table = Table("part", "what", "licence", "MB", "here", "from", box=None)
    seen: set[str] = set()
    for entry in described:
        keys = {part["role"]: part["key"] for part in entry["parts"]}
        ready = "yes" if entry["available"] else "no"
        models.add_row(entry["name"], ready, *(keys.get(role, "") for role in roles), entry["about"])
        for part in entry["parts"]:
            if part["key"] in seen or part["bytes"] is None:
                continue
            seen.add(part["key"])
            here = "yes" if part["path"] else "no"
            megabytes = f"{part['bytes'] / 1e6:.0f}"
            row = (part["key"], part["title"], part["licence"], megabytes, here, part["source"])
            parts_table.add_row(*row)
    Console().print(models, "", parts_table)


@models_cli.command(help="Check a model's fusion: names, shapes, values; with recordings, its inputs too.")
def verify(
    model: Annotated[str, typer.Argument(help="A system's name, a model folder, or a .safetensors file.")],
    audio: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="A short recording of speech; give several."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    from clasp_core.verification import verify as verify_model

    settings = Settings()
    found = verify_model(model, audio or [], models_dir=settings.models_dir, device=settings.device)
    if as_json:
        _print_json(found.as_json())
    else:
        sys.stdout.write(
            f"{found.model}: {found.layout}, {found.entries} entries, {found.parameters} parameters,"
            f" all finite{'' if found.batches is None else f', trained over {found.batches} batches'}\n"
        )
        for branch, conventions in found.fits.items():
            for inputs, fit in conventions.items():
                sys.stdout.write(
                    f"  {branch} inputs {inputs}: offset {fit.offset:.3f}, spread {fit.spread:.3f}\n"
                )
    if found.batches == 0:
        sys.stderr.write("note: this fusion was never trained, its batch statistics are the initial ones\n")
    if found.inputs not in (None, found.configured):
        _fail(
            f"its statistics say the inputs were {found.inputs!r}, but {found.configured!r} is configured:"
            f' set "inputs": "{found.inputs}" in the system of a model folder\'s model.json'
        )


@models_cli.command(help="Fetch published weights into CLASP_MODELS_DIR; an interrupted fetch goes on.")
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="PART", help=_FETCHABLE)],
    revision: Annotated[
        list[str] | None, typer.Option(metavar="PART=REV", help="Another commit or branch of a part.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    from clasp_core.hub import GROUPS, PUBLISHED
    from clasp_core.hub import fetch as fetch_parts

    if unknown := [name for name in names if name not in PUBLISHED and name not in GROUPS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join([*PUBLISHED, *GROUPS])}")
    revisions = {}
    for text in revision or []:
        part, equals, commit = text.partition("=")
        if not (part and equals and commit):
            raise typer.BadParameter(f"--revision is PART=REV, not {text!r}")
        revisions[part] = commit
    settings = Settings()
    if settings.models_dir is None:
        _fail("set CLASP_MODELS_DIR to the folder where weights shall be kept")
    with _transfers(hidden=as_json) as progress:
        files = fetch_parts(
            names,
            settings.models_dir,
            revisions=revisions,
            endpoint=settings.hub_endpoint,
            progress=progress,
        )
    described = [
        {
            "part": file.part,
            "path": str(file.path),
            "sha256": file.sha256,
            "bytes": file.size,
            "commit": file.commit,
            "state": file.how,
        }
        for file in files
    ]
    if as_json:
        _print_json({"files": described})
        return
    table = Table("part", "file", "MB", "state", box=None)
    for file in files:
        name = str(file.path.relative_to(settings.models_dir))
        table.add_row(file.part, name, f"{file.size / 1e6:.1f}", file.how)
    Console().print(table)


@models_cli.command("convert", help="Turn a torch checkpoint into safetensors without running what it holds.")
def convert_checkpoint(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Option(help="By default FILE with the suffix .safetensors.")] = None,
    as_json: AsJson = False,
) -> None:
    from clasp_core.checkpoints import convert

    made = convert(file, out)
    if as_json:
        _print_json(
            {
                "path": str(made.path),
                "class": made.holds,
                "tensors": made.tensors,
                "source_sha256": made.source_sha256,
            }
        )
    else:
        sys.stdout.write(f"{made.path}: {made.holds}, {made.tensors} tensors\n")


# --- inside


def _normalized(text: str, lang: str | None) -> str:
    from clasp_core.errors import EmptyQuery
    from clasp_core.language import canonical_tag, normalize_text

    normalized = normalize_text(text, canonical_tag(lang))
    if not normalized:
        raise EmptyQuery("The text is empty.")
    return normalized


def _progress_bar(label: str, *, hidden: bool) -> Any:  # noqa: ANN401 - rich's own type is generic
    from rich.progress import track

    def wrap(items: Any, total: int) -> Any:  # noqa: ANN401
        console = Console(stderr=True)
        return track(items, label, total=total, console=console, disable=hidden or not console.is_terminal)

    return wrap


@contextlib.contextmanager
def _transfers(*, hidden: bool) -> Iterator[Callable[[str, int, int | None], None]]:
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


def _print_json(value: Any) -> None:  # noqa: ANN401
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _print_report(report: dict[str, Any]) -> None:
    columns = ("n", "hits@1", "hits@5", "hits@10", "mrr", "mean_rank", "macro_f1")
    for direction in ("text_to_speech", "speech_to_text"):
        table = Table("pool", *columns, box=None, title=direction, title_justify="left")
        pools = [("all", report["overall"])] + [
            (f"{field}={value}", figures)
            for field, groups in report["groups"].items()
            for value, figures in groups.items()
        ]
        for name, figures in pools:
            row = figures[direction]
            table.add_row(
                name, *(f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns)
            )
        Console().print(table)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"


if __name__ == "__main__":
    main()
