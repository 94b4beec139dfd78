"""The command line: `clasp VERB`. Each verb loads only what it needs.

Exit status: 0 done; 1 it failed, with one clear line on standard error; 2 wrong usage.
"""

from typing import Annotated

import typer
from pydantic import ValidationError

from app.cli import capacity, datasets, demo, evaluation, keys, library, models, training
from app.cli.common import fail
from clasp_core.errors import ClaspError

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for part in (library, demo, evaluation, training, capacity):
    cli.add_typer(part.cli)
cli.add_typer(keys.cli, name="keys")
cli.add_typer(models.cli, name="models")
cli.add_typer(datasets.cli, name="dataset")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"clasp-search {version('clasp-search')}")
        raise typer.Exit


@cli.callback(help="Find what was said in recordings, in any language, without transcribing them.")
def _clasp(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point: expected errors become one line and exit status 1."""
    try:
        cli()
    except ClaspError as error:
        fail(error.detail)
    except ValidationError as error:
        first = error.errors()[0]
        fail(f"setting CLASP_{'_'.join(map(str, first['loc'])).upper()}: {first['msg']}")
    except OSError as error:
        fail(str(error))
