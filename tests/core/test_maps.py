"""Maps of the embedding space: the same picture for the same seed, and labels of any script."""

import json
from pathlib import Path

import numpy as np
import pytest

from clasp_core.errors import ExtraMissing, InvalidField
from clasp_core.maps import MappedItem, SpaceMap, draw_map, map_manifest, write_map
from tests.core.doubles import LetterTextEncoder, SpectralSpeechEncoder, wav_bytes

pytest.importorskip("sklearn", reason="the extra `maps` is not installed")

COUNT = 12


class Tones:
    """A model that hears pitch and reads letters: it costs nothing, and its vectors differ."""

    name = "tones"
    fingerprint = "0" * 16

    def speech_encoder(self) -> SpectralSpeechEncoder:
        return SpectralSpeechEncoder()

    def text_encoder(self) -> LetterTextEncoder:
        return LetterTextEncoder()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few tones with words, one of them with a category of its own."""
    folder = tmp_path_factory.mktemp("map")
    lines: list[dict[str, str]] = []
    for place in range(COUNT):
        (folder / f"{place}.wav").write_bytes(wav_bytes(200.0 * 1.2**place))
        lines.append({"id": str(place), "audio": f"{place}.wav", "text": "abcdefghijklmnop"[place:]})
    lines[0]["category"] = "الرياضة"
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_same_seed_is_the_same_map(manifest: Path, tmp_path: Path) -> None:
    """A figure in a paper is made again from its command; and its numbers are those that were drawn."""
    first, second = (map_manifest(Tones(), manifest, colour="category", seed=3) for _ in range(2))
    assert first == second
    assert {item.group for item in first.items} == {"الرياضة", "not said"}
    places = np.array([item.speech for item in first.items] + [item.written for item in first.items])
    assert np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) == 2 * COUNT
    draw_map(first, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    write_map(first, tmp_path / "map.json")
    written = json.loads((tmp_path / "map.json").read_text())
    assert (written["format"], written["fingerprint"]) == ("clasp-map/1", Tones.fingerprint)
    assert [item["cosine"] for item in written["items"]] == [item.cosine for item in first.items]


def test_the_first_axis_of_pca_is_where_vectors_differ_most(manifest: Path) -> None:
    """PCA is the projection that can be checked by hand: an exact, linear one."""
    drawn = map_manifest(Tones(), manifest, method="pca", limit=10)
    assert len(drawn.items) == 10
    places = np.array([item.speech for item in drawn.items] + [item.written for item in drawn.items])
    assert np.allclose(places.mean(axis=0), 0, atol=1e-6)
    across, along = np.cov(places.T)[1, 1], np.cov(places.T)[0, 0]
    assert along >= across > 0
    assert np.cov(places.T)[0, 1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_label_may_be_anything(tmp_path: Path, suffix: str) -> None:
    """Speakers and sources are named in every script, in formulas' dollars and with leading underscores;
    warnings are errors here, those of missing letters among them."""
    groups = ["中文维基百科", "فارسی", "हिन्दी", "$x_1$", "_hidden", "a\nb\x00", "🐝" * 60, ""]
    groups += [f"speaker {number}" for number in range(30)]
    items = [
        MappedItem(str(place), "", group, (float(place), 0.0), (0.0, float(place)), 0.5)
        for place, group in enumerate(groups)
    ]
    space = SpaceMap("mini", "0" * 16, "pca", "speaker", 0, items, [])
    draw_map(space, tmp_path / f"map.{suffix}")
    assert (tmp_path / f"map.{suffix}").stat().st_size > 5000


def test_what_cannot_be_drawn_is_said_before_anything_is_embedded(tmp_path: Path) -> None:
    """Embedding a thousand recordings takes minutes; a wrong name is known at once."""
    model, nowhere = Tones(), tmp_path / "nowhere.jsonl"  # which would be an error of its own
    with pytest.raises(InvalidField, match="tsne"):
        map_manifest(model, nowhere, method="isomap")
    with pytest.raises(InvalidField, match="png"):
        draw_map(SpaceMap("mini", "", "pca", "lang", 0, [], []), tmp_path / "map.bmp")
    try:
        import umap  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ExtraMissing, match="umap-learn"):
            map_manifest(model, nowhere, method="umap")
