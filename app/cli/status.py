"""`clasp status`: the library at a glance. It only looks, and is safe beside a running service."""

import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.cli.common import EXIT_STATUS, AsJson, examples, print_json, print_table, size, verbs
from app.settings import Settings

if TYPE_CHECKING:
    from clasp_core.catalog import Catalog

cli = verbs()

_ANSWERS_WITHIN_S = 2.0
_STATUSES = ("ready", "pending", "processing", "failed")


@cli.command(
    help="What the library holds and what it is at, at a glance. Safe beside a running service.",
    epilog=examples("clasp status", "clasp status --json", after=EXIT_STATUS),
)
def status(as_json: AsJson = False) -> None:
    from app.opening import read_configured_catalog

    settings = Settings()
    with read_configured_catalog(settings) as catalog:
        seen = _seen(catalog, settings)
    seen["service"] = service_at(settings.host, settings.port)
    if as_json:
        print_json(seen)
    else:
        _show(seen)


def _seen(catalog: "Catalog", settings: Settings) -> dict[str, Any]:
    counts, collections = catalog.counts(), catalog.collections()
    active, oldest = catalog.active(), catalog.oldest_pending()
    now = datetime.now(UTC).replace(tzinfo=None)
    return {
        "data_dir": str(settings.data_dir.resolve()),
        "catalogue": catalog.database.dialect,
        "model": None if active is None else {"name": active.name, "fingerprint": active.fingerprint},
        "configured_model": settings.model,
        "recordings": {status: counts.get(status, 0) for status in _STATUSES},
        "duration_s": round(sum(held.duration_s for held in collections), 3),
        "segments": sum(held.segments for held in collections),
        "collections": [held._asdict() for held in collections],
        "failures": catalog.failures(),
        "queue": {
            "oldest_s": None if oldest is None else max(0.0, (now - oldest).total_seconds()),
            "workers_at_work": catalog.at_work(),
        },
        "index": _index(settings, catalog.last_change()[0]),
        "bytes": {
            "recordings": catalog.size_bytes(),
            "catalogue": _size_of(settings.data_dir.glob("catalog.sqlite3*")),
            "index": _size_of((settings.data_dir / "index").glob("*")),
        },
    }


def _index(settings: Settings, last_change: int) -> dict[str, Any]:
    """By its snapshot; what a running service has in memory may be ahead of that."""
    from clasp_core.index import Snapshot

    engine = settings.vector_store.partition(":")[0]
    if engine == "milvus":
        return {"engine": engine, "kind": "ivf" if settings.vector_index == "ivf" else "flat"}
    try:
        snapshot = Snapshot.read(settings.data_dir / "index")
    except (OSError, ValueError, TypeError, RuntimeError):
        return {"engine": engine, "kind": None, "vectors": 0, "changes_behind": last_change}
    behind = max(0, last_change - snapshot.seq)
    return {"engine": engine, "kind": snapshot.kind, "vectors": snapshot.count, "changes_behind": behind}


def _size_of(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except OSError:  # gone meanwhile
            continue
    return total


def service_at(host: str, port: int) -> dict[str, Any]:
    """What answers there: `state` is `ready`, `not ready`, `something else` or `nothing`."""
    place = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - what is bound to
    found: dict[str, Any] = {"address": f"http://{f'[{place}]' if ':' in place else place}:{port}"}
    connection = HTTPConnection(place, port, timeout=_ANSWERS_WITHIN_S)
    try:
        connection.request("GET", "/readyz")
        answer = json.loads(connection.getresponse().read(1 << 16))
        if answer.get("status") == "ready":
            return found | {"state": "ready", "degraded": answer.get("degraded", [])}
        if answer.get("code") == "not_ready":
            return found | {"state": "not ready", "reason": str(answer.get("detail", ""))}
    except OSError:
        return found | {"state": "nothing"}
    except (HTTPException, ValueError, AttributeError):
        pass
    finally:
        connection.close()
    return found | {"state": "something else"}


def _show(seen: dict[str, Any]) -> None:
    from rich.table import Table

    counts = seen["recordings"]
    rows = {
        "library": f"{seen['data_dir']}, catalogue in {seen['catalogue']}",
        "model": _model(seen),
        "recordings": ", ".join(f"{counts[status]:,} {status}" for status in _STATUSES if counts[status])
        or "none",
        "sound": f"{seen['duration_s'] / 3600:,.1f} h in {seen['segments']:,} segments",
        "queue": _queue(seen),
        "index": _index_in_words(seen["index"]),
        "bytes": ", ".join(f"{size(count)} {what}" for what, count in seen["bytes"].items()),
        "service": _service(seen["service"]),
    }
    if seen["failures"]:
        rows["failed by"] = ", ".join(f"{code} {count:,}" for code, count in seen["failures"].items())
    for name, value in rows.items():
        sys.stdout.write(f"{name:10}  {value}\n")
    if len(seen["collections"]) > 1:
        table = Table(*("collection", "recordings", "ready", "failed", "hours", "segments"), box=None)
        for held in seen["collections"]:
            counted = [f"{held[name]:,}" for name in ("recordings", "ready", "failed")]
            hours = f"{held['duration_s'] / 3600:,.1f}"
            table.add_row(held["name"], *counted, hours, f"{held['segments']:,}")
        sys.stdout.write("\n")
        print_table(table)


def _model(seen: dict[str, Any]) -> str:
    if seen["model"] is None:
        return f"none yet (CLASP_MODEL is {seen['configured_model']})"
    return f"{seen['model']['name'] or 'of no name'} ({seen['model']['fingerprint']})"


def _queue(seen: dict[str, Any]) -> str:
    queue = seen["queue"]
    waiting = "empty"
    if queue["oldest_s"] is not None:
        waiting = f"the oldest has waited {queue['oldest_s']:,.0f} s"
    return f"{waiting}; {queue['workers_at_work']} workers at work"


def _index_in_words(index: dict[str, Any]) -> str:
    if index["engine"] == "milvus":
        return f"{index['kind']} in Milvus"
    if index["kind"] is None:
        return f"{index['engine']}, no snapshot yet: it is made of the catalogue"
    behind = index["changes_behind"]
    said = f"{index['kind']} in {index['engine']}, {index['vectors']:,} vectors"
    return said + (f" in the snapshot, {behind:,} changes behind" if behind else "")


def _service(service: dict[str, Any]) -> str:
    match service:
        case {"state": "ready", "degraded": [_, *_] as degraded}:
            said = f"ready, but not well: {', '.join(degraded)}"
        case {"state": "not ready", "reason": reason}:
            said = f"not ready: {reason}"
        case {"state": "nothing"}:
            said = "nothing answers"
        case {"state": state}:
            said = f"{state} answers" if state == "something else" else str(state)
    return f"{said}, at {service['address']}"
