"""`clasp keys`: who may use the service. Running services follow at once."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.cli.common import AsJson, listed, print_json
from app.settings import Settings

if TYPE_CHECKING:
    from clasp_core.access import ApiKey, Keys

cli = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="API keys of the service.")


@cli.command(help="Make a key and show it, this once.")
def create(
    name: Annotated[str, typer.Argument(help="What logs call it; whose it is, say.")],
    scope: Annotated[str, typer.Option(metavar="read,write,admin", help="What it may do, by commas.")],
    collection: Annotated[
        list[str] | None, typer.Option(help="Limit it to this collection; give several. Default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    from clasp_core.access import SCOPES

    wanted = listed(scope)
    if not wanted or not set(wanted) <= set(SCOPES):
        raise typer.BadParameter(f"--scope is one or more of {', '.join(SCOPES)}, by commas")
    with _keys() as keys:
        key, text = keys.create(name, [known for known in SCOPES if known in wanted], collection or None)
    if as_json:
        print_json(_described(key) | {"key": text})
    else:
        sys.stderr.write("This is the key. It is not kept, and cannot be shown again:\n")
        sys.stdout.write(f"{text}\n")


@cli.command("list", help="Every key that was ever made, without its secret.")
def list_keys(as_json: AsJson = False) -> None:
    with _keys() as keys:
        known = keys.list()
    if as_json:
        print_json({"keys": [_described(key) for key in known]})
        return
    table = Table("name", "id", "scopes", "collections", "created", "revoked", box=None)
    for key in known:
        times = [f"{time:%Y-%m-%d %H:%M}" if time else "" for time in (key.created_at, key.revoked_at)]
        where = "all" if key.collections is None else ", ".join(key.collections)
        table.add_row(key.name, key.id, ", ".join(key.scopes), where, *times)
    Console().print(table if known else "there are no keys")


@cli.command(help="Make a key worthless, at once and for good.")
def revoke(
    name: Annotated[str, typer.Argument(help="The key's name.")],
    as_json: AsJson = False,
) -> None:
    with _keys() as keys:
        key = keys.revoke(name)
    if as_json:
        print_json(_described(key))
    else:
        sys.stdout.write(f"{key.name} is revoked\n")


@contextmanager
def _keys() -> "Iterator[Keys]":
    from app.opening import open_configured_catalog
    from clasp_core.access import Keys

    catalog = open_configured_catalog(Settings())
    try:
        yield Keys(catalog)
    finally:
        catalog.close()


def _described(key: "ApiKey") -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        "collections": None if key.collections is None else list(key.collections),
        "created_at": f"{key.created_at.isoformat()}Z",
        "revoked_at": None if key.revoked_at is None else f"{key.revoked_at.isoformat()}Z",
    }
