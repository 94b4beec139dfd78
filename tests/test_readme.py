"""What the README and the files beside it say of each other is so; its examples are run by test_docs."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKE = sorted(set(re.findall(r"make [a-z-]+", README)))


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_the_target(command: str) -> None:
    """`make demo` and `make serve` themselves are run by test_demo and by every test of the service."""
    subprocess.run([*command.split(), "-n"], cwd=ROOT, check=True, capture_output=True)


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
