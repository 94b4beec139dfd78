"""`clasp models`: which there are, and their weights."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.cli.common import AsJson, fail, print_json, transfers, verbs
from app.settings import Settings
from clasp_core.systems import SYSTEMS

cli = verbs(help="Models and their weights.")

_FETCHABLE = (
    "hubert-large, wav2vec2-base, labse, xlm-r, efficientnet-b7, clasp-concat, clasp-gating, lasp-concat,"
    f" lasp-gating; or a system, for all that is published of it: {', '.join(SYSTEMS)}."
)


@cli.command("list", help="Every model, where its parts come from, and whether they are on this machine.")
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
        print_json({"models": described})
        return
    roles = ("speech", "spectrogram", "fusion", "text", "transcriber")
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


@cli.command(help="Check a model's fusion: names, shapes, values; with recordings, its inputs too.")
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
        print_json(found.as_json())
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
        fail(
            f"its statistics say the inputs were {found.inputs!r}, but {found.configured!r} is configured:"
            f' set "inputs": "{found.inputs}" in the system of a model folder\'s model.json'
        )


@cli.command(help="Fetch published weights into CLASP_MODELS_DIR; an interrupted fetch goes on.")
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
        fail("set CLASP_MODELS_DIR to the folder where weights shall be kept")
    with transfers(hidden=as_json) as progress:
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
        print_json({"files": described})
        return
    table = Table("part", "file", "MB", "state", box=None)
    for file in files:
        name = str(file.path.relative_to(settings.models_dir))
        table.add_row(file.part, name, f"{file.size / 1e6:.1f}", file.how)
    Console().print(table)


@cli.command("convert", help="Turn a torch checkpoint into safetensors without running what it holds.")
def convert_checkpoint(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Option(help="By default FILE with the suffix .safetensors.")] = None,
    as_json: AsJson = False,
) -> None:
    from clasp_core.checkpoints import convert

    made = convert(file, out)
    if as_json:
        print_json(
            {
                "path": str(made.path),
                "class": made.holds,
                "tensors": made.tensors,
                "source_sha256": made.source_sha256,
            }
        )
    else:
        sys.stdout.write(f"{made.path}: {made.holds}, {made.tensors} tensors\n")
