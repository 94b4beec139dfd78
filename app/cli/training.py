"""The verbs that train."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from app.cli import common
from app.cli.common import AsJson, listed, print_json, verbs
from app.settings import Settings

cli = verbs()


@cli.command(help="Train a model as a TOML file says; a run that was killed goes on where it was.")
def train(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], as_json: AsJson = False
) -> None:
    import logging

    from clasp_core.training import read_config
    from clasp_core.training import train as run

    with common.stages(hidden=as_json) as progress:
        logging.basicConfig(format="%(message)s")  # now, so that lines stand above the bars, not in them
        logging.getLogger("clasp_core").setLevel("INFO")
        folder = run(read_config(config), models_dir=Settings().models_dir, progress=progress)
    if as_json:
        print_json({"model": str(folder)})
    else:
        sys.stdout.write(f"{folder}\n")


@cli.command(
    help="The four stages of the paper's Table 2 on your data, trained and measured, and its claims."
)
def stages(
    manifest: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the report and all that it needs.")],
    train_split: Annotated[str, typer.Option(help="What systems are trained on.")] = "train",
    test_split: Annotated[str, typer.Option(help="What they are measured on.")] = "test",
    lang: Annotated[str | None, typer.Option(help="Only recordings in this language.")] = None,
    train_items: Annotated[int | None, typer.Option(min=4, help="At most so many, drawn.")] = None,
    test_items: Annotated[int | None, typer.Option(min=2, help="At most so many, drawn.")] = None,
    queries: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Stage 4: recordings with query and query_lang; may be repeated.",
        ),
    ] = None,
    stage: Annotated[
        list[int] | None, typer.Option(min=1, max=4, help="Only this one; may be repeated. Default: all.")
    ] = None,
    speech: Annotated[str, typer.Option(help="Encoders, by commas, the best first; default: all here.")] = "",
    spectrogram: Annotated[str, typer.Option(help="Encoder; default: the first that is here.")] = "",
    text: Annotated[str, typer.Option(help="Encoders, as for speech.")] = "",
    transcribers: Annotated[
        str, typer.Option(help="whisper-base, whisper-base-padded, or folders with a CTC network.")
    ] = "whisper-base",
    recipe: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="TOML: [loss] [optimizer] [schedule] [training]."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn, and of training.")] = 0,
    as_json: AsJson = False,
) -> None:
    import logging

    from clasp_core import stages as core
    from clasp_core.models import use_threads

    settings = Settings()
    use_threads(settings.threads)
    plan = core.Plan(
        manifest,
        out,
        train=train_split,
        test=test_split,
        lang=lang,
        train_items=train_items,
        test_items=test_items,
        queries=tuple(queries or ()),
        stages=tuple(sorted(set(stage))) if stage else core.STAGES[: None if queries else 3],
        speech=listed(speech),
        spectrogram=listed(spectrogram),
        text=listed(text),
        transcribers=listed(transcribers),
        recipe=core.Recipe() if recipe is None else core.read_recipe(recipe),
        seed=seed,
    )
    with common.stages(hidden=as_json) as progress:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("clasp_core").setLevel("INFO")
        report = core.run(plan, models_dir=settings.models_dir, device=settings.device, progress=progress)
    if as_json:
        print_json(report)
        return
    console = Console()
    if not console.is_terminal:
        sys.stdout.write(core.markdown(report))
        return
    for heading, *lines in core.tables(report):
        table = Table(*heading, box=None)
        for cells in lines:
            table.add_row(*cells)
        console.print(table)
    sys.stdout.write(f"{out / 'stages.md'}\n")
