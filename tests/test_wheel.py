"""What is published: a wheel that holds everything and serves anywhere. `make wheel-check` installs it."""

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.release_check import notes
from tests.service import ROOT, RunningService
from tests.wheel_check import PACKAGES, packed

VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def built(source: Path, kind: str, target: Path) -> Path:
    """A wheel or a source archive by the build backend itself, which is in the development install."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_what_git_has_of_the_packages(wheel: Path) -> None:
    """A page, a migration or a calibration that is left behind is missed at its first use, by a user; tests
    that slip in are imported by somebody one day."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {name for name in listed.splitlines() if (ROOT / name).is_file()}
    assert packed(wheel) == files
    assert {"clasp_core/py.typed", "app/page/index.html", "app/samples/manifest.jsonl"} < files
    with zipfile.ZipFile(wheel) as file:
        metadata = {Path(name).name for name in file.namelist()} & {"LICENSE", "NOTICE", "entry_points.txt"}
    assert metadata == {"LICENSE", "NOTICE", "entry_points.txt"}


def test_the_source_archive_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """Byte for byte, in another folder and at another time: who doubts a published wheel builds it anew."""
    with tarfile.open(built(ROOT, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert not (source / "tests").exists()
    assert built(source, "wheel", tmp_path / "again").read_bytes() == wheel.read_bytes()


def test_the_wheel_serves_anywhere(wheel: Path, tmp_path: Path) -> None:
    """Out of its checkout, in a folder that knows nothing of it: the page, the samples as the page fetches
    them, an upload, a search."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    (site / "tests").symlink_to(ROOT / "tests")  # for the model that costs nothing
    page = site / "app" / "page" / "index.html"
    page.write_bytes(page.read_bytes() + b"<!-- this very file -->")

    def elsewhere(command: list[str], *, env: dict[str, str], **rest: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=env | {"PYTHONPATH": str(site)}, **rest)

    with RunningService(tmp_path, program="tests.stand_in") as service:
        service.new_process = elsewhere
        service.start()
        assert service.client.get("/").content == page.read_bytes()
        assert service.client.get("/openapi.json").json()["info"]["version"] == VERSION
        for name in ("manifest.jsonl", "questions.jsonl"):
            assert service.client.get(f"/page/samples/{name}").is_success
        recordings = service.client.get("/page/samples/manifest.jsonl").text.splitlines()
        audio = [service.client.get(f"/page/samples/{json.loads(line)['audio']}") for line in recordings]
        assert {answer.headers["content-type"] for answer in audio} == {"audio/ogg"}
        assert {answer.content[:4] for answer in audio} == {b"OggS"}
        assert service.client.get("/page/samples/__init__.py").status_code == 404
        service.ready(audio[0].content, id="a")
        assert [hit["id"] for hit in service.found("anything")] == ["a"]
        assert service.stop() == 0


def test_there_is_one_version() -> None:
    """pyproject.toml has it; a chart that named another would run another's image."""
    command = [sys.executable, "-m", "app.cli", "--version"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told == f"clasp-search {VERSION}\n"
    chart = yaml.safe_load((ROOT / "deploy" / "helm" / "clasp-search" / "Chart.yaml").read_text())
    assert chart["appVersion"] == VERSION
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_a_release_is_what_its_tag_says() -> None:
    """What is published under a version stays there: a tag that slipped, or a version that the changelog does
    not know, must end the workflow at its first step."""
    command = [sys.executable, str(ROOT / "tests" / "release_check.py"), "v99.0.0"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "99.0.0" in refused.stderr
    log = (
        "# Changelog\n\n## Unreleased\n\n## 1.1.0 - 2026-02-01\n\n- One.\n\n## 1.0.0 - 2026-01-01\n\n- Two.\n"
    )
    assert [notes(log, version) for version in ("1.1.0", "1.0.0")] == ["- One.", "- Two."]
    for version in ("1.2.0", "1.0", "Unreleased"):
        with pytest.raises(SystemExit, match="says nothing"):
            notes(log, version)
