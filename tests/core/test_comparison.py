"""Comparing systems: the parts that need no model. What the verb reports is `tests/app/test_compare.py`'s."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clasp_core.comparison import BABBLE, compare, conditions_from, edits, plot, systems
from clasp_core.errors import InvalidField, InvalidManifest, ModelUnavailable
from clasp_core.transcription import open_transcriber
from tests.conftest import SAMPLES


def slow_edits(truth: str, written: str) -> int:
    """Levenshtein's recursion, as it is written down."""
    if not truth or not written:
        return len(truth) + len(written)
    if truth[0] == written[0]:
        return slow_edits(truth[1:], written[1:])
    fewest = min(
        slow_edits(truth[1:], written), slow_edits(truth, written[1:]), slow_edits(truth[1:], written[1:])
    )
    return 1 + fewest


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edits_equal_the_definition(truth: str, written: str) -> None:
    """Character error is what transcribers are known by; the fast way must count as the slow one."""
    assert edits(truth, written) == slow_edits(truth, written)


def test_edits_of_long_texts() -> None:
    """A looping transcript is long: its rest counts as insertions, and costs no memory of its square."""
    assert edits("ab" * 500, "ab" * 2000) == 3000
    assert edits("کتاب", "كتاب") == 1


def test_conditions_are_recipes_under_their_names() -> None:
    """Names come from people; `clean` and `noise:10` are what they write, and the report shows them so."""
    recipes = conditions_from(["clean", "noise:10", "noise:babble:0", "speed:0.8+noise:-5", "telephone"])
    assert list(recipes) == ["clean", "noise:10", "noise:babble:0", "speed:0.8+noise:-5", "telephone"]
    assert recipes["clean"].steps == ()
    assert (recipes["noise:10"].steps[0].kind, recipes["noise:10"].steps[0].range) == ("pink", (10.0, 10.0))
    assert recipes["noise:babble:0"].needs_babble
    assert [step.name for step in recipes["speed:0.8+noise:-5"].steps] == ["speed", "noise"]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["clean", "clean"], "twice"),
        ([], "at least one"),
        (["rain:3"], "rain"),
        (["speed:900"], "0.25 to 4"),
        (["noise:loud"], "loud"),
    ],
)
def test_conditions_that_cannot_be_are_named(names: list[str], complaint: str) -> None:
    """Before an hour of embedding, not after it."""
    with pytest.raises(InvalidField, match=complaint):
        conditions_from(names)


def test_transcribers_search_by_the_first_models_text() -> None:
    """Reference D3: the baseline and the model differ in what hears, not in what reads the question."""
    specs = systems(["mini", "/a/folder"], ["whisper-base"], threads=3)
    assert [(spec.name, spec.kind, spec.text_model, spec.threads) for spec in specs] == [
        ("mini", "model", "mini", 3),
        ("/a/folder", "model", "/a/folder", 3),
        ("whisper-base", "transcription", "mini", 3),
    ]
    with pytest.raises(InvalidField, match="twice"):
        systems(["mini", "mini"])
    with pytest.raises(InvalidField, match="needs a model"):
        systems([], ["whisper-base"])


def test_a_transcriber_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A typing error must name what there is instead."""
    for name in ("whisper-huge", str(tmp_path)):
        with pytest.raises(ModelUnavailable, match="whisper-base, whisper-base-padded"):
            open_transcriber(name)


def test_what_cannot_be_compared_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    """A model that is not there, an empty selection, babble without voices: each in its own words."""
    manifest = SAMPLES / "manifest.jsonl"
    with pytest.raises(ModelUnavailable, match="no model 'huge'"):
        compare(systems(["huge"]), manifest)
    with pytest.raises(InvalidManifest, match="no item"):
        compare(systems(["mini"]), manifest, split="eval")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(manifest.read_text().splitlines(keepends=True)[:BABBLE]))
    with pytest.raises(InvalidField, match="Babble needs"):
        compare(systems(["mini"]), few, conditions=["noise:babble:5"])


def a_report(conditions: list[str]) -> dict[str, object]:
    """What `plot` reads of a report, for two systems."""

    def result(value: float) -> dict[str, object]:
        figures = {"hits@1": value, "ci95": {"hits@1": [value - 0.1, value + 0.05]}}
        directions = {"text_to_speech": figures, "speech_to_text": figures}
        return {"overall": directions, "macro": {"lang": {"least": 24, "groups": []}}}

    values = np.linspace(0.9, 0.2, len(conditions)).tolist()
    results = {name: result(value) for name, value in zip(conditions, values, strict=True)}
    return {
        "conditions": conditions,
        "systems": {"mini": {"results": results}, "other": {"results": results}},
    }


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture_shows_every_system_and_condition(tmp_path: Path, suffix: str) -> None:
    """A curve that is missing from a picture is missed by nobody."""
    conditions = ["clean", "noise:10", "noise:0"]
    path = tmp_path / f"curves{suffix}"
    plot(a_report(conditions), path)
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    drawn = path.read_text()
    for word in (*conditions, "mini", "other", "text to speech", "speech to text", "hits@1, whole pool"):
        assert f"<!-- {word} -->" in drawn
