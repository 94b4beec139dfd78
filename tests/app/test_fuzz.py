"""Short runs of what is run long by hand (CONTRIBUTING.md): requests by the API's description, hostile files,
and all that reads strangers' bytes."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clasp_core import sandbox
from tests.fuzz_api import Fuzzed
from tests.fuzz_targets import BOUNDARY, SEEDS, TARGETS, decode_bytes
from tests.hostile import attack, files


def test_the_api_is_what_its_description_says(tmp_path: Path) -> None:
    """Random requests by the description, and chains of them, with a tenant's key: answers have a described
    status, type and form, errors are problems with known codes, and nothing of others is shown."""
    fuzzed = Fuzzed(tmp_path)
    with fuzzed.service:
        fuzzed.start()
        fuzzed.round("tenant", 1, examples=12, phases="fuzzing,stateful")
        fuzzed.round("reader", 2, examples=12, phases="fuzzing")
        summary = fuzzed.summary()
    assert summary["passed"], summary
    assert summary["cases"] >= 200


def test_two_dozen_hostile_files_harm_nothing(tmp_path: Path) -> None:
    """Each comes to an end that has a name, the service stays small and goes on answering, and takes honest
    recordings afterwards."""
    summary = attack(tmp_path, count=24, seed=1)
    assert summary["complaints"] == []
    assert summary["outcomes"]["ready"] > 3
    assert len(summary["outcomes_by_family"]) > 20


_PLAIN = st.sampled_from(
    ["1", "1.0", "-0", "1e999", "NaN", "null", "true", '"1"', '"\\u0000"', "[]", '[1,"1",null]', "9" * 400]
)
WORDS = {
    "cursor": st.text().map(str.encode),
    "tag": st.lists(st.text("aAzZ019x-_", max_size=9), max_size=12).map("-".join).map(str.encode),
    "metadata": st.recursive(
        st.sampled_from(["1", "1e999", "NaN", "null", '"a"', '"\\ud800"', "-0", "9" * 400]),
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
            | inner.map(lambda item: f'{{"a":{item}}}')
        ),
    ).map(str.encode),
    "search-body": st.dictionaries(
        st.sampled_from(["q", "lang", "limit", "min_score", "filter", "queries", "x"]),
        st.sampled_from(
            ['"a"', "1", "-1", "1.5", '"auto"', "NaN", "[]", '{"metadata":{"a":NaN}}', '"\\udfff"']
        ),
    )
    .map(lambda members: "{" + ",".join(f'"{k}":{v}' for k, v in members.items()) + "}")
    .map(str.encode),
    "filter": st.dictionaries(
        st.sampled_from(["n", "n.m", "\\u0000", "نام", '\\"']),
        st.sampled_from(["eq", "ne", "gt", "lte", "in", "exists", "x"]).flatmap(
            lambda relation: _PLAIN.map(lambda value: f'{{"{relation}":{value}}}')
        )
        | _PLAIN,
        max_size=3,
    )
    .map(lambda members: '{"metadata":{' + ",".join(f'"{k}":{v}' for k, v in members.items()) + "}}")
    .map(str.encode),
    "patch": st.recursive(
        _PLAIN,
        lambda inner: st.dictionaries(st.sampled_from("nab"), inner).map(
            lambda members: "{" + ",".join(f'"{k}":{v}' for k, v in members.items()) + "}"
        ),
    )
    .map(lambda metadata: f'{{"metadata":{metadata}}}')
    .map(str.encode),
    "wait": st.text('wait=;, "0159.-einfa', max_size=30).map(str.encode),
    "form": st.lists(
        st.sampled_from(
            [
                b"--" + BOUNDARY,
                b"--" + BOUNDARY + b"\r\n",
                b"--" + BOUNDARY + b"--",
                b'Content-Disposition: form-data; name="file"; filename="a"\r\n',
                b'Content-Disposition: form-data; name="id"\r\n',
                b"\r\n",
                b"\r\n\r\n",
                b"\r",
                b"-",
                b"RIFF\xff",
                b"a: b\r\n",
                b"x" * 70_000,
            ]
        ),
        max_size=14,
    ).map(lambda parts: bytes(range(7, 256, 32)) + b"".join(parts)),
}


@pytest.mark.parametrize("name", sorted(WORDS))
def test_what_reads_strangers_bytes_never_breaks(name: str) -> None:
    """Any bytes are read or refused; a form says the same in whatever pieces it comes."""

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.binary(max_size=300) | WORDS[name] | _near(SEEDS[name]))
    def reads(data: bytes) -> None:
        TARGETS[name](data)

    for seed in SEEDS[name]:
        TARGETS[name](seed)
    reads()


def _near(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """What is right, with one piece replaced."""
    return st.builds(
        lambda seed, at, piece, gone: (
            seed[: at % (len(seed) + 1)] + piece + seed[at % (len(seed) + 1) + gone :]
        ),
        st.sampled_from(seeds),
        st.integers(0, 1000),
        st.binary(max_size=6),
        st.integers(0, 12),
    )


def test_sixty_hostile_files_meet_one_sandbox() -> None:
    """Cut, altered and lying files of all formats: sound or InvalidAudio in time, by one zygote."""
    decode_bytes(next(file.content for file in files(30, 3) if file.family == "odd_but_honest"))
    assert sandbox._zygote is not None
    zygote, began = sandbox._zygote.pid, time.monotonic()
    for hostile in files(60, 2):
        if not hostile.family.endswith(("opus", "flac")):
            decode_bytes(hostile.content)
    assert time.monotonic() - began < 120
    assert sandbox._zygote.pid == zygote
    sandbox.stop()
