"""`clasp demo`: serve, index the sample recordings, ask about them in many languages, check the answers."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from app.cli.common import fail

if TYPE_CHECKING:
    import httpx

cli = typer.Typer()

START_WITHIN_S = 120
KEPT_SETTINGS = ("CLASP_MODEL", "CLASP_MODELS_DIR", "CLASP_DEVICE", "CLASP_THREADS")


@cli.command(help="Index the sample recordings, ask about them in many languages, and check the answers.")
def demo() -> None:
    """On a service of its own, with a temporary data directory and a free port; neither process nor file is
    left. Exit status 0 only if every question found the recording it is about first (and, in the long one,
    the right minute).
    """
    from app.samples import ask, index, lines

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the service ends, too
    recordings = lines("manifest.jsonl")
    questions = lines("questions.jsonl")
    with tempfile.TemporaryDirectory(prefix="clasp-demo-") as data_dir, _service(Path(data_dir)) as client:
        started = time.monotonic()
        index(client, recordings)
        seconds = sum(recording["duration_s"] for recording in recordings)
        print(
            f"{len(recordings)} recordings ({seconds:.0f} s) indexed in {time.monotonic() - started:.0f} s\n"
        )
        right = sum([ask(client, question) for question in questions])
    languages = len({question["lang"] for question in questions})
    print(f"\n{right} of {len(questions)} questions in {languages} languages found their recording first")
    if right != len(questions):
        raise typer.Exit(1)


@contextmanager
def _service(data_dir: Path) -> Iterator["httpx.Client"]:
    """A service of our own, ready; stopped however the block ends."""
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("CLASP_") or name in KEPT_SETTINGS
    }
    log_path = data_dir / "service.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - this program
            [sys.executable, "-m", "app.cli", "serve", "--host", "127.0.0.1", "--port", str(port)],
            env=kept | {"CLASP_DATA_DIR": str(data_dir / "index_data")},
            stderr=log,
            cwd=data_dir,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _wait_until_ready(client, process, log_path)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(client: "httpx.Client", process: subprocess.Popen[bytes], log: Path) -> None:
    import httpx

    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    fail(f"the service did not start:\n{log.read_text(errors='replace')}")
