"""The verbs that make data sets: import published ones, read text aloud, say what a manifest holds."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.cli.common import AsJson, Lang, listed, print_json, progress_bar, verbs

cli = verbs(help="Make data sets: import, synthesise, describe.")

_EXAMPLES = 3  # of what was left out, for each reason
_LISTED = 40  # values of a field


@cli.command("import", help="Write the manifest of a data set on disk; its sound stays where it is.")
def import_(
    kind: Annotated[str, typer.Argument(help="common-voice, fleurs, speech-brown or folder.")],
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="The manifest to write.")],
    lang: Lang = None,
    split: Annotated[list[str] | None, typer.Option(help="Only this split; may be repeated.")] = None,
    check: Annotated[bool, typer.Option(help="Decode every file and add its duration_s.")] = False,
    as_json: AsJson = False,
) -> None:
    from clasp_core.datasets.figures import describe
    from clasp_core.datasets.importers import check as checked
    from clasp_core.datasets.importers import import_dataset
    from clasp_core.manifest import write_manifest

    if kind == "folder" and out.suffix == ".jsonl" and out.parent.resolve() == folder.resolve():
        raise typer.BadParameter("--out in FOLDER itself would be read as its table the next time")
    imported = import_dataset(kind, folder, lang=lang, splits=split or ())
    if check:
        imported = checked(imported, progress=progress_bar("decoding", hidden=as_json))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(out, imported.items)
    reasons: dict[str, list[str]] = {}
    for entry in imported.left_out:
        reasons.setdefault(entry.reason, []).append(entry.where)
    figures = describe(imported.items)
    if as_json:
        left_out = {reason: {"count": len(w), "first": w[:_EXAMPLES]} for reason, w in reasons.items()}
        print_json({"manifest": str(out), **figures, "left_out": left_out})
        return
    print_figures(figures)
    for reason, where in reasons.items():
        sys.stderr.write(f"left out: {len(where)} with {reason} ({'; '.join(where[:_EXAMPLES])})\n")
    sys.stdout.write(f"{out}\n")


@cli.command("speech-brown", help="Read sentences aloud: recordings, manifest and card. Run again to go on.")
def speech_brown(
    texts: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help=".txt or .jsonl, also .gz.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="The folder of the data set.")],
    voices: Annotated[
        str,
        typer.Option(
            help="Taken in turn, by commas: espeak-ng:en-us+f3, flite:slt, piper:FILE, kokoro:FOLDER/V."
        ),
    ] = "espeak-ng:en-us",
    sentences: Annotated[int | None, typer.Option(min=1, help="So many, evenly over the categories.")] = None,
    hours: Annotated[float | None, typer.Option(min=0.001, help="As many as reach these hours.")] = None,
    augment: Annotated[
        list[str] | None,
        typer.Option(
            help="none, noise:babble:5..20, reverb:0.3..0.8, telephone, ...; + joins; each as often."
        ),
    ] = None,
    lang: Lang = None,
    queries: Annotated[
        str,
        typer.Option(
            help="Of parallel texts, read in --lang: languages, by commas; queries.jsonl asks for recordings"
            " in these, and --sentences is evenly over them."
        ),
    ] = "",
    min_tokens: Annotated[int, typer.Option(min=1, help="Shortest sentence.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest sentence; the paper's is 47.")] = 47,
    form: Annotated[str, typer.Option("--format", help="opus, flac or wav, at 16 kHz.")] = "opus",
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    title: Annotated[str, typer.Option(help="Heading of the card.")] = "Speech Brown",
    text_licence: Annotated[str, typer.Option(help="Terms of the texts, for the card.")] = "not stated",
    as_json: AsJson = False,
) -> None:
    from clasp_core.datasets import translations
    from clasp_core.datasets.synthesis import Recording, build, read_texts
    from clasp_core.language import canonical_tag
    from clasp_core.manifest import read_manifest, write_manifest

    asked = [str(canonical_tag(name)) for name in listed(queries)]
    if asked and lang is None:
        raise typer.BadParameter("--queries needs --lang, the language that is read aloud")
    recording = Recording(
        voices=tuple(voice.strip() for voice in voices.split(",") if voice.strip()),
        recipes=tuple(augment or ("none",)),
        form=form,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        seed=seed,
    )
    if asked:
        sentences_read, translated = translations.read_translations(texts, str(lang), asked)
    else:
        sentences_read, translated = read_texts(texts, lang), {}
    built = build(
        sentences_read,
        out,
        recording,
        sentences=sentences,
        hours=hours,
        jobs=jobs,
        title=title,
        facts={
            "texts": f"{texts.name}; licence: {text_licence}",
            "made by": f"`clasp {shlex.join(sys.argv[1:])}`",
        },
        progress=progress_bar("reading aloud", hidden=as_json),
    )
    manifests = [built.manifest]
    if asked:
        manifests.append(out / "queries.jsonl")
        source = texts.name.partition(".")[0]
        write_manifest(manifests[1], translations.queries(read_manifest(built.manifest), translated, source))
    if as_json:
        answer = {"manifest": str(manifests[-1]), "made": built.made, **built.figures}
        print_json({**answer, "left_out": built.left_out, "failed": built.failed})
        return
    print_figures(built.figures)
    for key, reason in built.failed.items():
        sys.stderr.write(f"not read: {key}: {reason}\n")
    for manifest in manifests:
        sys.stdout.write(f"{manifest}\n")


@cli.command(help="What a manifest holds: sentences, hours, tokens, and parts.")
def describe(
    manifest: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], as_json: AsJson = False
) -> None:
    from clasp_core.datasets.figures import describe as figures_of
    from clasp_core.manifest import read_manifest

    figures = figures_of(read_manifest(manifest))
    if as_json:
        print_json(figures)
    else:
        print_figures(figures)


def print_figures(figures: dict[str, Any]) -> None:
    table = Table("", "sentences", "hours", box=None)
    table.add_row("all", str(figures["sentences"]), _hours(figures["hours"]))
    for field, values in figures["by"].items():
        for value, part in list(values.items())[:_LISTED]:
            table.add_row(f"{field}={value}", str(part["sentences"]), _hours(part["hours"]))
        if len(values) > _LISTED:
            table.add_row(f"{field}: {len(values) - _LISTED} more", "", "")
    Console().print(table)
    Console().print(
        f"{figures['unique_tokens']} unique tokens, {figures['mean_tokens']} a sentence,"
        f" {figures['max_tokens']} at most; {figures['speakers']} speakers"
    )


def _hours(hours: float | None) -> str:
    return "" if hours is None else f"{hours:.2f}"
