"""The packages as a stranger gets them: `make wheel-check`, minutes, and wants a package index.

Builds wheel and source archive from a clone of HEAD, twice, and compares them with each other and with what
git has; installs the wheel in an empty environment; and there, in another folder, runs the demo, serves,
indexes and searches. Prints a line with its seconds for each step; the exit status is 0 only if all is well.
Run by a Python that has `build` and `twine`, which is what `make` sees to.
"""

import filecmp
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("app", "clasp_core")
START_WITHIN_S = 120
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("CLASP_", "PYTHON"))}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="clasp-wheel-") as folder:
        check(Path(folder))
    print("\nEverything is as it should be.")


def check(place: Path) -> None:
    clone = place / "clone"
    run("git", "clone", "--quiet", ROOT, clone)
    with step("wheel and source archive are built, and described well"):
        wheel, archive = built(clone, place / "dist")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive)
    with step("built again elsewhere they are the same bytes"):
        run("git", "clone", "--quiet", clone, place / "other" / "clone")
        for one, other in zip(
            (wheel, archive), built(place / "other" / "clone", place / "again"), strict=True
        ):
            assert filecmp.cmp(one, other, shallow=False), f"{one.name} differs"
    with step("the wheel holds what git has of the packages, and nothing else"):
        held = packed(wheel)
        tracked = set(run("git", "-C", clone, "ls-files", *PACKAGES).splitlines())
        assert held == tracked, f"too much or too little: {sorted(held ^ tracked)}"
    with step("it is installed in an empty environment"):
        venv.create(place / "env", with_pip=True)
        pip = (place / "env" / "bin" / "python", "-m", "pip", "install", "--quiet")
        bounds = ("--constraint", clone / "constraints.txt")
        index = os.environ.get("CLASP_TORCH_INDEX")
        run(*pip, *bounds, *(("--index-url", index) if index else ()), "torch")
        run(*pip, *bounds, wheel)
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    clasp = place / "env" / "bin" / "clasp"
    with step("it says its version"):
        version = run(clasp, "--version", cwd=elsewhere).split()[-1]
        assert wheel.name.split("-")[1] == version, version
    with step("the demo's questions find their recordings, and it leaves nothing"):
        print(run(clasp, "demo", cwd=elsewhere).splitlines()[-1])
        assert not list(elsewhere.iterdir())
    bees = clone / "app" / "samples" / "audio" / "en-bees.opus"
    with step("it serves the page, takes a recording and finds it"):
        check_service(clasp, elsewhere, bees.read_bytes())
    with step("it indexes and searches without HTTP"):
        run(clasp, "index", bees.parent / "fr-museum.opus", "--lang", "fr", cwd=elsewhere)
        found = json.loads(run(clasp, "search", "bees in their hive", "--json", cwd=elsewhere))
        assert [hit["lang"] for hit in found["hits"]] == ["en", "fr"], found
    with step("the source archive installs the same files"):
        run(*pip, "--no-deps", "--target", place / "from-source", archive)
        top = [place / "from-source" / name for name in PACKAGES]
        files = {path for folder in top for path in folder.rglob("*") if path.is_file()}
        names = {
            path.relative_to(place / "from-source").as_posix() for path in files if path.suffix != ".pyc"
        }
        assert names == held, f"too much or too little: {sorted(names ^ held)}"


def run(*command: object, cwd: Path | None = None) -> str:
    """What it prints. Ends the check where it fails."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=cwd, env=CLEAN, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"BAD {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def step(name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    except AssertionError as error:
        sys.exit(f"BAD {name}: {error}")
    print(f"ok  {name} ({time.monotonic() - started:.0f} s)", flush=True)


def built(source: Path, dist: Path) -> tuple[Path, Path]:
    """Wheel and source archive; the wheel is built from the archive."""
    run(sys.executable, "-m", "build", source, "--outdir", dist)
    (wheel,), (archive,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return wheel, archive


def packed(wheel: Path) -> set[str]:
    """Names of the files in a wheel, but for its metadata."""
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if not name.endswith("/")]
    return {name for name in names if not name.partition("/")[0].endswith(".dist-info")}


def check_service(clasp: Path, folder: Path, recording: bytes) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen([clasp, "serve", "--port", str(port)], cwd=folder, env=CLEAN, stderr=log)
    try:

        def answer(path: str, body: bytes | None = None, **headers: str) -> Any:
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                content = response.read()
                return json.loads(content) if "json" in response.headers["content-type"] else content

        deadline = time.monotonic() + START_WITHIN_S
        while True:
            try:
                answer("/readyz")
                break
            except (urllib.error.URLError, ConnectionError):
                told = (folder / "service.log").read_text(errors="replace")
                assert process.poll() is None, told
                assert time.monotonic() < deadline, told
                time.sleep(0.2)
        assert b"<html" in answer("/"), "no page"
        record = answer(
            "/audio?id=bees&lang=en", recording, **{"Content-Type": "audio/ogg", "Prefer": "wait=60"}
        )
        assert record["status"] == "ready", record
        question = urllib.parse.urlencode({"q": "زنبورها در زمستان داخل کندو می‌مانند", "lang": "fa"})
        assert [hit["id"] for hit in answer(f"/search?{question}")["hits"]] == ["bees"]
    finally:
        process.terminate()
        ended = process.wait(60)
    assert ended == 0, f"it ended with {ended}"


if __name__ == "__main__":
    main()
