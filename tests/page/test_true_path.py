"""What the page is for, with the model that people get: they add a recording, ask, and hear the answer."""

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import soundfile

from app.pages import SAMPLES
from tests.page.conftest import Screen, questions, sample
from tests.service import RunningService, eventually

pytestmark = pytest.mark.weights
TOPICS = ("en-bees", "en-train-delay", "en-volcano")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("true")) as running:
        yield running.start()


def evening() -> tuple[bytes, list[float]]:
    """A recording of several topics with pauses between, and the second where each begins."""
    pieces: list[Any] = []
    starts: list[float] = []
    for name in TOPICS:
        samples, rate = soundfile.read(SAMPLES / "audio" / f"{name}.opus")
        starts.append(sum(map(len, pieces)) / rate)
        pieces += [samples, np.zeros(round(1.5 * rate))]
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(pieces), rate, format="FLAC")
    return file.getvalue(), starts


def playing_at(screen: Screen) -> int:
    return int(screen.page.locator(".hit .slider").first.get_attribute("aria-valuenow"))


def test_a_spoken_sentence_is_found_and_heard_at_its_second(screens: Callable[..., Screen]) -> None:
    """The purpose of it: three minutes after cloning, somebody hears the answer in their own recording."""
    screen = screens()
    recording, starts = evening()
    screen.drop({"evening.flac": recording, "dog.opus": sample("en-lost-dog")})
    screen.uploaded(2, of=2)

    hits = screen.ask("the train is late because a tree fell on the line")
    best = hits.first
    assert best.get_by_role("heading").inner_text() == "evening.flac"
    assert re.fullmatch(r"\D*\d+%", best.locator("summary").inner_text().replace("\n", " "))
    assert best.locator(".drawn path").get_attribute("d").count("M") > 100
    best.locator("button.play").click()
    best.locator(".head:visible").first.wait_for()
    at = playing_at(screen)
    assert starts[1] - 1 <= at <= starts[2]
    eventually(lambda: playing_at(screen) > at, within_s=20)
    # and the passage's end is the end, though the recording goes on
    best.get_by_role("button", name=re.compile("^Play")).first.wait_for()
    assert playing_at(screen) <= starts[2] + 1

    page_language = screen.page.get_by_role("combobox", name="Language of this page")
    screen.found(lambda: page_language.select_option("fa"))
    hits = screen.ask(questions()[0]["q"])
    assert hits.first.get_by_role("heading").inner_text() == "evening.flac"
    assert "۰:۰۷" in hits.first.locator(".mark.best").get_attribute("aria-label")


def test_a_question_may_be_spoken_or_another_recording(screens: Callable[..., Screen]) -> None:
    """Who cannot type, or has only the sound of it, asks all the same."""
    screen = screens()
    microphone = screen.button(re.compile("Ask by voice"))
    microphone.hover()
    screen.page.mouse.down()
    screen.see(re.compile("Listening"))
    screen.page.wait_for_timeout(3500)
    screen.page.mouse.up()
    hits = screen.page.locator(".hit")
    hits.first.wait_for()
    assert hits.first.get_by_role("heading").inner_text() == "dog.opus"

    others = screen.found(hits.first.get_by_role("link", name="More like this").click)
    screen.page.locator(".asked").get_by_text("More like").wait_for()
    assert "dog.opus" not in others.locator("h2").all_inner_texts()
