"""The verbs of a running library: serve, worker, index, search, embed, reindex, backup, restore."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.cli.common import AsJson, Lang, fail, normalized, print_json, stages
from app.settings import Settings

if TYPE_CHECKING:
    from clasp_core.backup import Manifest

cli = typer.Typer()

Collection = Annotated[str, typer.Option(help="Name of the collection.")]

_SERVE_HELP = f"""Serve the HTTP API, with one ingest worker.

Settings, from the environment or a .env file:

{Settings.described()}
"""


@cli.command(help=_SERVE_HELP)
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind to.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind to.", min=0, max=65535)] = None,
) -> None:
    import signal
    import socket

    from app.main import Server, create_app
    from app.telemetry import configure_logging

    settings = Settings()
    address = (host if host is not None else settings.host, port if port is not None else settings.port)
    try:
        private = _is_loopback(address[0])
    except OSError as error:
        fail(f"cannot listen on {address[0]} port {address[1]}: {error.strerror or error}")
    if not private and not settings.allow_anonymous and not _keys_are_needed(settings):
        fail(
            f"{address[0] or 'every address'} can be reached from other machines, and there is no API key:"
            " make one (clasp keys create NAME --scope read,write,admin) or set CLASP_API_KEYS; or set"
            " CLASP_ALLOW_ANONYMOUS=true where something in front of the service checks"
        )
    configure_logging(settings.log_level)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit())  # uvicorn raises the signal again when it has shut down
    app = create_app(settings)
    try:
        listening = socket.create_server(
            address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        fail(f"cannot listen on {address[0]} port {address[1]}: {error.strerror or error}")
    _allow_descriptors(2 * settings.max_connections + 512)
    Server(app, settings).run([listening])


def _allow_descriptors(wanted: int) -> None:
    """As far as the system lets us: without descriptors, searches fail before connections are refused."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there. OSError where nobody knows the host."""
    import ipaddress
    import socket

    if not host:  # every address there is
        return False
    found = {str(place[4][0]) for place in socket.getaddrinfo(host, None)}
    return all(ipaddress.ip_address(place).is_loopback for place in found)


def _keys_are_needed(settings: Settings) -> bool:
    from app.opening import open_configured_catalog
    from clasp_core.access import Keys

    catalog = open_configured_catalog(settings)
    try:
        return Keys(catalog, settings.api_keys).needed()
    finally:
        catalog.close()


@cli.command(help="Run one more ingest worker on the same data directory.")
def worker(
    alive: Annotated[
        Path | None, typer.Option(help="File to touch while it goes on, for a container's health check.")
    ] = None,
    supervised: Annotated[bool, typer.Option(hidden=True)] = False,
    owner: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    from app.telemetry import configure_logging
    from app.workers import work

    settings = Settings()
    configure_logging(settings.log_level)
    work(settings, owner=owner, supervised=supervised, alive=alive)


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
        print_json(outcome.as_json())
    else:
        for path, reason in outcome.failed:
            sys.stderr.write(f"{path}: {reason}\n")
        sys.stdout.write(
            f"{outcome.indexed} indexed, {outcome.known} known already, {len(outcome.failed)} failed\n"
        )
    if outcome.failed and not outcome.indexed and not outcome.known:
        fail("no recording could be indexed")


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


@cli.command(help="Copy the library to a folder, or bring such a copy up to date; a running service goes on.")
def backup(
    destination: Annotated[Path, typer.Argument(help="A folder of its own; better on another disk.")],
    as_json: AsJson = False,
) -> None:
    from app.opening import open_configured_store
    from clasp_core.backup import backup as make_backup

    settings = Settings()
    with stages(hidden=as_json) as advance:
        outcome = make_backup(
            settings.data_dir,
            destination,
            database_url=settings.database_url,
            store=open_configured_store(settings),
            observe=lambda done, total: advance("copying", done, total, ""),
        )
    if as_json:
        print_json(
            _described(outcome.manifest)
            | {
                "copied": outcome.copied,
                "copied_bytes": outcome.copied_bytes,
                "removed": outcome.removed,
                "dropped": list(outcome.dropped),
            }
        )
        return
    for recording_id in outcome.dropped:
        sys.stderr.write(f"{recording_id}: deleted while the backup was made, not in it\n")
    sys.stdout.write(
        f"{_summary(outcome.manifest)} in {destination}: {outcome.copied} files copied"
        f" ({outcome.copied_bytes / 1e6:.1f} MB), {outcome.removed} removed\n"
    )


@cli.command(help="Make a library of a backup, in an empty or missing data directory.")
def restore(
    folder: Annotated[Path, typer.Argument(metavar="BACKUP", help="What `clasp backup` made.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where to; default CLASP_DATA_DIR.")] = None,
    verify_only: Annotated[
        bool, typer.Option("--verify-only", help="Read the whole backup and say whether it is intact.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    from app.opening import open_configured_store
    from clasp_core import backup

    settings = Settings()
    target = data_dir or settings.data_dir
    with stages(hidden=as_json) as advance:

        def observe(done: int, total: int) -> None:
            advance("verifying" if verify_only else "copying", done, total, "")

        if verify_only:
            manifest = backup.verify(folder, observe=observe)
        else:
            manifest = backup.restore(
                folder,
                target,
                database_url=settings.database_url,
                store=open_configured_store(settings),
                observe=observe,
            )
    if as_json:
        print_json(_described(manifest) | {"data_dir": None if verify_only else str(target)})
        return
    sys.stdout.write(
        f"{_summary(manifest)}, of {manifest.created_at}, {'intact' if verify_only else f'in {target}'}\n"
    )
    if not verify_only and manifest.model is not None and manifest.model.name not in ("", settings.model):
        sys.stdout.write(f"Serve it with CLASP_MODEL={manifest.model.name}.\n")


def _described(manifest: "Manifest") -> dict[str, Any]:
    model = manifest.model
    return {
        "created_at": manifest.created_at,
        "version": manifest.version,
        "model": None if model is None else {"name": model.name, "fingerprint": model.fingerprint},
        "recordings": dict(manifest.recordings),
        "files": len(manifest.files),
        "bytes": manifest.bytes,
    }


def _summary(manifest: "Manifest") -> str:
    return f"{sum(manifest.recordings.values())} recordings ({manifest.bytes / 1e6:.1f} MB)"


@cli.command(help="Find recordings by a question in any language.")
def search(
    text: Annotated[str, typer.Argument(help="The question.")],
    lang: Lang = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many recordings.")] = 10,
    collection: Annotated[str | None, typer.Option(help="Search this collection only.")] = None,
    min_score: Annotated[
        str | None, typer.Option(metavar="auto|FLOAT", help="Only hits scoring so much; auto: likely ones.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    from app.opening import open_configured_library
    from clasp_core.calibration import calibration_of
    from clasp_core.errors import NotCalibrated
    from clasp_core.filters import Filter
    from clasp_core.language import canonical_tag
    from clasp_core.library import Question

    lowest = _number(min_score)
    model, library = open_configured_library(Settings())
    try:
        tag = canonical_tag(lang)
        try:
            calibration = calibration_of(model)
        except NotCalibrated:
            if min_score == "auto":
                raise
            calibration = None
        vectors = model.text_encoder().encode([normalized(text, lang)])
        (hits,) = library.search(vectors, [Question(limit, Filter(collection=collection), lowest)])
        if min_score == "auto" and calibration is not None:
            hits = [hit for hit in hits if hit.score >= calibration.min_score(tag, hit.among)]
    finally:
        library.close()
    if as_json:
        print_json(
            {
                "model": {"name": model.name, "fingerprint": model.fingerprint},
                "hits": [
                    {
                        "rank": hit.rank,
                        "id": hit.recording.id,
                        "score": hit.score,
                        **(
                            {"confidence": calibration.confidence(hit.score, tag, hit.among)}
                            if calibration is not None
                            else {}
                        ),
                        "segments": [
                            {"start_s": s.start_s, "end_s": s.end_s, "score": s.score}
                            | ({} if s.transcript is None else {"transcript": s.transcript})
                            for s in hit.segments
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
    transcribed = any(hit.segments[0].transcript for hit in hits)
    table = Table("rank", "score", "time", "recording", *["heard"] * transcribed, box=None)
    for hit in hits:
        best = hit.segments[0]
        name = str(hit.recording.metadata.get("path", hit.recording.id))
        row = [str(hit.rank), f"{hit.score:.3f}", f"{clock(best.start_s)}-{clock(best.end_s)}", name]
        table.add_row(*map(escape, row), *[escape(best.transcript or "")] * transcribed)
    Console().print(table if hits else "nothing is indexed here yet")


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


@cli.command(help="The unit vector of a text or of a recording, as JSON.")
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


def clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"
