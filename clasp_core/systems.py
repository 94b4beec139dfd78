"""Every system the paper compares, declared: which encoders, which fusion, which loss, whose weights.

    SYSTEMS["paper"]   the paper's final model, by the names of `clasp_core.hub.PUBLISHED`

Four of them were published and are models by name. The others say how to build and train one; a folder
that holds the result (`model.json` with the same fields, `fusion.safetensors`) is a model by its path.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

from clasp_core.errors import ModelUnavailable

Inputs: TypeAlias = Literal["l2", "raw"]
"""Whether the encoders' vectors are brought to unit length before the fusion, or go in as they are.

The notebooks' own remark says they must be normalised (INF 28), their early arrays were (PG 31-32), and
the step that would show it for HuBERT is in none of them; `clasp models verify` settles it from the
fusion's own batch statistics.
"""


@dataclass(frozen=True, slots=True)
class System:
    """One system. `speech` or `spectrogram` is None where the fusion has no such branch."""

    speech: str | None = "hubert-large"
    spectrogram: str | None = "efficientnet-b7"
    fusion: str = "concat"
    text: str = "labse"
    loss: Literal["clasp", "lasp"] = "clasp"
    inputs: Inputs = "l2"
    weights: str | None = None
    """The published fusion; None where none was published."""
    about: str = ""
    """Where in the paper or the notebooks it is."""

    @property
    def dim(self) -> int:
        """Of its vectors: the text encoder's space is the one."""
        return TEXT_DIMS[self.text]

    @property
    def pretrained(self) -> dict[str, str]:
        """The frozen parts, by role."""
        parts = {"speech": self.speech, "spectrogram": self.spectrogram, "text": self.text}
        return {role: part for role, part in parts.items() if part is not None}

    def as_json(self) -> dict[str, Any]:
        """What decides the vectors; `read` reads it back."""
        return {name: value for name, value in asdict(self).items() if name not in ("weights", "about")}


# Beside the paper's own, small ones from package registries, so that every system can be tried anywhere.
SPEECH_ENCODERS = ("hubert-large", "wav2vec2-base", "whisper-base", "whisper-tiny-en")
SPECTROGRAM_ENCODERS = ("efficientnet-b7", "efficientnet-lite0", "efficientnet-lite0-logits")
TEXT_DIMS: Mapping[str, int] = {"labse": 768, "xlm-r": 768, "e5-small": 384, "use-multilingual": 512}
TEXT_ENCODERS = tuple(TEXT_DIMS)

SYSTEMS: Mapping[str, System] = {
    "paper": System(weights="clasp-concat", about="the final model (table 2, stages 3 and 4)"),
    "paper-gating": System(fusion="gating", weights="clasp-gating", about="published beside it"),
    "paper-lasp": System(loss="lasp", weights="lasp-concat", about="stage 3, LASP; stage 2, LaBSE + HuBERT"),
    "paper-lasp-gating": System(fusion="gating", loss="lasp", weights="lasp-gating", about="stage 2"),
    "paper-attention": System(fusion="attention", about="ours: the fusion the paper's readers asked for"),
    "paper-speech": System(spectrogram=None, fusion="speech", about="the final model's speech branch alone"),
    "paper-spectrogram": System(speech=None, fusion="spectrogram", about="its spectrogram branch alone"),
    # the text encoder of stage 1 is stated nowhere; the notebooks' later models of this family have LaBSE
    "stage1-spectrogram": System(speech=None, fusion="early-spectrogram", loss="lasp", about="PG 73, 148"),
    "stage1-speech": System("wav2vec2-base", None, "early-speech", loss="lasp", about="PG 72, 147"),
    "stage1-combined": System("wav2vec2-base", fusion="early-concat", loss="lasp", about="PG 71, 146"),
    "stage2-xlmr-wav2vec2-gating": System(
        "wav2vec2-base", fusion="early-gating", text="xlm-r", loss="lasp", about="stage 2, PG 68"
    ),
    "stage2-xlmr-wav2vec2-concat": System(
        "wav2vec2-base", fusion="early-concat", text="xlm-r", loss="lasp", about="stage 2, PG 71"
    ),
    "stage2-labse-wav2vec2-gating": System(
        "wav2vec2-base", fusion="early-gating", loss="lasp", about="stage 2, PG 68"
    ),
    "stage2-labse-wav2vec2-concat": System(
        "wav2vec2-base", fusion="early-concat", loss="lasp", about="stage 2, PG 126"
    ),
    "stage2-xlmr-hubert-gating": System(fusion="gating", text="xlm-r", loss="lasp", about="stage 2"),
    "stage2-xlmr-hubert-concat": System(text="xlm-r", loss="lasp", about="stage 2"),
    "clasp-wav2vec2": System("wav2vec2-base", fusion="wav2vec-concat", about="TE 14, no results kept"),
    "transformer-wav2vec2": System(
        "wav2vec2-base", fusion="early-transformer", loss="lasp", about="PG 70, tried, in no table"
    ),
}


def read(description: Mapping[str, Any]) -> System:
    """A system from the JSON of a model folder. Raises ModelUnavailable, naming what is wrong."""
    from clasp_core.fusion import LAYOUTS

    known = {field.name for field in fields(System)} - {"weights", "about"}
    if unknown := sorted(set(description) - known):
        raise ModelUnavailable(f"The model's description has unknown fields: {', '.join(unknown)}.")
    system = System(**description)
    choices: tuple[tuple[str, object, tuple[str | None, ...]], ...] = (
        ("speech", system.speech, (None, *SPEECH_ENCODERS)),
        ("spectrogram", system.spectrogram, (None, *SPECTROGRAM_ENCODERS)),
        ("fusion", system.fusion, tuple(LAYOUTS)),
        ("text", system.text, TEXT_ENCODERS),
        ("loss", system.loss, ("clasp", "lasp")),
        ("inputs", system.inputs, ("l2", "raw")),
    )
    for field, value, allowed in choices:
        if value not in allowed:
            names = ", ".join(map(str, allowed))
            raise ModelUnavailable(f"The model's description says {field} {value!r}; known are {names}.")
    return system
