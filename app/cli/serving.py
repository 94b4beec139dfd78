"""The verbs that run: serve, worker."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from app.cli.common import fail, verbs
from app.settings import Settings

cli = verbs()

_SERVE_HELP = f"""Serve the HTTP API, with one ingest worker.

Settings, from the environment or a .env file:

{Settings.described()}
"""


@cli.command(help=_SERVE_HELP)
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind to.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind to.", min=0, max=65535)] = None,
) -> None:
    import gc
    import signal
    import socket

    gc.disable()  # what is loaded from here on stays: no look for garbage among it, now or ever
    from app.main import Server, create_app
    from app.telemetry import configure_logging

    settings = Settings()
    address = (host if host is not None else settings.host, port if port is not None else settings.port)
    try:
        private = _is_loopback(address[0])
    except OSError as error:
        fail(f"cannot listen on {address[0]} port {address[1]}: {error.strerror or error}")
    if not private and not settings.allow_anonymous and not _keys_are_needed(settings):
        fail(
            f"{address[0] or 'every address'} can be reached from other machines, and there is no API key:"
            " make one (clasp keys create NAME --scope read,write,admin) or set CLASP_API_KEYS; or set"
            " CLASP_ALLOW_ANONYMOUS=true where something in front of the service checks"
        )
    configure_logging(settings.log_level)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit())  # uvicorn raises the signal again when it has shut down
    app = create_app(settings)
    try:
        listening = socket.create_server(
            address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        fail(f"cannot listen on {address[0]} port {address[1]}: {error.strerror or error}")
    _allow_descriptors(2 * settings.max_connections + 512)
    gc.freeze()
    gc.enable()
    Server(app, settings).run([listening])


def _allow_descriptors(wanted: int) -> None:
    """As far as the system lets us: without descriptors, searches fail before connections are refused."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there. OSError where nobody knows the host."""
    import ipaddress
    import socket

    if not host:  # every address there is
        return False
    found = {str(place[4][0]) for place in socket.getaddrinfo(host, None)}
    return all(ipaddress.ip_address(place).is_loopback for place in found)


def _keys_are_needed(settings: Settings) -> bool:
    from app.opening import open_configured_catalog
    from clasp_core.access import Keys

    catalog = open_configured_catalog(settings)
    try:
        return Keys(catalog, settings.api_keys).needed()
    finally:
        catalog.close()


@cli.command(help="Run one more ingest worker on the same data directory.")
def worker(
    alive: Annotated[
        Path | None, typer.Option(help="File to touch while it goes on, for a container's health check.")
    ] = None,
    supervised: Annotated[bool, typer.Option(hidden=True)] = False,
    owner: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    from app.telemetry import configure_logging
    from app.workers import work

    settings = Settings()
    configure_logging(settings.log_level)
    work(settings, owner=owner, supervised=supervised, alive=alive)
