"""Our models as encoders of MTEB 2, to run its speech tasks (extra `mteb`).

    import mteb
    from clasp_core.benchmark import MtebEncoder
    from clasp_core.models import open_model

    tasks = [mteb.get_task("FleursT2ARetrieval.v2", hf_subsets=["fa_ir", "en_us"])]
    print(mteb.evaluate(MtebEncoder(open_model("mini")), tasks))

Texts are normalised, and recordings decoded and cut, as the service does both. MTEB wants one vector for
each recording: it is the mean of the segments (`library.mean_vector`), where the service takes the best
one; for recordings up to 10 s, which are one segment, that is the same.
"""

import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import langcodes
import numpy as np
import soundfile
from numpy.typing import NDArray

from clasp_core.encoders.vision_imports import require_transformers
from clasp_core.errors import EmptyQuery, ExtraMissing, InvalidLanguage
from clasp_core.evaluation import MAX_CLIP_S
from clasp_core.ingest import embed_recording
from clasp_core.language import canonical_tag, normalize_text
from clasp_core.library import mean_vector
from clasp_core.models import Model, SpeechEncoder, TextEncoder
from clasp_core.types import Embeddings

require_transformers()  # MTEB imports it, and it torchvision
try:
    import datasets
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ModuleNotFoundError as error:
    raise ExtraMissing(
        f"MTEB needs the package {error.name}, which is not installed: pip install 'clasp-search[mteb]'."
    ) from error

_log = logging.getLogger(__name__)


class MtebEncoder:
    """MTEB's `EncoderProtocol` over one of our models; each side is loaded when it is first needed."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @property
    def mteb_model_meta(self) -> Any:  # noqa: ANN401 - MTEB is optional, its types are not known here
        """Named `clasp-search/NAME`, at the revision of the fingerprint, under which MTEB keeps results."""
        return ModelMeta(
            loader=None,
            name=f"clasp-search/{self._model.name.strip('/').rpartition('/')[2]}",
            revision=self._model.fingerprint,
            release_date=None,
            languages=None,
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=self._model.dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets=None,
            modalities=["text", "audio"],
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,  # noqa: ANN401
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Embeddings:
        """Unit rows (n, dim) of a loader's texts or recordings, in its order.

        Texts are normalised in the subset's language. Raises EmptyQuery and InvalidAudio for an item that
        has no vector (an empty text, silence): a benchmark with a made-up vector in it measures nothing.
        ValueError where items are of other kinds, or of both.
        """
        lang = _language(task_metadata, hf_subset)
        vectors: list[NDArray[np.float32]] = []
        for batch in _undecoded(inputs):
            kinds = {"text", "audio", "image", "video"} & batch.keys()
            if kinds == {"text"}:
                vectors.extend(self._texts([_normalized(text, lang) for text in batch["text"]]))
            elif kinds == {"audio"}:
                vectors.extend(self._recording(_file(audio)) for audio in batch["audio"])
            else:
                raise ValueError(f"items must be either text or audio, not {sorted(kinds)}")
        return np.stack(vectors) if vectors else np.empty((0, self._model.dim), np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> NDArray[np.float32]:  # noqa: ANN401
        """(n, m): cosines."""
        cosines: NDArray[np.float32] = np.asarray(embeddings1) @ np.asarray(embeddings2).T
        return cosines

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> NDArray[np.float32]:  # noqa: ANN401
        """(n,): cosines of rows with the rows of the same place."""
        cosines: NDArray[np.float32] = np.sum(np.asarray(embeddings1) * np.asarray(embeddings2), axis=-1)
        return cosines

    @cached_property
    def _text(self) -> TextEncoder:
        return self._model.text_encoder()

    @cached_property
    def _speech(self) -> SpeechEncoder:
        return self._model.speech_encoder()

    def _texts(self, texts: Sequence[str]) -> Embeddings:
        return self._text.encode(texts)

    def _recording(self, file: BinaryIO) -> NDArray[np.float32]:
        return mean_vector(embed_recording(self._speech, file, max_duration_s=MAX_CLIP_S))


def _undecoded(inputs: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401
    """A loader's batches, with the recordings' own bytes where its data set has them.

    Our decoder reads those (and torchcodec, which `datasets` decodes by, need not be there).
    """
    dataset = getattr(inputs, "dataset", None)
    if isinstance(dataset, datasets.Dataset) and isinstance(dataset.features.get("audio"), datasets.Audio):
        dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
        size = inputs.batch_size or 1
        for start in range(0, len(dataset), size):
            rows: list[dict[str, Any]] = [
                dataset[place] for place in range(start, min(start + size, len(dataset)))
            ]
            yield {name: [row[name] for row in rows] for name in dataset.column_names}
        return
    yield from inputs


def _file(audio: Any) -> BinaryIO:  # noqa: ANN401
    """A recording as `datasets` gives it, undecoded or decoded, as a file."""
    if isinstance(audio, dict) and audio.get("bytes") is not None:
        return io.BytesIO(audio["bytes"])
    if isinstance(audio, dict) and audio.get("path") is not None and "array" not in audio:
        return io.BytesIO(Path(audio["path"]).read_bytes())
    samples = np.asarray(audio["array"], np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples.T, audio["sampling_rate"], format="WAV", subtype="FLOAT")
    file.seek(0)
    return file


def _language(task_metadata: Any, hf_subset: str) -> str | None:  # noqa: ANN401
    """The subset's language as a BCP 47 tag, where it has just one: MTEB says `fas-Arab` for fa."""
    named = task_metadata.eval_langs
    named = named.get(hf_subset, []) if isinstance(named, dict) else named
    if len(named) != 1:
        return None
    try:
        return canonical_tag(langcodes.standardize_tag(named[0]))
    except (InvalidLanguage, ValueError):
        _log.warning("language %r of subset %r is no language tag", named[0], hf_subset)
        return None


def _normalized(text: str, lang: str | None) -> str:
    normalized = normalize_text(text, lang)
    if not normalized:
        raise EmptyQuery(f"Nothing is left of the text {text!r}.")
    return normalized
