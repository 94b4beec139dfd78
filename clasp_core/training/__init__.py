"""Training: from a manifest of recordings with transcripts to a model folder that is served as it is.

    train(read_config(Path("training/mini.toml")))

The encoders are frozen, but for the upper layers that a configuration names, so their features are computed
once and kept on disk (`features`); an epoch is then only what is trained on top. One loop (`trainer`) trains
everything; `mini` and `paper` say what is learnt, `losses` what is minimised.
"""

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from clasp_core.training.config import parse, read_table, require
from clasp_core.training.trainer import Progress, silent

if TYPE_CHECKING:
    from clasp_core.training.hybrid import HybridConfig
    from clasp_core.training.mini import MiniConfig
    from clasp_core.training.paper import PaperConfig

    Config: TypeAlias = MiniConfig | HybridConfig | PaperConfig

__all__ = ["read_config", "train"]

ARCHITECTURES = ("mini", "hybrid", "paper")


def read_config(path: Path) -> "Config":
    """A training's configuration from a TOML file; relative paths start at that file's folder.

    `[model] architecture` says which sections and names there are. Raises InvalidField for a name that is
    unknown or missing, a value of another type or out of its range, and values that contradict each other.
    """
    from clasp_core.training.hybrid import HybridConfig
    from clasp_core.training.mini import MiniConfig
    from clasp_core.training.paper import PaperConfig

    table = read_table(path)
    model = table.get("model")
    architecture = model.get("architecture") if isinstance(model, dict) else None
    require(
        architecture in ARCHITECTURES,
        f"model.architecture is {architecture!r}; known are {', '.join(ARCHITECTURES)}",
    )
    if architecture == "mini":
        return parse(MiniConfig, table, path.parent)
    if architecture == "hybrid":
        return parse(HybridConfig, table, path.parent)
    return parse(PaperConfig, table, path.parent)


def train(config: "Config", *, models_dir: Path | None = None, progress: Progress = silent) -> Path:
    """Train, and write the model folder that `config.output` names; its path.

    models_dir: where pretrained weights are looked for first. A run that was killed goes on where it was.
    Raises InvalidManifest, ModelUnavailable for what is missing, ProcessingFailed where a loss is not finite.
    """
    from clasp_core.training import hybrid, mini, paper

    if isinstance(config, mini.MiniConfig):
        return mini.train(config, models_dir=models_dir, progress=progress)
    if isinstance(config, hybrid.HybridConfig):
        return hybrid.train(config, models_dir=models_dir, progress=progress)
    return paper.train(config, models_dir=models_dir, progress=progress)
