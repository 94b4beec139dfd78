"""The command line: `clasp VERB`. A verb's module is imported when that verb is asked for, and no sooner:
help and completion answer at once.

Exit status: 0 done; 1 it failed, with one clear line on standard error; 2 wrong usage.
"""

import importlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from app.cli.common import EXIT_STATUS, examples, fail, of_setting
from clasp_core.errors import ClaspError

VERBS = {
    "Recordings": {
        "index": ("indexing", "Index recordings: files, or folders with everything in them."),
        "search": ("search", "Find recordings by a question in any language."),
        "embed": ("search", "The unit vector of a text or of a recording, as JSON."),
        "demo": ("demo", "Index the sample recordings, ask about them in many languages, check the answers."),
        "status": ("status", "What the library holds and what it is at, at a glance."),
    },
    "Service": {
        "serve": ("serving", "Serve the HTTP API, with ingest workers."),
        "worker": ("serving", "Run one more ingest worker on the same library."),
        "keys": ("keys", "API keys: create, list, limit, revoke."),
        "doctor": ("doctor", "What is installed and set, what is wrong with it, and what to do."),
    },
    "Upkeep": {
        "backup": ("backups", "Copy the library to a folder, or bring such a copy up to date."),
        "restore": ("backups", "Make a library of a backup, or check one."),
        "reindex": ("indexing", "Embed all recordings by another model, then switch to it."),
        "capacity": ("capacity", "What memory, disk and machines a library needs."),
    },
    "Models and data": {
        "models": ("models", "Models and their weights: list, fetch, verify, convert."),
        "dataset": ("datasets", "Make data sets: import, synthesise, describe."),
        "train": ("training", "Train a model as a TOML file says."),
        "stages": ("training", "The stages of the paper's Table 2 on your data."),
        "evaluate": ("evaluation", "Retrieval figures of a model on a manifest."),
        "calibrate": ("evaluation", "Measure what a model's scores mean."),
        "compare": ("evaluation", "Systems side by side on a manifest."),
        "map": ("evaluation", "Draw the embedding space of a manifest."),
    },
}
"""Under each heading of `clasp --help`: a verb, the module in this package that has it, and what it does."""

_ALL = {name: entry for group in VERBS.values() for name, entry in group.items()}


class _Verbs(TyperGroup):
    """Knows the verbs by the table above, and imports the one that is run."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 - typer's own Click, which it does not export
        return list(_ALL)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401
        if cmd_name not in _ALL:
            return None
        module = importlib.import_module(f"app.cli.{_ALL[cmd_name][0]}")
        group = typer.main.get_group(module.cli)
        if cmd_name in group.commands:
            return group.commands[cmd_name]
        group.name = cmd_name
        return group

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        for heading, group in VERBS.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [(f"{name:{max(map(len, _ALL))}}", text) for name, (_, text) in group.items()]
                )

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:  # noqa: ANN401
        names = _Names(name=None, commands=dict(_described()))
        return TyperGroup.shell_complete(names, ctx, incomplete)


class _Names(TyperGroup):
    """Only names and what they do."""


def _described() -> Iterator[tuple[str, TyperCommand]]:
    for name, (_, text) in _ALL.items():
        yield name, TyperCommand(name, short_help=text)


cli = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=examples(
        "clasp index ~/recordings --lang fa",
        'clasp search "the train is late because of a tree"',
        "clasp serve",
        "clasp doctor",
        after=EXIT_STATUS,
    ),
)


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
        cli(prog_name="clasp")
    except ClaspError as error:
        fail(error.detail)
    except OSError as error:
        fail(str(error))
    except ValueError as error:
        from pydantic import ValidationError

        if not isinstance(error, ValidationError):
            raise
        fail(of_setting(error))
