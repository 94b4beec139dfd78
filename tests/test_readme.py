"""Every command and every example of the README runs, as it stands there."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.service import RunningService

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("$ ").split("  #")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]
CURL = [command for command in COMMANDS if command.startswith("curl")]
CLASP = [command for command in COMMANDS if command.startswith(".venv/bin/clasp")]
MAKE = sorted(set(re.findall(r"make [a-z-]+", README)))


def test_the_readme_has_the_commands_these_tests_look_for() -> None:
    """A changed layout must not leave the tests below with nothing to run."""
    assert len(CURL) >= 2
    assert len(CLASP) >= 5
    assert {"make demo", "make serve", "make test"} <= set(MAKE)
    # the paper's model is gigabytes: test_paper and test_reindex run its verbs on small checkpoints
    known = {"curl", ".venv/bin/clasp", "make", "clasp", "pip", "export"}
    assert all(command.split()[0] in known for command in COMMANDS)


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_the_target(command: str) -> None:
    """`make demo` and `make serve` themselves are run by test_demo and by every test of the service."""
    subprocess.run([*command.split(), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_the_curl_commands_upload_and_find(tmp_path: Path) -> None:
    """The first thing anybody pastes into a terminal."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    answers = []
    with RunningService(tmp_path) as service:
        service.start()
        for command in CURL:
            here = command.replace("http://127.0.0.1:8000", str(service.client.base_url).rstrip("/"))
            done = subprocess.run(["bash", "-c", here], cwd=ROOT, check=True, capture_output=True)
            answers.append(json.loads(done.stdout))
    uploaded, found = answers
    assert (uploaded["id"], uploaded["status"]) == ("bees", "ready")
    assert [hit["id"] for hit in found["hits"]] == ["bees"]
    example = json.loads(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])
    assert found.keys() == example.keys()
    assert found["hits"][0].keys() == example["hits"][0].keys()


def test_the_commands_of_the_command_line_run(tmp_path: Path) -> None:
    """In the order of the README, on one data directory; with five of the samples, for time."""
    few = tmp_path / "app" / "samples"
    (few / "audio").mkdir(parents=True)
    lines = (ROOT / "app" / "samples" / "manifest.jsonl").read_text().splitlines(keepends=True)[:5]
    (few / "manifest.jsonl").write_text("".join(lines))
    for line in lines:
        name = json.loads(line)["audio"]
        shutil.copy(ROOT / "app" / "samples" / name, few / name)
    environment = os.environ | {"CLASP_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    for command in CLASP:
        here = command.replace(".venv/bin/clasp", f"{sys.executable} -m app.cli")
        done = subprocess.run(
            ["bash", "-c", here], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout


def test_the_python_example_runs(tmp_path: Path) -> None:
    """The engine is usable without the service, and says so with code."""
    (tmp_path / "app").symlink_to(ROOT / "app")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "bees"


def test_every_setting_is_in_the_readme() -> None:
    """A setting nobody can find does not exist."""
    from app.settings import Settings

    missing = [name for name in Settings.model_fields if f"CLASP_{name.upper()}" not in README]
    assert missing == []


def test_files_the_readme_points_at_exist() -> None:
    """Dead links are the first sign of a neglected house."""
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_compose_and_dockerfile_agree_with_the_service() -> None:
    """There is no container engine in the tests, so at least the names must be right."""
    from app.settings import Settings

    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    settings = {f"CLASP_{name.upper()}" for name in Settings.model_fields} | {"HF_ENDPOINT"}
    for service in compose["services"].values():
        if "build" in service:
            assert set(service["environment"]) <= settings | {"AWS_DEFAULT_REGION"}
    cpu, gpu = compose["services"]["clasp"], compose["services"]["clasp-gpu"]
    assert cpu["volumes"] == ["index_data:/data"]
    assert gpu["environment"]["CLASP_MODEL"] == "${CLASP_GPU_MODEL:-paper}"
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(gpu["build"]["args"]["EXTRAS"].split(",")) <= set(extras)
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"\bCLASP_[A-Z_]+(?==)", dockerfile)) <= settings
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name
