"""The verbs that measure models."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.cli.common import AsJson, fail, listed, print_json, progress_bar, verbs
from app.settings import Settings

cli = verbs()

By = Annotated[str, typer.Option(help="Also inside each group of these fields, e.g. lang,source,length.")]
Split = Annotated[str | None, typer.Option(help="Only items of this split.")]
MacroMin = Annotated[
    int, typer.Option(min=1, help="Groups of so many items and more enter the mean over groups.")
]


@cli.command(help="Retrieval figures of a model on a manifest of recordings with transcripts.")
def evaluate(
    manifest: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    audio_root: Annotated[Path | None, typer.Option(exists=True, file_okay=False)] = None,
    model: Annotated[str | None, typer.Option(help="Model name or folder; default CLASP_MODEL.")] = None,
    by: By = "",
    split: Split = None,
    protocol: Annotated[str, typer.Option(help="`clean`, or `paper` for the paper's own rules.")] = "clean",
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Paper: rank among so many, drawn at random; default all.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Paper: cosine from which a pair is predicted, for macro_f1; 0.5.")
    ] = None,
    macro_min: MacroMin = 24,
    hints: Annotated[
        bool, typer.Option(help="Tell a model that transcribes which language each recording is in.")
    ] = True,
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
        by=listed(by),
        protocol=protocol,
        candidates=candidates,
        threshold=0.5 if threshold is None else threshold,
        macro_min=macro_min,
        hints=hints,
        progress=progress_bar("embedding", hidden=as_json),
    )
    if out is not None:
        out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        print_json(report)
    else:
        print_report(report)


@cli.command(help="Measure what a model's scores mean, for min_score=auto and the confidence of hits.")
def calibrate(
    manifest: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    audio_root: Annotated[Path | None, typer.Option(exists=True, file_okay=False)] = None,
    model: Annotated[str | None, typer.Option(help="Model name or folder; default CLASP_MODEL.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Only items of this split; never what the model was trained on.")
    ] = None,
    precision: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of right hits to aim at; default: best F1.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which pools are drawn.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Default: calibration.json in the model's folder.")] = None,
    as_json: AsJson = False,
) -> None:
    from app.opening import open_configured_model
    from clasp_core.calibration import calibrate_manifest

    measured = open_configured_model(Settings(), model)
    out = out or measured.calibration_file
    if out is None:
        fail(f"the model {measured.name!r} has no folder here: set CLASP_MODELS_DIR, or give --out")
    calibration = calibrate_manifest(
        measured,
        manifest,
        audio_root=audio_root,
        split=split,
        precision=precision,
        seed=seed,
        progress=progress_bar("embedding", hidden=as_json),
    )
    calibration.write(out)
    if as_json:
        print_json({"path": str(out), "accept": calibration.accept, **calibration.report})
        return
    columns = ("questions", "precision", "recall", "f1", "false_alarm", "miss", "auroc")
    table = Table("", *columns, box=None)
    report = calibration.report
    rows = [("all", report["overall"])]
    rows += [(f"{size} recordings", figures) for size, figures in report["pools"].items()]
    rows += list(report["languages"].items())
    for name, figures in rows:
        table.add_row(name, *(f"{figures[c]:.3f}" if c != "questions" else str(figures[c]) for c in columns))
    Console().print(table)
    sys.stdout.write(f"{out}: min_score=auto keeps hits of a confidence of {calibration.accept} or more\n")


@cli.command("map", help="Draw the embedding space of a manifest's recordings and texts in two dimensions.")
def map_space(
    manifest: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")],
    audio_root: Annotated[Path | None, typer.Option(exists=True, file_okay=False)] = None,
    model: Annotated[str | None, typer.Option(help="Model name or folder; default CLASP_MODEL.")] = None,
    split: Split = None,
    colour: Annotated[str, typer.Option(help="`lang`, `source`, `speaker`, or any other field.")] = "lang",
    method: Annotated[str, typer.Option(help="`tsne`, `umap` or `pca`.")] = "tsne",
    limit: Annotated[int, typer.Option(min=4, help="So many items, drawn at random.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same picture.")] = 0,
    places: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the places to this file, too.")
    ] = None,
) -> None:
    from app.opening import open_configured_model
    from clasp_core.maps import METHODS, draw_map, map_manifest, require_drawing, write_map

    if method not in METHODS:
        raise typer.BadParameter(f"--method is one of {', '.join(METHODS)}")
    require_drawing(out)  # before minutes of embedding
    space = map_manifest(
        open_configured_model(Settings(), model),
        manifest,
        audio_root=audio_root,
        split=split,
        colour=colour,
        method=method,
        limit=limit,
        seed=seed,
        progress=progress_bar("embedding", hidden=False),
    )
    draw_map(space, out)
    if places is not None:
        write_map(space, places)
    sys.stdout.write(f"{out}: {len(space.items)} pairs, {len(space.skipped)} skipped\n")


@cli.command(help="Systems side by side on a manifest: figures, costs, and which differences are real.")
def compare(
    manifest: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    audio_root: Annotated[Path | None, typer.Option(exists=True, file_okay=False)] = None,
    models: Annotated[
        str,
        typer.Option(help="Model names or folders; transcripts are embedded by the first one's text side."),
    ] = "mini",
    transcribers: Annotated[
        str,
        typer.Option(
            help="Search in transcripts: whisper-base, whisper-base-padded, or a folder with a CTC network."
        ),
    ] = "",
    conditions: Annotated[
        str,
        typer.Option(
            help="What is done to the recordings first: clean, noise:10 (dB; also noise:white:10 and"
            " noise:babble:10), speed:0.8, reverb:0.6 (s), telephone, gain:-12 (dB), clip:0.05; joined by +."
        ),
    ] = "clean",
    by: By = "",
    split: Split = None,
    macro_min: MacroMin = 24,
    hints: Annotated[
        bool, typer.Option(help="Tell what transcribes which language each recording is in.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Write the report to this file as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw hits@1 over the conditions into this file (.png, .svg, .pdf).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    from clasp_core import comparison
    from clasp_core.maps import require_drawing

    if plot is not None:
        require_drawing(plot)  # before minutes of embedding
    settings = Settings()
    report = comparison.compare(
        comparison.systems(
            listed(models),
            listed(transcribers),
            models_dir=settings.models_dir,
            device=settings.device,
            threads=settings.threads,
        ),
        manifest,
        audio_root=audio_root,
        split=split,
        by=listed(by),
        conditions=listed(conditions),
        macro_min=macro_min,
        hints=hints,
        progress=progress_bar("comparing", hidden=as_json),
    )
    if out is not None:
        out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if plot is not None:
        comparison.plot(report, plot)
    if as_json:
        print_json(report)
    else:
        print_comparison(report)


def print_comparison(report: dict[str, Any]) -> None:
    """Figures by condition, system and pool, then what each system costs."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for condition in report["conditions"]:
        for direction in ("text_to_speech", "speech_to_text"):
            title = f"{condition}, {direction}" if len(report["conditions"]) > 1 else direction
            table = Table(
                *("system", "pool", "n", "hits@1", "95 %", "hits@10", "mrr", "mean_rank", "hits@1 to first"),
                box=None,
                title=title,
                title_justify="left",
            )
            for name, system in report["systems"].items():
                results = system["results"][condition]
                for pool, figures in _pools(results, direction):
                    low, high = figures["ci95"]["hits@1"]
                    shown = [f"{figures[column]:.3f}" for column in ("hits@1", "hits@10", "mrr", "mean_rank")]
                    shown.insert(1, f"{low:.3f}-{high:.3f}")
                    against = ""
                    if pool == "all" and "difference" in results:
                        compared = results["difference"][direction]["hits@1"]
                        low, high = compared["ci95"]
                        against = f"{compared['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
                    table.add_row(name, pool, str(figures["n"]), *shown, against)
            console.print(table)
    costs = Table(
        *("system", "ms a recording", "10-90 %", "processor ms", "audio s/s", "ms a query", "load s"),
        *("peak MB", "weights MB", "character error"),
        box=None,
        title="costs",
        title_justify="left",
    )
    for name, system in report["systems"].items():
        seconds = system["seconds"]
        whole = seconds["recording"]
        wrong = system["results"][report["conditions"][0]].get("character_error", {}).get("overall")
        costs.add_row(
            name,
            f"{1000 * whole['median']:.0f}",
            f"{1000 * whole['p10']:.0f}-{1000 * whole['p90']:.0f}",
            f"{1000 * seconds['processor']['median']:.0f}",
            f"{system['audio_s_per_s']:.1f}",
            f"{1000 * seconds['query']:.1f}",
            f"{seconds['load']:.1f}",
            f"{system['peak_memory_bytes'] / 1e6:.0f}",
            f"{system['weights_bytes'] / 1e6:.0f}",
            "" if wrong is None else f"{wrong:.3f}",
        )
    console.print(costs)


def _pools(results: dict[str, Any], direction: str) -> list[tuple[str, dict[str, Any]]]:
    """The whole pool, each group, and the means over groups, by the names they are shown under."""
    pools = [("all", results["overall"])]
    for field, groups in results["groups"].items():
        pools += [(f"{field}={value}", figures) for value, figures in groups.items()]
    for field, macro in results["macro"].items():
        if macro["groups"]:
            pools.append((f"mean over {len(macro['groups'])} of {field}", macro))
    return [(name, figures[direction]) for name, figures in pools]


def print_report(report: dict[str, Any]) -> None:
    columns = ("n", "hits@1", "hits@5", "hits@10", "mrr", "mean_rank", "macro_f1")
    for direction in ("text_to_speech", "speech_to_text"):
        table = Table("pool", *columns, box=None, title=direction, title_justify="left")
        for name, row in _pools(report, direction):
            table.add_row(
                name, *(f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns)
            )
        Console().print(table)
