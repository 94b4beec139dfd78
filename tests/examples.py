"""The examples of the documentation: found in its pages, run as they stand there, or judged without that.

Every fenced block is one. By its language:

    console   each `$ ` command, in bash. `clasp` is the real command line on the stand-in encoder, and
              127.0.0.1:8000 a service on it, which `clasp serve` and `make serve` start; pip is not run
    python    the page's blocks one after the other, in one namespace
    text      what the example before it prints; `...` stands for anything
    json      after another example, an answer with the members of what that printed last
    yaml      (and toml, and json with nothing before it) is well formed
    mermaid   a diagram; to build the site is to draw it

The blocks of a page run in its order, in a folder that is also the home, with a few of the samples, which are
`recordings/` as well. A comment directly before a block, which no reader sees, says what else is to be said:

    <!-- not run: REASON -->     its commands, options, extras and modules must exist all the same
    <!-- slow: REASON -->        run with the tests marked `slow`
    <!-- file: NAME -->          a file of the folder, for the blocks after it
    <!-- given: COMMAND -->      what the page takes for granted
"""

import contextlib
import doctest
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml
from markdown_it import MarkdownIt

from app.cli import cli
from app.settings import Settings
from tests.conftest import SAMPLES, lines
from tests.forking import SOCKET, address
from tests.service import ROOT, RunningService, environment

PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "clasp_core/weights/*/*.md", f"{SAMPLES.relative_to(ROOT)}/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "client.md"  # tests/client/test_adapters.py runs it, on the service of its other tests
)
WELL_FORMED = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads, "mermaid": str}
NOTE = re.compile(r"<!-- (not run|slow|file|given): (.+) -->")
ADDRESS = "http://127.0.0.1:8000"
FEW = ("en-train-delay", "en-bees", "fr-lift")
"""Recordings of the samples that a page's folder has."""
CLASP = re.compile(
    r"(?:^|[;|(]|\bdo\b|(?:compose (?:exec|run)|kubectl exec)\b[^\n|;>]*?\s)"
    r"\s*(?:[A-Z_]+=(?:'[^']*'|\S*)\s+)*"
    r"(?:\.venv/bin/)?clasp ([a-z](?:\\\n|[^|;>#\n])*)",
    re.MULTILINE,
)
"""A verb of the command line with its arguments, wherever in a command."""


@dataclass(frozen=True)
class Example:
    """A fenced block. `note` is what a comment before it says of it, if one does."""

    page: Path
    line: int
    language: str
    text: str
    note: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Of a console block: what stands behind each prompt, with the lines that belong to it."""
        return [command.strip() for command in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]]


def examples(page: Path) -> list[Example]:
    """All of a page, in its order; AssertionError where a block could escape being one."""
    found: list[Example] = []
    note, reason = "", ""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block" and (said := NOTE.fullmatch(token.content.strip())):
            note, reason = said.groups()
        elif token.type in ("fence", "code_block"):
            line = (token.map or [0])[0] + 1
            assert token.type == "fence", f"{page.name}:{line}: a block without a language is no example"
            found.append(Example(page, line, token.info, token.content, note, reason))
            note, reason = "", ""
    return found


# --- judged without being run


def judge(command: str) -> None:
    """What can be known of a command without running it: verbs, options, extras, targets, modules, files."""
    for arguments in CLASP.findall(command):
        _parse(shlex.split(arguments.replace("\\\n", " "), comments=True))
    for extras in re.findall(r"pip install .*clasp-search\[([\w,-]+)\]", command):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(extras.split(",")) <= set(known), extras
    for target in re.findall(r"^make ([a-z-]+)", command):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    for module, options in re.findall(r"python -m (tests\.\w+)((?:\\\n|[^\n#])*)", command):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations:
            spec = importlib.util.find_spec(f"{module}.__main__")
        assert spec is not None, module
        assert spec.origin is not None
        source = Path(spec.origin).read_text()
        for option in re.findall(r"--[a-z-]+", options):
            assert f'"{option}"' in source, f"{module} has no {option}"
    if script := re.match(r"(?:python )?((?:deploy|samples|app/samples)/\S+)", command):
        assert (ROOT / script[1]).is_file(), script[1]


def _parse(arguments: list[str]) -> None:
    """As the command line would; raises its UsageError for a verb or an option that it has not."""
    command: Any = typer.main.get_command(cli)
    context = typer.Context(command, info_name="clasp")
    while hasattr(command, "resolve_command"):
        _, command, arguments = command.resolve_command(context, arguments)
        context = typer.Context(command, parent=context)
    command.make_parser(context).parse_args(arguments)


def unknown_settings(page: Path) -> set[str]:
    """Names like a setting's that neither the service reads nor what surrounds it."""
    others = [
        "Makefile",
        "docker-compose.yml",
        "deploy/Caddyfile",
        "clasp_core/faults.py",
        "tests/conftest.py",
    ]
    read = [f"CLASP_{name.upper()}" for name in Settings.model_fields]
    read += [(ROOT / other).read_text(encoding="utf-8") for other in others]
    known, named = (
        set(re.findall(r"\bCLASP_[A-Z0-9_]+\b", text))
        for text in (" ".join(read), page.read_text(encoding="utf-8"))
    )
    return {name for name in named - known if not name.startswith("CLASP_TEST_")}


# --- run


class Reader:
    """Somebody who follows a page to the letter, in a folder of their own."""

    def __init__(self, folder: Path, *, program: str = "tests.stand_in") -> None:
        """`program` is the module that is `clasp`."""
        self.folder = folder
        self.program = program
        self.printed = self._last = ""
        self.service: RunningService | None = None
        self._namespace: dict[str, Any] = {"__name__": "__main__"}
        self._exported: dict[str, str] = {}
        self._opened = contextlib.ExitStack()
        self._furnish()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def follow(self, example: Example) -> None:
        """Do what an example says; AssertionError where it is not as the page has it."""
        text = self._here(example.text)
        if example.note == "file":
            (self.folder / example.reason).write_text(example.text, encoding="utf-8")
            return
        if example.note == "given":
            self._run(self._here(example.reason))
        if example.language == "console":
            printed = [self._run(self._here(command)) for command in example.commands]
            self.printed, self._last = "".join(printed), printed[-1]
        elif example.language == "python":
            self.printed = self._last = self._python(compile(text, str(example), "exec"))
        elif example.language == "text":
            same = doctest.OutputChecker().check_output(text, self.printed, doctest.ELLIPSIS)
            assert same, f"{example}: it printed\n{self.printed}"
        elif example.language == "json" and self.printed:
            alike(json.loads(text), json.loads(self._last), str(example))
            self.printed = ""
        else:
            WELL_FORMED[example.language](text)

    def _furnish(self) -> None:
        """The folder as the pages take it for granted."""
        samples = self.folder / SAMPLES.relative_to(ROOT)
        (samples / "audio").mkdir(parents=True)
        chosen = [line for line in lines(SAMPLES / "manifest.jsonl") if line["id"] in FEW]
        for name in ("manifest.jsonl", *(line["audio"] for line in chosen)):
            shutil.copy(SAMPLES / name, samples / name)
        (samples / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
        (self.folder / "recordings").symlink_to(samples / "audio")
        programs = self.folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        self._program("python", f'exec {sys.executable} "$@"')
        self._program("clasp", f'exec {sys.executable} -m tests.forking {self.program} "$@"')
        self._program("curl", f'exec {shutil.which("curl")} --silent --show-error --fail-with-body "$@"')

    def _program(self, name: str, script: str) -> None:
        program = self.folder / ".venv" / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def _here(self, text: str) -> str:
        """An example's text with what is elsewhere here."""
        if ADDRESS in text or "127.0.0.1:8000" in text:
            text = text.replace(ADDRESS, str(self._served().client.base_url).rstrip("/"))
        return text.replace("/mnt/", f"{self.folder}/mnt/")

    def _served(self) -> RunningService:
        if self.service is None:
            self.service = RunningService(self.folder, program=self.program)
            self._opened.enter_context(self.service)
            self.service.start()
        return self.service

    def _run(self, command: str) -> str:
        judge(command)
        if re.match(r"(make|([A-Z_]+=\S+ )*clasp) serve\b", command):
            self._served()
            return ""
        if command.startswith(("make ", "pip install ")):
            return ""
        if exported := re.match(r"export (.*)", command):
            pairs = shlex.split(exported[1], comments=True)
            self._exported |= {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
            return ""
        programs = self.folder / ".venv" / "bin"
        home = {
            SOCKET: address(),
            "HOME": str(self.folder),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=environment(threads=1) | home | self._exported,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _python(self, code: Any) -> str:
        printed = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed):
            exec(code, self._namespace)
        return printed.getvalue()


def alike(shown: Any, given: Any, where: str) -> None:
    """Whether an answer has the members that the documentation shows, and no others."""
    if isinstance(shown, dict):
        assert isinstance(given, dict), where
        assert shown.keys() == given.keys(), where
        for name in shown:
            alike(shown[name], given[name], f"{where}, {name}")
    elif isinstance(shown, list):
        assert isinstance(given, list), where
        for one, other in zip(shown[:1], given[:1], strict=True):
            alike(one, other, where)
    elif isinstance(shown, str):
        assert isinstance(given, str), where


def runs(example: Example, *, slow: bool = False) -> bool:
    return example.note != "not run" and (slow or example.note != "slow")


def pages_that_run(*, slow: bool = False) -> Iterator[Path]:
    for page in PAGES:
        if any(runs(one, slow=slow) and (not slow or one.note == "slow") for one in examples(page)):
            yield page
