"""The pretrained encoders: the right networks, the right numbers, the same whatever the batch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer

from clasp_core import models
from clasp_core.encoders.e5 import E5_SMALL, END, PREFIX, E5Encoder
from clasp_core.encoders.efficientnet import EFFICIENTNET_LITE0, EfficientNetLite0
from clasp_core.encoders.weights import PinnedWeights, Source
from clasp_core.encoders.whisper import (
    WHISPER_BASE,
    WHISPER_BASE_TOKENIZER,
    Frames,
    LogMel,
    WhisperEncoder,
)
from clasp_core.errors import ModelUnavailable, WeightsMismatch
from clasp_core.mini import SpeechBackbone, build_fusion, load_fusion, read_fusion, save_fusion
from clasp_core.models import open_model
from tests.golden.make import GOLDEN, SENTENCES, encoder_values, plain_speech, sample

ALL = (WHISPER_BASE, EFFICIENTNET_LITE0, E5_SMALL)


def clips() -> list[NDArray[np.float32]]:
    """One sample at several lengths, the shortest shorter than the encoders' minimum."""
    whole = sample()
    return [whole, whole[: len(whole) // 2], whole[8000:40000], whole[:1000]]


@pytest.fixture(scope="module")
def backbone() -> SpeechBackbone:
    return SpeechBackbone(None)


@pytest.fixture(scope="module")
def e5() -> E5Encoder:
    return E5Encoder.load(E5_SMALL.locate(None))


def test_outputs_are_the_pinned_ones() -> None:
    """A changed number here means that stored vectors and new ones no longer meet; that must be seen."""
    expected = json.loads((GOLDEN / "encoders.json").read_text())
    actual = encoder_values()
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_clip_does_not_feel_its_batch(backbone: SpeechBackbone) -> None:
    """A recording must embed the same whoever else is uploaded at the time."""
    together = backbone(clips())
    for place, clip in enumerate(clips()):
        alone = backbone([clip])
        for batch, single, length in (
            (together.frames, alone.frames, alone.frame_lengths),
            (together.pictures, alone.pictures, alone.picture_lengths),
        ):
            count = int(length[0])
            assert single.shape[1] == count
            difference = (batch[place, :count] - single[0]).abs().max()
            assert difference <= 1e-4 * single.abs().max()
            assert not batch[place, count:].any(), "padding must stay zero"


def test_compiled_networks_say_what_plain_ones_say(e5: E5Encoder) -> None:
    """What serves on a CPU is compiled, and may round to 16 bits: vectors stored by a GPU, by an older
    release or by another processor must still be found by it. 0.999 is what rounding is allowed to cost.
    """
    compiled, plain = open_model("mini").speech_encoder().encode(clips()), plain_speech(clips())
    assert (compiled * plain).sum(1).min() >= 0.999
    texts = [*SENTENCES, "", "a" * 3000]
    served = E5Encoder.to_serve(E5_SMALL.locate(None), torch.device("cpu"))(texts)
    assert (served * e5(texts)).sum(1).min() >= 0.999


def test_vectors_do_not_feel_their_batch() -> None:
    """The same for the finished vectors of both sides, which are what is stored and compared."""
    model = open_model("mini")
    speech, text = model.speech_encoder(), model.text_encoder()
    together = speech.encode(clips())
    alone = np.concatenate([speech.encode([clip]) for clip in clips()])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    together = text.encode(SENTENCES)
    alone = np.concatenate([text.encode([sentence]) for sentence in SENTENCES])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    for vectors in (together, alone):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_log_mel_filters_are_slaneys() -> None:
    """Whisper was trained on these: triangles of unit area, even to 1 kHz and then logarithmic."""
    filters = LogMel().filters
    assert filters.shape == (80, 201)
    assert (filters >= 0).all()
    assert (filters > 0).any(dim=1).all()
    centres = filters.argmax(1) * 40.0
    assert (centres[1:] >= centres[:-1]).all()
    wide = centres > 2000  # where a triangle spans enough of the 40 Hz bins to be summed
    np.testing.assert_allclose(filters[wide].sum(1) * 40, 1, atol=0.05)
    ratios = centres[wide][1:] / centres[wide][:-1]
    np.testing.assert_allclose(ratios.mean(), 6.4 ** (1 / 27 * 45.245640471924965 / 81), rtol=0.01)


def test_a_clip_over_thirty_seconds_is_refused(backbone: SpeechBackbone) -> None:
    """Whisper has 1,500 positions; a longer clip must be cut by whoever calls, never silently here."""
    with pytest.raises(ValueError, match="30 s"):
        backbone([np.zeros(31 * 16000, np.float32)])


def test_translations_are_neighbours(e5: E5Encoder) -> None:
    """The space is shared by languages: that is what makes a Persian question find English speech."""
    english = e5(["The train is late because of the snow.", "My sister sings in a choir."])
    persian = e5(["قطار به خاطر برف دیر کرده است.", "خواهرم در گروه کر آواز می‌خواند."])
    scores = english @ persian.T
    assert scores.argmax(1).tolist() == [0, 1]


def test_the_pieces_around_a_text_are_the_tokenizers(e5: E5Encoder) -> None:
    """`mini` puts them around what it heard, without loading a tokenizer."""
    assert tuple(e5.tokenizer.encode("query:").ids) == PREFIX + END


def test_long_and_odd_texts_encode(e5: E5Encoder) -> None:
    """Beyond 512 tokens the end is cut off; no text may crash the thread that answers everybody."""
    odd = ["", " ", "a" * 10_000, "я" * 3000, "🙂" * 700, "\x00\x01", "می‌روم", "한국어", "𒀀𒁀"]
    vectors = e5(odd)
    assert vectors.shape == (len(odd), 384)
    assert torch.isfinite(vectors).all()


def test_weights_are_looked_up_in_the_models_folder_first(tmp_path: Path) -> None:
    """An operator's own copy wins, so a deployment need not depend on a package registry."""
    shutil.copy(EFFICIENTNET_LITE0.locate(None), tmp_path / EFFICIENTNET_LITE0.local_name)
    assert EFFICIENTNET_LITE0.locate(tmp_path).parent == tmp_path


def test_the_spare_source_of_the_speech_encoder_counts_too(tmp_path: Path) -> None:
    """Both published copies hold the same encoder; either hash is right under the folder's file name."""
    assert len(WHISPER_BASE.sources) == 2
    published = WHISPER_BASE.locate(None).read_bytes()
    (tmp_path / WHISPER_BASE.local_name).write_bytes(published)
    assert WHISPER_BASE.locate(tmp_path).read_bytes() == published


@pytest.mark.parametrize("weights", ALL, ids=lambda weights: weights.local_name)
def test_a_wrong_hash_is_an_error_and_never_a_fallback(weights: PinnedWeights, tmp_path: Path) -> None:
    """A replaced or damaged file must stop the service, even where a good package copy is installed."""
    (tmp_path / weights.local_name).write_bytes(b"not the weights")
    with pytest.raises(WeightsMismatch, match=weights.sources[0].sha256[:16]):
        weights.locate(tmp_path)


def test_missing_weights_say_what_to_install() -> None:
    """The first thing a user without the extra sees."""
    nowhere = PinnedWeights("x", "x.bin", "MIT", (Source("no-such-package", "1.0", "x.bin", "0" * 64),))
    with pytest.raises(ModelUnavailable, match=r"no-such-package==1\.0"):
        nowhere.locate(None)


def test_networks_have_their_published_sizes(e5: E5Encoder) -> None:
    """Parameter counts of the published architectures: a missing layer would still run."""
    whisper = WhisperEncoder.load(WHISPER_BASE.locate(None))
    # 19.8 M with attention keys' biases (stored as zeros) and without the position table (a buffer)
    assert sum(parameter.numel() for parameter in whisper.parameters()) == 19_825_664
    lite0 = EfficientNetLite0.load(EFFICIENTNET_LITE0.locate(None))
    assert sum(parameter.numel() for parameter in lite0.parameters()) == 4_652_008
    assert e5.words.nibbles.shape[0] == 250_037


def test_a_fusion_survives_being_saved(backbone: SpeechBackbone, tmp_path: Path) -> None:
    """Weights are stored in half precision; what they say must hardly change."""
    shipped = Path(models.__file__).parent / "weights" / "mini" / "fusion.safetensors"
    _, tensors = read_fusion(shipped)
    torch.manual_seed(0)
    fusion = build_fusion(None, tensors["pieces"], tensors["piece_ends"], rank=2).eval()
    with torch.no_grad():
        for parameter in fusion.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    save_fusion(fusion, tmp_path / "fusion.safetensors")
    features = backbone(clips()[2:3])
    with torch.inference_mode():
        before = fusion(features).vectors
        after = load_fusion(tmp_path / "fusion.safetensors", None)(features).vectors
    assert (before * after).sum(1).min() > 0.9999


def test_a_fusion_of_another_version_is_refused(tmp_path: Path) -> None:
    """A model folder trained by an earlier release must not be half read."""
    save_file({"text_mean": torch.zeros(384)}, tmp_path / "fusion.safetensors", {"config": "{}"})
    with pytest.raises(ModelUnavailable, match="another version"):
        load_fusion(tmp_path / "fusion.safetensors", None)


def test_windows_hear_the_words(backbone: SpeechBackbone) -> None:
    """The decoder is Whisper's, asked at each window: a wrong weight or mask would still give numbers.

    Untrained, the likeliest first words over the windows of a clear recording are words of its text.
    """
    tokenizer = Tokenizer.from_file(str(WHISPER_BASE_TOKENIZER.locate(None)))
    frames = backbone.whisper(backbone.log_mel([sample()]))
    languages = backbone.decoder.languages(frames)
    assert tokenizer.id_to_token(50_259 + int(languages[0].argmax())) == "<|en|>"
    states = backbone.decoder(frames, languages).values[0]
    likely = (states @ backbone.decoder.words.T).softmax(1).max(1)
    heard = {
        tokenizer.decode([token]).strip().lower()
        for token, share in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        if share > 0.3
    }
    assert {"stay", "inside", "and", "they", "summer"} <= heard


def test_padding_is_not_heard(backbone: SpeechBackbone) -> None:
    """A clip's windows must be the same beside a longer clip, whose frames follow its own in the batch."""
    frames = backbone.whisper(backbone.log_mel([sample()])).values
    languages = torch.full((1, 99), 1 / 99)
    short = torch.tensor([200])
    with torch.inference_mode():
        alone = backbone.decoder(Frames(frames[:, :200], short), languages)
        beside = backbone.decoder(Frames(frames[:, :240], short), languages)
    assert int(alone.lengths[0]) == int(beside.lengths[0]) == 20
    torch.testing.assert_close(beside.values[:, :20], alone.values, rtol=1e-4, atol=1e-4)


def test_models_that_do_not_exist_are_named(tmp_path: Path) -> None:
    """A typing error in CLASP_MODEL must not become a half-working service."""
    with pytest.raises(ModelUnavailable, match="no model 'maxi'"):
        open_model("maxi")
    (tmp_path / "model.json").write_text('{"format": "clasp-model/99"}')
    with pytest.raises(ModelUnavailable, match="another version"):
        open_model(str(tmp_path))


def test_samples_are_16_khz_after_reading() -> None:
    """Guards the helper the golden values stand on."""
    assert sample().dtype == np.float32
    assert (
        soundfile.info(GOLDEN.parent.parent / "app" / "samples" / "audio" / "en-bees.opus").samplerate
        == 24000
    )
