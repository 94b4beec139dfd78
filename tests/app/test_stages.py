"""`clasp stages`: the paper's Table 2 in small, its claims judged, and nothing done twice."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from app.cli import cli
from clasp_core.datasets.translations import queries, read_translations
from clasp_core.errors import InvalidField, InvalidManifest
from clasp_core.evaluation import evaluate_manifest
from clasp_core.hub import PUBLISHED
from clasp_core.manifest import ManifestItem, read_manifest
from clasp_core.metrics import Measured, measure, paper_measure
from clasp_core.models import open_model
from clasp_core.stages import PAPER, Contrast, Plan, mean_over, verdict
from tests.conftest import SAMPLES, lines
from tests.paper_checkpoints import save_hubert, save_sentence_bert, save_wav2vec2

CLIPS = sorted(lines(SAMPLES / "manifest.jsonl"), key=lambda line: line["duration_s"])[:7]
LETTERS = ("<pad>", "|", *"abcdefghijklmnopqrstuvwxyz", *"éäöü")
GONE = {"id": "gone", "audio": "gone.opus", "text": "Nobody knows.", "lang": "en", "split": "test"}
RECIPE = "[training]\nepochs = {epochs}\nbatch_size = 4\nthreads = 1\n"


def write(path: Path, items: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def stages(folder: Path, *more: object) -> tuple[Any, str]:
    """A run on small random networks of the paper's kinds, in their names: its report and what it printed."""
    arguments = ["stages", folder / "m.jsonl", "--out", folder / "out", "--recipe", folder / "recipe.toml"]
    arguments += ["--spectrogram", "efficientnet-lite0", *more]
    environment = {"CLASP_MODELS_DIR": str(folder / "models"), "CLASP_THREADS": "1", "COLUMNS": "250"}
    environment["CLASP_DEVICE"] = "cpu"
    # In this process: the command's own start is tested elsewhere, and its imports take seconds.
    done = CliRunner(env=environment).invoke(cli, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return json.loads((folder / "out" / "stages.json").read_text()), done.stdout


ALL = ("--speech", "hubert-large,wav2vec2-base", "--text", "labse")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """All four stages on seven recordings: the folder, the report, and what was printed."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("stages")
    models = folder / "models"
    hubert = save_hubert(PUBLISHED["hubert-large"].location(models), hidden=32)
    (hubert / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(LETTERS)}))
    save_wav2vec2(PUBLISHED["wav2vec2-base"].location(models), hidden=32)
    save_sentence_bert(PUBLISHED["labse"].location(models), dim=768, layers=1)
    items = [line | {"audio": str(SAMPLES / line["audio"])} for line in CLIPS]
    split = [item | {"split": "train" if number < 4 else "test"} for number, item in enumerate(items)]
    write(folder / "m.jsonl", [*split, GONE])
    asked = [
        item | {"id": f"{item['id']}:{lang}", "query": text, "query_lang": lang, "source": "here"}
        for lang, text in (("fr", "une phrase"), ("de", "ein Satz"))
        for item in items[4:]
    ]
    write(folder / "q.jsonl", asked)
    (folder / "recipe.toml").write_text(RECIPE.format(epochs=1))
    report, printed = stages(folder, *ALL, "--queries", folder / "q.jsonl", "--transcribers", hubert)
    torch.set_num_threads(threads)
    return folder, report, printed


def test_the_table_has_the_papers_rows_beside_ours(ran: tuple[Path, Any, str]) -> None:
    """Each row of Table 2 that these encoders can give stands beside its own figures: beside another's, every
    claim would be a comparison with the wrong system."""
    folder, report, printed = ran
    beside = [row["paper"]["name"] for row in report["rows"] if row["paper"] is not None]
    absent = {"Wav2Vec2 ASR", "Persian", "Chinese", *(name for name in PAPER if "XLM-R" in name)}
    assert sorted(beside) == sorted(set(PAPER) - absent)
    named = {row["name"]: row for row in report["rows"]}
    assert named["labse + hubert-large, gating"]["paper"]["macro_f1"] == 0.893
    assert named["labse + wav2vec2-base, concat"]["paper"]["hits@1"] == 0.966
    assert named["here: de"]["paper"]["mean_rank"] == 21.637
    assert report["items"] == {"train": 2, "validation": 2, "test": 3}
    assert {row["figures"]["threshold"] for row in report["rows"] if row["stage"] < 3} == {0.4}
    assert {row["figures"]["threshold"] for row in report["rows"] if row["stage"] > 2} == {0.5}
    assert report["left_out"] == [{"id": "gone", "reason": "cannot be heard"}]
    assert printed == (folder / "out" / "stages.md").read_text()
    for shown in (*(row["name"] for row in report["rows"]), *(claim["claim"] for claim in report["claims"])):
        assert f"| {shown} |" in printed
    gains = {claim["claim"]: claim["paper"] for claim in report["claims"] if claim["figure"] == "hits@1"}
    assert gains["both inputs find more than speech alone"] == 0.031
    assert gains["CLASP's loss finds more than LASP's"] == 0.062
    speech = "speech encoder hubert-large finds more than wav2vec2-base (in HuBERT's place, in Wav2Vec2's)"
    assert gains[speech] == pytest.approx((0.998 + 0.999 - 0.949 - 0.966) / 2, abs=0.001)


def test_figures_are_those_of_the_trained_folders(ran: tuple[Path, Any, str]) -> None:
    """What was measured on cached features is what the trained model gives when it is served: the same ranks
    as `clasp evaluate --protocol paper` finds, by speech at stage 3 and by questions at stage 4."""
    folder, report, _ = ran
    (trained,) = (folder / "out" / "models").glob("concat-*-clasp-*")
    model = open_model(str(trained), models_dir=folder / "models")
    named = {(row["stage"], row["name"]): row["figures"] for row in report["rows"]}
    spoken = evaluate_manifest(model, folder / "m.jsonl", split="test", protocol="paper")["overall"]
    asked = evaluate_manifest(model, folder / "q.jsonl", protocol="paper", by=["query_lang"])["groups"]
    for ours, served in (
        (named[3, "CLASP"], spoken["speech_to_text"]),
        (named[4, "here: the words as spoken, for fr"], spoken["text_to_speech"]),
        (named[4, "here: fr"], asked["query_lang"]["fr"]["text_to_speech"]),
        (named[4, "here: de"], asked["query_lang"]["de"]["text_to_speech"]),
    ):
        assert ours["n"] == ours["pool"] == 3
        for name in ("hits@1", "mrr", "mean_rank"):
            assert ours[name] == served[name]


def test_a_second_run_trains_nothing_and_says_the_same(ran: tuple[Path, Any, str]) -> None:
    """Minutes of encoders and training are paid once: every trained folder is left as it was, and even the
    measured seconds are those of the first time. More epochs are other systems, beside the old ones."""
    folder, report, printed = ran
    models = folder / "out" / "models"
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    assert len(list(models.iterdir())) == 7, "three modalities, four combinations, two losses; two are shared"
    hubert = PUBLISHED["hubert-large"].location(folder / "models")
    again, said = stages(folder, *ALL, "--queries", folder / "q.jsonl", "--transcribers", hubert)
    assert again == report
    assert said == printed
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before
    (folder / "recipe.toml").write_text(RECIPE.format(epochs=2))
    stages(folder, *ALL, "--stage", 4, "--queries", folder / "q.jsonl")
    assert len(list(models.iterdir())) == 8


def test_plans_that_cannot_be_are_refused(tmp_path: Path) -> None:
    """Before anything is trained for them."""
    with pytest.raises(InvalidField, match="stage 4"):
        Plan(tmp_path / "m.jsonl", tmp_path, stages=(3, 4))
    with pytest.raises(InvalidField, match="different splits"):
        Plan(tmp_path / "m.jsonl", tmp_path, stages=(1,), train="all", test="all")


# --- verdicts


def system(rights: Sequence[bool]) -> Measured:
    """What finds the right one for these queries, and puts it second for the others."""
    pool = len(rights) + 1
    scores = np.zeros((len(rights), pool))
    right = np.eye(len(rights), pool, dtype=bool)
    scores[right] = 0.6
    scores[np.arange(len(rights)), -1] = [0.3 if found else 0.9 for found in rights]
    return measure(scores, right)


def test_a_claim_holds_only_where_chance_is_no_explanation() -> None:
    """40 questions: 30 against 10 is a finding, 21 against 20 is none, whichever side the claim is on."""
    strong, weak = system([True] * 30 + [False] * 10), system([False] * 30 + [True] * 10)
    even = [system([(n + shift) % 40 < 20 + shift for n in range(40)]) for shift in (0, 1)]

    def judged(better: Measured, worse: Measured, figure: str = "hits@1", **more: Any) -> dict[str, Any]:
        return Contrast(1, "it is better", figure, better, worse, **more).judged()

    found = judged(strong, weak)
    assert (found["verdict"], found["advantage"]) == ("held", 0.5)
    assert judged(weak, strong)["verdict"] == "did not hold"
    assert judged(even[1], even[0])["verdict"] == "not decided"
    assert judged(strong, strong)["verdict"] == "not decided", "equal is not better"
    ranks = judged(strong, weak, "mean_rank")
    assert ranks["verdict"] == "held", "a lower mean rank is the better one"
    assert ranks["advantage"] == 0.5
    assert ranks["ci95"][0] < ranks["ci95"][1]
    assert judged(weak, strong, "mean_rank")["verdict"] == "did not hold"


def test_about_as_good_asks_for_a_share_and_no_more() -> None:
    """ "Works nearly as well" is a claim too: it holds for what surely finds that share."""
    base = system([True] * 90 + [False] * 10)
    near = system([True] * 88 + [False] * 12)
    far = system([True] * 40 + [False] * 60)
    for other, expected in ((near, "held"), (far, "did not hold")):
        found = Contrast(4, "nearly as well", "hits@1", other, base, share=0.845).judged()
        assert found["verdict"] == expected
        assert found["advantage"] == pytest.approx(other.figures()["hits@1"] - 0.845 * 0.9)
    assert verdict(-0.1, 0.1) == "not decided"


def test_a_mean_over_systems_is_the_mean_of_their_figures() -> None:
    """Concatenation against gating is judged over all encoders at once."""
    one, other = system([True] * 30 + [False] * 10), system([True] * 10 + [False] * 30)
    both = mean_over([one, other]).figures()
    for name in ("hits@1", "mrr", "mean_rank"):
        assert both[name] == pytest.approx((one.figures()[name] + other.figures()[name]) / 2)


def test_questions_that_one_side_skipped_are_left_out_on_both() -> None:
    """Stage 3 skips tied duplicates, others for each system; pairs must still be of the same questions."""
    random = np.random.default_rng(4)
    scores = random.standard_normal((30, 30)) + 2 * np.eye(30)
    tied = scores.copy()
    tied[:5, 0] = tied[np.arange(5), np.arange(5)] = 9.0  # 1 to 4 tie with column 0
    skipping = paper_measure(tied, skip_tied_duplicates=True)
    whole = paper_measure(scores)
    assert len(skipping.per_query) == 26
    compared = skipping.difference_from(whole)["mean_rank"]
    kept = np.r_[0, 5:30]
    expected = skipping.per_query[:, 4].mean() - whole.per_query[kept, 4].mean()
    assert compared["difference"] == pytest.approx(expected)
    assert whole.difference_from(skipping)["mean_rank"]["difference"] == pytest.approx(-expected)


def test_different_questions_are_compared_as_two_samples() -> None:
    """Unpaired, an interval is as wide as both sides' chance together, also for a system and itself."""
    measured = system([True] * 30 + [False] * 10)
    low, high = measured.difference_from(measured, paired=False)["hits@1"]["ci95"]
    assert low < 0 < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(2 * 0.75 * 0.25 / 40), rel=0.15)
    other = system([True] * 10 + [False] * 20)
    difference = measured.difference_from(other, paired=False)["hits@1"]["difference"]
    assert difference == pytest.approx(0.75 - 1 / 3)


# --- questions in other languages


PARALLEL = [
    {
        "id": "p-1",
        "text": {"en": "The rain fell on the city.", "fa": "باران بر شهر بارید.", "de": "Es regnete."},
    },
    {"id": "p-2", "text": {"en": "Nobody asked the jury why.", "de": "Niemand fragte die Geschworenen."}},
    {"id": "p-3", "text": {"en": "Nothing of this is asked for.", "ja": "何も聞かれない。"}},
]


def test_translations_meet_the_sentences_that_are_read(tmp_path: Path) -> None:
    """Each recording is asked for in every language that its sentence has, and in no other's words."""
    path = write(tmp_path / "parallel.jsonl", PARALLEL)
    texts, translations = read_translations(path, "en", ["fa", "de"])
    assert [(one.id, one.text, one.category) for one in texts] == [
        ("p-1", "The rain fell on the city.", "fa+de"),
        ("p-2", "Nobody asked the jury why.", "de"),
    ]
    items = [ManifestItem(one.id, Path(f"{one.id}.wav"), one.text, lang="en") for one in texts]
    asked = [(item.id, item.query_lang, item.query) for item in queries(items, translations, "parallel")]
    assert asked == [
        ("p-1:fa", "fa", "باران بر شهر بارید."),
        ("p-1:de", "de", "Es regnete."),
        ("p-2:de", "de", "Niemand fragte die Geschworenen."),
    ]
    plain = write(tmp_path / "plain.jsonl", [{"id": "a", "text": "One language."}])
    with pytest.raises(InvalidManifest, match="no translations"):
        read_translations(plain, "en", ["fa"])
    with pytest.raises(InvalidManifest, match="no sentence"):
        read_translations(path, "en", ["sw"])


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_one_command_makes_recordings_with_their_questions(tmp_path: Path) -> None:
    """From a parallel text to what stage 4 takes; recordings may be asked for in several languages."""
    write(tmp_path / "parallel.jsonl", PARALLEL)
    command = ["dataset", "speech-brown", tmp_path / "parallel.jsonl", "--out", tmp_path / "set"]
    command += ["--lang", "en", "--queries", "fa,de", "--format", "wav"]
    done = CliRunner().invoke(cli, list(map(str, command)))
    assert done.exit_code == 0, done.output
    asked = read_manifest(tmp_path / "set" / "queries.jsonl")
    assert {item.id: item.query_lang for item in asked} == {"p-1:fa": "fa", "p-1:de": "de", "p-2:de": "de"}
    assert all(item.audio.is_file() and item.source == "parallel" and item.lang == "en" for item in asked)
    refused = CliRunner().invoke(cli, [*map(str, command[:5]), "--queries", "fa"])
    assert refused.exit_code == 2, "which language would be read aloud?"
