"""`python -m tests.bench.capacity [--model mini]`: what `clasp capacity` counts with, measured here.

Writes bench-results/capacity.json, which `clasp capacity --bench` reads; a copy, of the machine that is named
in it, is what that verb starts from (clasp_core/data/capacity.json). Processor time rather than time by the
clock wherever that can be told, so that other work changes little. Uses the bundled samples only.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import faiss
import numpy as np
import soundfile

from clasp_core.capacity import Figures
from clasp_core.catalog import EmbeddedSegment
from clasp_core.index import VectorIndex
from clasp_core.ingest import embed_recording
from clasp_core.library import Library
from clasp_core.models import open_model
from clasp_core.vectors import store_for
from tests.bench.index import LIMIT, everything, speech_like
from tests.bench.ingest import RATE, speech
from tests.bench.measuring import OUT, ROOT, processor
from tests.service import RunningService

SEGMENTS = 10
"""Of each recording that is registered."""
RECORDINGS = 2000
INDEXED = 100_000
BATCH = 32
"""What the service answers together at most."""
FLOOR = 0.95
"""Of the exact ten, what an inverted file must find."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    model = parser.parse_args().model
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured = embedding(model) | catalogue(Path(folder)) | searching() | replica(Path(folder), model)
    figures = Figures(model=model, machine=processor(), **measured)
    OUT.mkdir(exist_ok=True)
    text = json.dumps(asdict(figures), indent=1) + "\n"
    (OUT / "capacity.json").write_text(text)
    print(text, end="")


def embedding(name: str) -> dict[str, float]:
    model = open_model(name)
    encoder = model.speech_encoder()
    sound = speech()
    file = BytesIO()
    soundfile.write(file, sound, RATE, format="flac")
    hours = len(sound) / RATE / 3600
    spent = []
    for _ in range(4):
        file.seek(0)
        began = time.process_time()
        segments = embed_recording(encoder, file, max_duration_s=3600)
        spent.append(time.process_time() - began)
    return {
        "dim": model.dim,
        "segment_s": round(3600 * hours / len(segments), 2),
        "embed_cpu_s_per_hour": round(statistics.median(spent[1:]) / hours, 1),
    }


def catalogue(folder: Path) -> dict[str, float]:
    """A library of recordings with metadata as people have them, on SQLite; then read back into an index."""
    chance = np.random.default_rng(0)
    dim = 384
    vectors = chance.normal(size=(RECORDINGS * SEGMENTS, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    library = Library(folder / "library", model="capacity", dim=dim)
    began = time.perf_counter()
    for number in range(RECORDINGS):
        with library.store.receive() as upload:
            upload.write(str(number).encode())
            upload.seal()
            metadata = {"title": f"Recording {number}", "show": "news", "date": "2026-01-01", "speaker": "A"}
            library.register(upload, metadata=metadata, lang="en", media_type="audio/ogg")
        (recording,) = library.catalog.lease("bench", limit=1, lease_s=60)
        segments = [
            EmbeddedSegment(5.0 * place, 5.0 * place + 5, vector)
            for place, vector in enumerate(vectors[number * SEGMENTS : (number + 1) * SEGMENTS])
        ]
        library.catalog.complete(
            recording.key, "bench", duration_s=5.0 * SEGMENTS, model="capacity", segments=segments
        )
    took = time.perf_counter() - began
    library.catalog.close()
    stored = sum(path.stat().st_size for path in (folder / "library").glob("catalog.sqlite3*"))
    library = Library(folder / "library", model="capacity", dim=dim)
    began = time.process_time()
    library.refresh()
    read = time.process_time() - began
    library.close()
    return {
        "catalogue_bytes_per_segment": round(stored / len(vectors) - 4 * dim),
        "catalogue_recordings_per_s": round(RECORDINGS / took, 1),
        "read_back_vectors_per_s": round(len(vectors) / read),
    }


def searching() -> dict[str, float]:
    """Exact search, and how much of the vectors an inverted file must look at to find what that finds."""
    dim = 384
    vectors, questions = speech_like(INDEXED, dim)
    index = VectorIndex(dim, "bench", store_for("faiss", "cpu"))
    index.apply(everything(vectors))
    index.search(questions[:1], [LIMIT])
    spent = []
    for place in range(0, len(questions), BATCH):
        batch = questions[place : place + BATCH]
        began = time.process_time()
        index.search(batch, [LIMIT] * len(batch))
        spent.append((time.process_time() - began) / len(batch))
    flat = faiss.IndexFlatIP(dim)
    flat.add(vectors)
    exact = flat.search(questions, LIMIT)[1]
    lists = int(4 * np.sqrt(INDEXED))
    inverted = faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    inverted.train(vectors)
    inverted.add(vectors)
    probes = 1
    while True:
        inverted.nprobe = probes
        faiss.cvar.indexIVF_stats.reset()
        found = inverted.search(questions, LIMIT)[1]
        recall = np.mean([len(set(a) & set(b)) / LIMIT for a, b in zip(exact, found, strict=True)])
        visited = faiss.cvar.indexIVF_stats.ndis / len(questions) / INDEXED
        if recall >= FLOOR:
            break
        probes += 1
    return {
        "search_cpu_s_per_million_numbers": float(f"{statistics.median(spent) / (INDEXED * dim / 1e6):.3g}"),
        "ivf_visited": float(f"{visited:.3g}"),
    }


def replica(folder: Path, model: str) -> dict[str, float]:
    """The service and its worker at rest, and the API's processor time for a question, on a small index."""
    samples = sorted((ROOT / "app" / "samples" / "audio").glob("*.opus"))[:5]
    with RunningService(folder, model=model) as service:
        service.start()
        for path in samples:
            service.ready(path.read_bytes(), id=path.stem)
        questions = [f"the train to platform {number} is late" for number in range(200)]
        service.found(questions[0])
        began = spent(service)
        for question in questions:
            service.found(question)
        took = spent(service) - began
        assert service.process is not None
        api = resident(service.process.pid)
        worker = sum(resident(pid) for pid in service.processes()) - api
        service.stop()
    return {
        "question_cpu_s": round(took / len(questions), 5),
        "api_bytes": round(api, -6),
        "worker_bytes": round(worker, -6),
    }


def spent(service: RunningService) -> float:
    """The API process's processor time."""
    text = service.client.get("/metrics").raise_for_status().text
    return float(text.partition("\nprocess_cpu_seconds_total ")[2].split("\n")[0])


def resident(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main()
