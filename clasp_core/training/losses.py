"""What is minimised: the paper's two losses, in the batch or against every training text."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.fusion import TEMPERATURE, clasp_loss, lasp_loss
from clasp_core.metrics import known_item_ranks
from clasp_core.training.config import require

_MOST_SCALE = 100.0
"""A learned scale ends here, as CLIP's does (Radford et al. 2021, section 2.5)."""


@dataclass(frozen=True, slots=True)
class LossConfig:
    """[loss]: `clasp` is the paper's contrastive loss, `lasp` Huber's towards the text vector."""

    name: Literal["clasp", "lasp"] = "clasp"
    temperature: float = TEMPERATURE
    """Cosines are divided by it."""
    inverted: bool = False
    """Multiply by it instead, as the notebooks do."""
    learned: bool = False
    """Whether the scale is trained too, from there on."""
    negatives: Literal["batch", "all"] = "batch"
    """What a segment is told from: the texts of its batch, or of the whole training set."""
    delta: float = 0.6
    """Where Huber's loss becomes linear."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "loss.temperature must be above 0")
        require(self.delta > 0, "loss.delta must be above 0")
        require(self.name == "clasp" or not self.learned, "loss.learned is for the loss clasp")


class Objective(nn.Module):
    """The loss of some speech vectors (batch, dim) whose texts are at `places` (batch,) among all.

    targets: the vectors (n, dim) of all texts. numbers (n,): equal ones for texts that say the same.
    """

    targets: Tensor
    numbers: Tensor

    def __init__(self, config: LossConfig, targets: Tensor, numbers: Tensor) -> None:
        super().__init__()
        self.register_buffer("targets", targets, persistent=False)
        self.register_buffer("numbers", numbers, persistent=False)
        self._config = config
        scale = config.temperature if config.inverted else 1 / config.temperature
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=config.learned)

    def forward(self, vectors: Tensor, places: Tensor) -> Tensor:
        """In float32 whatever the vectors came in: cosines times 20 leave bfloat16 too few digits."""
        config = self._config
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = vectors.float()
            own = self.targets[places]
            if config.name == "lasp":
                return lasp_loss(vectors, own, delta=config.delta)
            temperature = self._temperature()
            if config.negatives == "batch":
                return clasp_loss(vectors, own, temperature=temperature)
            return contrastive_loss(vectors, places, self.targets, self.numbers, temperature)

    def _temperature(self) -> float | Tensor:
        if self._config.learned:
            return 1 / self.log_scale.exp().clamp(max=_MOST_SCALE)
        return 1 / self._config.temperature if self._config.inverted else self._config.temperature


def figures(objective: Objective, vectors: Callable[[range], Tensor], together: int) -> dict[str, float]:
    """Of validation data, whose texts are all of the objective's: the loss, `together` at a time, `hits@1`
    and `mrr`. `vectors` gives those (n, dim) of the clips at some places.
    """
    total, rows = 0.0, []
    for start in range(0, len(objective.targets), together):
        places = range(start, min(start + together, len(objective.targets)))
        made = vectors(places).float()
        objective.to(made.device)
        total += float(objective(made, torch.tensor(places, device=made.device))) * len(places)
        rows.append(made.cpu())
    found = retrieval(torch.cat(rows), objective.targets.cpu(), objective.numbers.cpu())
    return {"loss": total / len(objective.targets), **found}


def retrieval(vectors: Tensor, targets: Tensor, numbers: Tensor) -> dict[str, float]:
    """Text-to-speech `hits@1` and `mrr` of clips' vectors (n, dim), whose texts' unit vectors are `targets`.

    A clip of any text that says the same, by `numbers` (n,), is a right answer.
    """
    scores = (targets @ F.normalize(vectors, dim=1).T).numpy()
    same = numbers.numpy()
    ranks = known_item_ranks(scores, same[:, None] == same[None])
    return {"hits@1": float((ranks <= 1).mean()), "mrr": float((1 / ranks).mean())}


def contrastive_loss(
    vectors: Tensor, places: Tensor, targets: Tensor, numbers: Tensor, temperature: float | Tensor
) -> Tensor:
    """Symmetric: each vector against the texts of the whole set, and each text against the batch's vectors.

    vectors (batch, dim) and targets (n, dim) are brought to unit length; a text that says the same, by
    `numbers` (n,), is never a negative, in either direction.
    """
    vectors, targets = F.normalize(vectors, dim=1), F.normalize(targets, dim=1)
    own = numbers[places]
    to_texts = vectors @ targets.T / temperature
    repeats = (own[:, None] == numbers[None]) & (
        torch.arange(len(targets), device=places.device) != places[:, None]
    )
    speech_to_text = F.cross_entropy(to_texts.masked_fill(repeats, float("-inf")), places)
    within = targets[places] @ vectors.T / temperature
    twins = (own[:, None] == own[None]) & ~torch.eye(len(own), dtype=torch.bool, device=own.device)
    text_to_speech = F.cross_entropy(
        within.masked_fill(twins, float("-inf")), torch.arange(len(own), device=own.device)
    )
    return (speech_to_text + text_to_speech) / 2
