"""What the documentation shows is so: every example runs as it stands there (tests/examples.py), and the site
that is made of the pages is whole and asks nobody else for anything."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.examples import (
    PAGES,
    Example,
    Reader,
    alike,
    examples,
    judge,
    pages_that_run,
    runs,
    unknown_settings,
)
from tests.service import ROOT

UNDERSTANDING = {"docs/tutorial.md"}
"""Pages whose answers mean something, so that the embedded model gives them."""
ALL = [example for page in PAGES for example in examples(page)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("source", list(pages_that_run()), ids=name)
def test_the_examples_of_a_page_run(source: Path, tmp_path: Path) -> None:
    """What anybody pastes into a terminal must do what the page says that it does."""
    follow(source, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("source", list(pages_that_run(slow=True)), ids=name)
def test_the_examples_that_take_long_run(source: Path, tmp_path: Path) -> None:
    """The same, with the blocks of the page that take minutes."""
    follow(source, tmp_path, slow=True)


def follow(page: Path, folder: Path, *, slow: bool) -> None:
    if shutil.which("curl") is None and any("$ curl" in example.text for example in examples(page)):
        pytest.skip("curl is not installed")
    program = "app.cli" if slow or name(page) in UNDERSTANDING else "tests.stand_in"
    with Reader(folder, program=program) as reader:
        for example in examples(page):
            if runs(example, slow=slow):
                reader.follow(example)


@pytest.mark.parametrize("example", [one for one in ALL if not runs(one, slow=True)], ids=str)
def test_an_example_that_is_not_run_is_right_as_far_as_can_be_known(example: Example) -> None:
    """Docker, GPUs and gigabytes are not here; a verb, option or file that is gone is seen all the same."""
    for command in example.commands:
        judge(command)


def test_nothing_escapes() -> None:
    """Else a page's layout could leave these tests with nothing to do."""
    assert len(PAGES) >= 25
    assert sum(runs(example) for example in ALL) >= 40
    assert {example.language for example in ALL} <= {
        "console", "python", "text", "json", "yaml", "toml", "mermaid",
    }  # fmt: skip
    for example in ALL:
        if example.language == "console":
            assert example.commands, f"{example}: a command has a prompt, `$ `"


def test_the_readme_shows_the_answer_that_the_tutorial_gets() -> None:
    """Clients are written by it. `confidence` is there where a model's scores were measured, unlike the
    stand-in's."""
    shown, given = (
        next(json.loads(one.text) for one in examples(ROOT / page) if one.text.startswith('{"query"'))
        for page in ("README.md", "docs/tutorial.md")
    )
    alike(shown, given, "README.md")


def test_the_pages_name_no_setting_that_is_gone() -> None:
    """Somebody would set it, and wonder."""
    assert {name(page): gone for page in PAGES if (gone := unknown_settings(page))} == {}


def test_the_site_is_whole_and_asks_nobody_else(tmp_path: Path) -> None:
    """A strict build fails on a dead link or anchor, and on a page that the navigation lacks. Whoever reads
    the site offline, or wants to be seen by nobody, gets all of it from where it is."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "search" / "search_index.json").is_file()
    for page in tmp_path.rglob("*.html"):
        for asked in Asked.by(page):
            assert not re.match(r"(https?:)?//", asked), f"{page.name} asks for {asked}"
    for path, anchor in re.findall(r"\]\(docs/([a-z-]+)\.md#([^)]+)\)", (ROOT / "README.md").read_text()):
        assert f'id="{anchor}"' in (tmp_path / f"{path}.html").read_text(), f"README.md: {path}.md#{anchor}"
    for sheet in tmp_path.rglob("*.css"):
        assert re.findall(r"url\(['\"]?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")) == []


class Asked(HTMLParser):
    """What a browser asks for by itself to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    @classmethod
    def by(cls, page: Path) -> list[str]:
        parser = cls()
        parser.feed(page.read_text(encoding="utf-8"))
        return parser.addresses

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(given.get("href") or "")
        if tag != "a":
            self.addresses += [given[name] or "" for name in ("src", "data", "poster") if name in given]
