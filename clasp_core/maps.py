"""A picture of the embedding space in two dimensions: speech and text of a manifest's items, in pairs.

After the paper's t-SNE figure, a sample of 1,000 pairs (whose notebook version was drawn from another model,
PG 203-217). A projection shows neighbourhoods, not distances: how well a model finds is for
`clasp_core.evaluation` to say.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clasp_core.errors import ExtraMissing, InvalidField
from clasp_core.evaluation import Progress, embed_manifest
from clasp_core.library import mean_vector
from clasp_core.manifest import ManifestItem
from clasp_core.models import Model
from clasp_core.types import Embeddings

if TYPE_CHECKING:
    from matplotlib.font_manager import FontEntry

COLOURS = ("lang", "source", "speaker", "category")
METHODS = ("tsne", "umap", "pca")
FORMATS = (".png", ".svg", ".pdf")
UNKNOWN = "not said"
OTHERS = "others"
_PALETTE = [place for place in range(20) if place not in (14, 15)]
"""Of matplotlib's tab20, all but its greys."""
MAX_COLOURS = len(_PALETTE)
"""Groups that get a colour of their own."""
LEAST_ITEMS = 4

_Points = NDArray[np.float64]
"""(n, 2)"""


@dataclass(frozen=True, slots=True)
class MappedItem:
    """An item's two places, the value that colours it, and the cosine of its two vectors in full."""

    id: str
    text: str
    group: str
    speech: tuple[float, float]
    written: tuple[float, float]
    """The text's place."""
    cosine: float


@dataclass(frozen=True, slots=True)
class SpaceMap:
    model: str
    fingerprint: str
    method: str
    colour: str
    seed: int
    items: list[MappedItem]
    skipped: list[dict[str, str]]

    def as_json(self) -> dict[str, Any]:
        return {"format": "clasp-map/1", **asdict(self)}


def map_manifest(
    model: Model,
    manifest: Path,
    *,
    audio_root: Path | None = None,
    split: str | None = None,
    colour: str = "lang",
    method: str = "tsne",
    limit: int | None = 1000,
    seed: int = 0,
    progress: Progress = lambda items, total: items,
) -> SpaceMap:
    """Project the speech vectors (the mean of a recording's segments) and the text vectors together.

    The same for the same seed, which draws the `limit` items and begins the projection. `colour` is one of
    `COLOURS`, or any other field of the manifest's lines.

    Raises ExtraMissing, before anything is embedded, where a package of the method is not installed;
    InvalidManifest where nothing could be embedded; InvalidField for an unknown method and for fewer
    than `LEAST_ITEMS` items.
    """
    project = _projection(method, seed)
    embedded = embed_manifest(
        model, manifest, audio_root=audio_root, split=split, limit=limit, seed=seed, progress=progress
    )
    n = len(embedded.items)
    if n < LEAST_ITEMS:
        raise InvalidField(f"A map needs {LEAST_ITEMS} items or more; {manifest} gave {n}.")
    speech = np.stack([mean_vector(segments) for segments in embedded.recordings])
    points = project(np.concatenate((speech, embedded.texts)))
    cosines = np.sum(speech * embedded.texts, axis=1)
    return SpaceMap(
        model=model.name,
        fingerprint=model.fingerprint,
        method=method,
        colour=colour,
        seed=seed,
        items=[
            MappedItem(
                item.id,
                item.text,
                _group(item, colour),
                _pair(points[i]),
                _pair(points[n + i]),
                float(cosine),
            )
            for i, (item, cosine) in enumerate(zip(embedded.items, cosines, strict=True))
        ],
        skipped=embedded.skipped,
    )


def draw_map(space: SpaceMap, out: Path) -> None:
    """The picture, as .png, .svg or .pdf: speech as dots, text as crosses, a faint line between the two.

    Colours are by group, the largest first; beyond `MAX_COLOURS` groups the smallest share a grey. Letters
    that no installed font has (Chinese, say, on a bare machine) are written as their code points; Arabic
    letters stand unjoined, as matplotlib draws them. Raises as `require_drawing` does.
    """
    require_drawing(out)
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    speech = np.array([item.speech for item in space.items])
    written = np.array([item.written for item in space.items])
    sizes = Counter(item.group for item in space.items)
    shown = [group for group, _ in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0]))]
    own = shown if len(shown) <= MAX_COLOURS else shown[: MAX_COLOURS - 1]
    colours = {group: colormaps["tab20"](place) for place, group in zip(_PALETTE, own, strict=False)}
    grey = (0.6, 0.6, 0.6, 1.0)
    of_item = [colours.get(item.group, grey) for item in space.items]

    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots()
    pairs = np.stack((speech, written), axis=1)
    axes.add_collection(LineCollection(list(pairs), colors=of_item, linewidths=0.5, alpha=0.25))
    axes.scatter(speech[:, 0], speech[:, 1], c=of_item, s=14, marker="o", linewidths=0)
    axes.scatter(written[:, 0], written[:, 1], c=of_item, s=18, marker="x", linewidths=0.9)
    axes.set_xticks([])
    axes.set_yticks([])
    write = _writer()
    labels = [f"{group} ({sizes[group]})" for group in own]
    handles = [Line2D([], [], color=colours[group], marker="s", linestyle="") for group in own]
    if rest := len(space.items) - sum(sizes[group] for group in own):
        labels.append(f"{OTHERS} ({rest})")
        handles.append(Line2D([], [], color=grey, marker="s", linestyle=""))
    labels += ["speech", "text"]
    handles += [Line2D([], [], color="black", marker=mark, linestyle="") for mark in "ox"]
    legend = axes.legend(
        handles, [f" {write(label)}" for label in labels], loc="upper left", bbox_to_anchor=(1, 1)
    )
    title = axes.set_title(
        write(f"{Path(space.model).name}: {len(space.items)} pairs by {space.colour}, {space.method}")
    )
    for text in (title, *legend.get_texts()):
        text.set_parse_math(False)  # else a $ in a label begins a formula
        text.set_fontfamily([entry.name for entry in _fonts()])
    figure.savefig(out, dpi=150)


def require_drawing(out: Path) -> None:
    """Raises InvalidField where no picture has such a name, and ExtraMissing where matplotlib is missing."""
    if out.suffix.lower() not in FORMATS:
        raise InvalidField(f"The picture's name must end in one of {', '.join(FORMATS)}, not {out.name!r}.")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise _missing("drawing", error) from error


def _projection(method: str, seed: int) -> Callable[[Embeddings], _Points]:
    """What turns unit vectors (n, dim) into places (n, 2), by cosine."""
    if method == "pca":
        return _principal
    if method == "tsne":
        try:
            from sklearn.manifold import TSNE
        except ModuleNotFoundError as error:
            raise _missing("t-SNE", error) from error

        def tsne(vectors: Embeddings) -> _Points:
            """Perplexity 30, scikit-learn's own default; less where there are too few neighbours for it."""
            perplexity = min(30.0, (len(vectors) - 1) / 3)
            fitted = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
            return np.asarray(fitted.fit_transform(vectors), np.float64)

        return tsne
    if method == "umap":
        try:
            from umap import UMAP
        except ModuleNotFoundError as error:
            raise ExtraMissing(
                f"UMAP needs the package umap-learn ({error.name} is not installed):"
                " pip install umap-learn, or choose --method tsne."
            ) from error

        def umap(vectors: Embeddings) -> _Points:
            fitted = UMAP(n_neighbors=min(15, len(vectors) - 1), metric="cosine", random_state=seed, n_jobs=1)
            return np.asarray(fitted.fit_transform(vectors), np.float64)

        return umap
    raise InvalidField(f"The method is one of {', '.join(METHODS)}, not {method!r}.")


def _principal(vectors: Embeddings) -> _Points:
    """The two directions of most variance; each sign so that the largest component is positive."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    largest = np.abs(directions).argmax(axis=1)
    signs = np.sign(directions[[0, 1], largest])
    points: _Points = centred @ (directions * signs[:, None]).T
    return points


def _group(item: ManifestItem, colour: str) -> str:
    named = (
        getattr(item, colour) if colour in ("lang", "source", "speaker", "split") else item.extra.get(colour)
    )
    return UNKNOWN if named is None else str(named)


def _pair(point: NDArray[np.float64]) -> tuple[float, float]:
    return float(point[0]), float(point[1])


def _missing(what: str, error: ModuleNotFoundError) -> ExtraMissing:
    return ExtraMissing(
        f"{what} needs the package {error.name}, which is not installed: pip install 'clasp-search[maps]'."
    )


# --- letters

_FAMILIES = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK", "Noto Sans Arabic", "Noto Sans Devanagari")


def _fonts() -> list["FontEntry"]:
    """One regular face of each family here that labels may need, DejaVu (which matplotlib brings) first."""
    from matplotlib.font_manager import fontManager

    found: dict[str, FontEntry] = {}
    for family in _FAMILIES:
        for entry in sorted(fontManager.ttflist, key=lambda entry: entry.fname):
            if entry.name.startswith(family) and entry.style == "normal" and entry.weight in (400, "regular"):
                found.setdefault(entry.name, entry)
    return list(found.values())


def _writer() -> Callable[[str], str]:
    """Turns a label into one that these fonts have every letter of; missing ones become U+XXXX."""
    from matplotlib.font_manager import get_font

    drawable: set[int] = set()
    for entry in _fonts():
        drawable.update(get_font(entry.fname).get_charmap())

    def write(label: str) -> str:
        shown = "".join(c if c.isprintable() else " " for c in label)
        shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
        return "".join(c if ord(c) in drawable else f"[U+{ord(c):04X}]" for c in shown)

    return write


def write_map(space: SpaceMap, path: Path) -> None:
    """The map's numbers, as JSON."""
    path.write_text(json.dumps(space.as_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
