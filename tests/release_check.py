"""Whether a tag may become a release: `python tests/release_check.py v0.1.0`, the first step of the workflow.

Prints the changelog's section of that version, which becomes the release's text. The exit status is 1 where
the tag is not the version of pyproject.toml and of the chart, and where the changelog has no such section.
Needs nothing but Python.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: release_check.py TAG")
    tag = sys.argv[1]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if tag != f"v{version}":
        sys.exit(f"the tag is {tag}, but the version in pyproject.toml is {version}")
    chart = (ROOT / "deploy" / "helm" / "clasp-search" / "Chart.yaml").read_text(encoding="utf-8")
    if f'appVersion: "{version}"' not in chart:
        sys.exit(f"the chart's appVersion is not {version}")
    print(notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version))


def notes(changelog: str, version: str) -> str:
    """The section of a version. Ends the check where there is none, or where it is empty."""
    found = re.search(
        rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if found is None or not found[1].strip():
        sys.exit(f"CHANGELOG.md says nothing under `## {version} - YYYY-MM-DD`")
    return found[1].strip()


if __name__ == "__main__":
    main()
