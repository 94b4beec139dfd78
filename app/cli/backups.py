"""`clasp backup` and `clasp restore`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.common import AsJson, print_json, stages, verbs
from app.settings import Settings

if TYPE_CHECKING:
    from clasp_core.backup import Manifest

cli = verbs()


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
