"""Debian's Chromium on the page that a real service serves. What the browser complains of fails a test."""

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.pages import SAMPLES
from tests.service import RunningService

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 60_000
PHONE = {"width": 360, "height": 740}


class Screen:
    """A tab of a browser that knows nothing yet, and what it complained of."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        self._forgiven: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda said: said.type == "error" and self.complaints.append(self._told(said)))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    @staticmethod
    def _told(said: Any) -> str:
        return f"{said.text} {said.location.get('url', '')}"

    def forgive(self, pattern: str) -> None:
        """What this test provokes: a browser complains of every answer that is an error."""
        self._forgiven.append(pattern)

    def check(self) -> None:
        unforgiven = [
            one for one in self.complaints if not any(re.search(known, one) for known in self._forgiven)
        ]
        assert not unforgiven, unforgiven

    def open(self, address: str = "") -> "Screen":
        self.page.goto(f"{self.url}/{address}")
        return self

    def button(self, name: str | re.Pattern[str]) -> Any:
        return self.page.get_by_role("button", name=name)

    def see(self, text: str | re.Pattern[str]) -> Any:
        """An element with this text, once it is there."""
        found = self.page.get_by_text(text).locator("visible=true").first
        found.wait_for()
        return found

    def drop(self, files: dict[str, bytes]) -> None:
        """As if the files were dragged here from elsewhere and dropped."""
        self.page.evaluate(
            """files => {
                const dataTransfer = new DataTransfer();
                for (const [name, content] of files) {
                    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
                    dataTransfer.items.add(new File([bytes], name));
                }
                for (const type of ["dragenter", "dragover", "drop"]) {
                    document.querySelector("main").dispatchEvent(
                        new DragEvent(type, {dataTransfer, bubbles: true, cancelable: true}));
                }
            }""",
            [[name, base64.b64encode(content).decode()] for name, content in files.items()],
        )

    def uploaded(self, done: int, of: int) -> None:
        """Waits until so many of those in the tray can be found."""
        self.page.locator("#uploads summary").get_by_text(f"{done} of {of} searchable").wait_for()

    def ask(self, question: str) -> Any:
        """The hits."""
        self.page.get_by_role("searchbox", name=re.compile("What was said|چه گفته شد")).fill(question)
        return self.found(lambda: self.page.keyboard.press("Enter"))

    def found(self, asking: Callable[[], object]) -> Any:
        """The hits of the question that this asks, and not of one before it."""
        hits = self.page.locator(".hit:not(.before)")
        self.page.evaluate("document.querySelectorAll('.hit').forEach(hit => hit.classList.add('before'))")
        asking()
        hits.first.wait_for()
        return hits

    def is_as_wide_as_the_screen(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def violations(self) -> list[str]:
        """What axe finds serious or critical in what is shown."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [
            f"{one['id']}: {node['html']} {node['failureSummary']}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is said into the browser's microphone, again and again: one of the samples."""
    import soundfile

    path = tmp_path_factory.mktemp("microphone") / "said.wav"
    samples, rate = soundfile.read(SAMPLES / "audio" / "en-lost-dog.opus")
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return path


@contextmanager
def launched(*arguments: str) -> Iterator[Any]:
    """Chromium without a window. It has a sandbox wherever it can: root has none."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=CHROMIUM, args=arguments, chromium_sandbox=os.geteuid() != 0
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def chromium(spoken: Path) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium): the page is not tested")
    pytest.importorskip("playwright", reason="no playwright: the page is not tested")
    with launched(
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={spoken}",
        "--autoplay-policy=no-user-gesture-required",
    ) as browser:
        yield browser


@pytest.fixture
def screens(chromium: Any, service: RunningService) -> Iterator[Callable[..., Screen]]:
    """Opens tabs, each of a person of its own; `lent` is whether the microphone is."""
    opened: list[Screen] = []

    def open_screen(*, lent: bool = True, **context: Any) -> Screen:
        settings = {"locale": "en-GB", "viewport": {"width": 1100, "height": 800}} | context
        person = chromium.new_context(**settings)
        if lent:
            person.grant_permissions(["microphone"])
        opened.append(Screen(person.new_page(), f"http://127.0.0.1:{service.port}"))
        return opened[-1].open()

    yield open_screen
    for screen in opened:
        screen.page.context.close()
    for screen in opened:
        screen.check()


@pytest.fixture
def screen(screens: Callable[..., Screen]) -> Screen:
    return screens()


def sample(recording_id: str) -> bytes:
    return (SAMPLES / "audio" / f"{recording_id}.opus").read_bytes()


def questions() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLES / "questions.jsonl").read_text("utf-8").splitlines()]
