"""`python -m tests.picture_gate`: the spectrogram picture against the paper's, in pixels, logits and time.

On recordings of the folder that CLASP_SPEECH_DEV names (else the bundled samples), evenly over languages and
durations, and on synthetic edge cases. Writes bench-results/pictures.json and pictures.md, and fails where a
clip misses the gate. One core, one thread; times are processor seconds from samples to picture, each the
first time that a length is drawn.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clasp_core.encoders.efficientnet import EFFICIENTNET_LITE0, EfficientNetLite0
from clasp_core.spectrogram import reference_width, render
from tests.pictures import RATE, compare, edge_cases, load, speech
from tests.spectrogram_oracle import reference_picture

ROOT = Path(__file__).parent.parent
OUT = ROOT / "bench-results"
MAX_MEAN_DIFFERENCE = 0.5
MIN_COSINE = 0.9995
MIN_SPEED_UP = 40
BINS_S = (1, 2, 3, 4, 5, 6, 8, 10, 15, 100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=210, help="how many recordings of speech")
    wanted = parser.parse_args().clips
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)

    folder = Path(os.environ.get("CLASP_SPEECH_DEV", ROOT / "app" / "samples"))
    recordings = speech(folder, wanted)
    some_speech = load(ROOT / "app" / "samples" / "audio" / "en-bees.opus")
    waveforms: dict[str, Callable[[], NDArray[np.float32]]] = {
        name: lambda path=path: load(path) for name, path in recordings.items()
    } | {
        f"edge: {name}": lambda samples=samples: samples for name, samples in edge_cases(some_speech).items()
    }

    network = EfficientNetLite0.load(EFFICIENTNET_LITE0.locate(None))
    warm_up = some_speech[:RATE]
    timed(reference_picture, warm_up)
    timed(render, warm_up)
    rows = [measured(name, samples(), network) for name, samples in waveforms.items()]

    groups: dict[str, list[dict[str, Any]]] = {"all": rows}
    spoken = [row for row in rows if not row["clip"].startswith("edge: ")]
    groups["speech"] = spoken
    for low, high in zip((0, *BINS_S), BINS_S, strict=False):
        groups[f"speech, {low} to {high} s"] = [row for row in spoken if low <= row["duration_s"] < high]
    groups |= {row["clip"]: [row] for row in rows if row["clip"].startswith("edge: ")}
    table = [
        "| clips | n | identical | worst mean difference | largest | most pixels differing "
        "| shifted or frame differs | lowest cosine, 0 to 255 | lowest cosine, -1 to 1 "
        "| reference ms | here ms | times faster |",
        "| --- |" + " ---: |" * 11,
        *(summary(name, group) for name, group in groups.items() if group),
    ]
    languages = len({name.split()[0] for name in recordings})
    table.append(f"\n{len(spoken)} recordings in {languages} languages; times are medians, processor time.")
    OUT.mkdir(exist_ok=True)
    (OUT / "pictures.json").write_text(json.dumps(rows, indent=1) + "\n")
    (OUT / "pictures.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))

    missed = [row["clip"] for row in rows if not row["passes"]]
    if missed:
        print(f"Pictures or logits miss the gate: {missed}")
    speed_up = ratio(rows)
    if speed_up < MIN_SPEED_UP:
        print(f"Only {speed_up:.0f} times faster than the reference, not {MIN_SPEED_UP}.")
    return 1 if missed or speed_up < MIN_SPEED_UP else 0


def measured(name: str, waveform: NDArray[np.float32], network: EfficientNetLite0) -> dict[str, Any]:
    reference, reference_s = timed(reference_picture, waveform)
    picture, own_s = timed(render, waveform)
    found = compare(reference, picture)
    width = reference.shape[1]
    cosines = cosine(network, reference, picture[:, :width])
    whole = cosine(network, reference, picture) if width < picture.shape[1] else cosines
    return {
        "clip": name,
        "duration_s": len(waveform) / RATE,
        "width": width,
        "mean_difference": found.mean_difference,
        "largest_difference": found.largest_difference,
        "pixels_differing": found.pixels_differing,
        "outside_mesh_differing": found.outside_mesh_differing,
        "shift": found.shift,
        "cosines": cosines,
        "cosines_uncropped": whole,
        "reference_s": reference_s,
        "own_s": own_s,
        "passes": found.mean_difference <= MAX_MEAN_DIFFERENCE
        and found.shift == (0, 0)
        and found.outside_mesh_differing == 0
        and reference.shape == (picture.shape[0], reference_width(len(waveform)), 3)
        and min(cosines) >= MIN_COSINE,
    }


def timed(
    draw: Callable[[NDArray[np.float32]], NDArray[np.uint8]], waveform: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], float]:
    started = time.process_time()
    picture = draw(waveform)
    return picture, time.process_time() - started


def cosine(
    network: EfficientNetLite0, reference: NDArray[np.uint8], picture: NDArray[np.uint8]
) -> tuple[float, float]:
    """Of the logits of two pictures, both fed as 0 to 255 as the paper feeds its network, and as -1 to 1."""
    if np.array_equal(reference, picture):
        return 1.0, 1.0
    with torch.inference_mode():
        logits = [
            network.classify(
                scale * torch.from_numpy(values.transpose(2, 0, 1).copy())[None].float() + offset
            )
            for scale, offset in ((1, 0), (1 / 127.5, -1))
            for values in (reference, picture)
        ]
    raw, scaled = (
        float(torch.cosine_similarity(a.double(), b.double())) for a, b in (logits[:2], logits[2:])
    )
    return raw, scaled


def ratio(rows: list[dict[str, Any]]) -> float:
    reference, own = (statistics.median(row[key] for row in rows) for key in ("reference_s", "own_s"))
    return reference / own


def summary(name: str, rows: list[dict[str, Any]]) -> str:
    def worst(key: str) -> Any:
        return max(row[key] for row in rows)

    cells = [
        name,
        len(rows),
        sum(row["pixels_differing"] == 0 for row in rows),
        f"{worst('mean_difference'):.1e}",
        worst("largest_difference"),
        worst("pixels_differing"),
        sum(row["shift"] != (0, 0) or row["outside_mesh_differing"] > 0 for row in rows),
        *(f"{min(row['cosines'][n] for row in rows):.7f}" for n in (0, 1)),
        *(f"{1000 * statistics.median(row[key] for row in rows):.3g}" for key in ("reference_s", "own_s")),
        f"{ratio(rows):.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    sys.exit(main())
