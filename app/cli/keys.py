"""`clasp keys`: who may use the service. Running services follow at once."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.cli.common import AsJson, listed, print_json, verbs
from app.settings import Settings

if TYPE_CHECKING:
    from clasp_core.access import ApiKey, Keys
    from clasp_core.limits import Held, Quota, Rate

RateOption = Annotated[str | None, typer.Option(metavar="N/second|minute", help="How often it may ask.")]
RecordingsOption = Annotated[
    str | None, typer.Option(metavar="N", help="How many recordings of its uploads are kept.")
]
BytesOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="How many bytes they may have, such as 20GB.")
]
HoursOption = Annotated[str | None, typer.Option(metavar="H", help="How many hours they may last.")]
cli = verbs(help="API keys of the service.")


@cli.command(help="Make a key and show it, this once.")
def create(
    name: Annotated[str, typer.Argument(help="What logs call it; whose it is, say.")],
    scope: Annotated[str, typer.Option(metavar="read,write,admin", help="What it may do, by commas.")],
    collection: Annotated[
        list[str] | None, typer.Option(help="Limit it to this collection; give several. Default: all.")
    ] = None,
    rate: RateOption = None,
    max_recordings: RecordingsOption = None,
    max_bytes: BytesOption = None,
    max_hours: HoursOption = None,
    as_json: AsJson = False,
) -> None:
    from clasp_core.access import SCOPES
    from clasp_core.limits import NO_QUOTA

    limits = _changed(None, NO_QUOTA, rate, max_recordings, max_bytes, max_hours)
    wanted = listed(scope)
    if not wanted or not set(wanted) <= set(SCOPES):
        raise typer.BadParameter(f"--scope is one or more of {', '.join(SCOPES)}, by commas")
    with _keys() as keys:
        scopes = [known for known in SCOPES if known in wanted]
        key, text = keys.create(name, scopes, collection or None, rate=limits[0], quota=limits[1])
    if as_json:
        print_json(_described(key) | {"key": text})
    else:
        sys.stderr.write("This is the key. It is not kept, and cannot be shown again:\n")
        sys.stdout.write(f"{text}\n")


@cli.command("list", help="Every key that was ever made, without its secret.")
def list_keys(as_json: AsJson = False) -> None:
    from clasp_core.limits import Held

    with _keys() as keys:
        known = keys.list()
        held = keys.held()
    if as_json:
        described = [_described(key) | {"held": _counted(held.get(key.id, Held()))} for key in known]
        print_json({"keys": described})
        return
    table = Table("name", "id", "scopes", "collections", "created", "revoked", "limits", box=None)
    for key in known:
        times = [f"{time:%Y-%m-%d %H:%M}" if time else "" for time in (key.created_at, key.revoked_at)]
        where = "all" if key.collections is None else ", ".join(key.collections)
        limits = ", ".join(_limits_of(key, held.get(key.id, Held())))
        table.add_row(key.name, key.id, ", ".join(key.scopes), where, *times, limits)
    Console().print(table if known else "there are no keys")


@cli.command(help="Give a key other limits; those not named stay, and `none` lifts one.")
def limit(
    name: Annotated[str, typer.Argument(help="The key's name.")],
    rate: RateOption = None,
    max_recordings: RecordingsOption = None,
    max_bytes: BytesOption = None,
    max_hours: HoursOption = None,
    as_json: AsJson = False,
) -> None:
    def change(old: "Rate | None", quota: "Quota") -> "tuple[Rate | None, Quota]":
        return _changed(old, quota, rate, max_recordings, max_bytes, max_hours)

    if rate is max_recordings is max_bytes is max_hours is None:
        raise typer.BadParameter("name a limit: --rate, --max-recordings, --max-bytes or --max-hours")
    with _keys() as keys:
        key = keys.limit(name, change)
        held = keys.held().get(key.id)
    if as_json:
        print_json(_described(key))
    else:
        sys.stdout.write(f"{key.name}: {', '.join(_limits_of(key, held)) or 'no limits'}\n")


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


def _changed(
    rate: "Rate | None",
    quota: "Quota",
    new_rate: str | None,
    recordings: str | None,
    size: str | None,
    hours: str | None,
) -> "tuple[Rate | None, Quota]":
    """The limits, where a text is given by that: `none` is no limit."""
    from clasp_core.limits import Quota, Rate

    def changed(old: Any, text: str | None, read: Callable[[str], Any]) -> Any:  # noqa: ANN401
        if text is None:
            return old
        return None if text == "none" else read(text)

    return changed(rate, new_rate, Rate.parse), Quota(
        changed(quota.recordings, recordings, lambda text: int(_amount("--max-recordings", text, r"\d+"))),
        changed(quota.size_bytes, size, _bytes),
        changed(quota.hours, hours, lambda text: float(_amount("--max-hours", text, r"\d+(\.\d+)?"))),
    )


def _amount(option: str, text: str, form: str) -> str:
    if re.fullmatch(form, text, re.ASCII) is None or len(text) > 15:
        raise typer.BadParameter(f"{option} is a number or none, not {text!r}")
    return text


def _bytes(text: str) -> int:
    parts = re.fullmatch(r"(\d{1,15}) ?([kMGT]?)(i?)B?", text, re.ASCII)
    if parts is None or (parts[3] and not parts[2]):
        raise typer.BadParameter(f"--max-bytes is a size, such as 500MB or 20GiB, or none, not {text!r}")
    factor: int = (1024 if parts[3] else 1000) ** " kMGT".index(parts[2] or " ")
    return int(parts[1]) * factor


def _limits_of(key: "ApiKey", held: "Held | None") -> list[str]:
    """Each limit, and how much of it is used."""
    from clasp_core.limits import HOUR, Held

    quota, held = key.quota, held or Held()
    shown = [] if key.rate is None else [str(key.rate)]
    if quota.recordings is not None:
        shown.append(f"{held.recordings} of {quota.recordings} recordings")
    if quota.size_bytes is not None:
        shown.append(f"{held.size_bytes / 1e6:.1f} of {quota.size_bytes / 1e6:.1f} MB")
    if quota.hours is not None:
        shown.append(f"{held.duration_s / HOUR:.1f} of {quota.hours:g} h")
    return shown


def _counted(held: "Held") -> dict[str, Any]:
    from clasp_core.limits import HOUR

    hours = round(held.duration_s / HOUR, 6)
    return {"recordings": held.recordings, "bytes": held.size_bytes, "hours": hours}


def _described(key: "ApiKey") -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        "collections": None if key.collections is None else list(key.collections),
        "limits": {
            "rate": None if key.rate is None else str(key.rate),
            "max_recordings": key.quota.recordings,
            "max_bytes": key.quota.size_bytes,
            "max_hours": key.quota.hours,
        },
        "created_at": f"{key.created_at.isoformat()}Z",
        "revoked_at": None if key.revoked_at is None else f"{key.revoked_at.isoformat()}Z",
    }
