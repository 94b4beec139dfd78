"""`python -m tests.bench.index`: what a search costs in each vector store that this machine can run.

One table: the median of single questions, questions a second in batches of 64, and seconds to fill. Both
go through the index: nearest vectors, recordings, exact scores. One thread; results are checked to agree.
"""

import statistics
import time
from collections.abc import Iterator
from functools import partial

import numpy as np

from clasp_core.catalog import Changes
from clasp_core.errors import IndexUnavailable
from clasp_core.index import Match, VectorIndex
from clasp_core.types import Embeddings
from clasp_core.vectors import StoreMaker, store_for
from tests.core.doubles import unit

SIZES = [(10_000, 384), (10_000, 768), (100_000, 384), (100_000, 768)]
SEGMENTS = 10
"""Of each recording."""
LIMIT = 10
QUESTIONS = 128
BATCH = 64
STORES = {
    "faiss, CPU": partial(store_for, "faiss", "cpu"),
    "torch, CPU": partial(store_for, "torch", "cpu"),
    "faiss, GPU": partial(store_for, "faiss", "cuda"),
    "faiss, GPU, half": partial(store_for, "faiss", "cuda", half=True),
    "torch, GPU": partial(store_for, "torch", "cuda"),
}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    present = dict(stores())
    print("| segments x dim | store | fill, s | one question, ms p50 | batches of 64, questions/s |")
    print("| --- | --- | --- | --- | --- |")
    for count, dim in SIZES:
        vectors, questions = speech_like(count, dim)
        expected: list[float] | None = None
        for name, new_store in present.items():
            index = VectorIndex(dim, "bench", new_store)
            started = time.perf_counter()
            index.apply(everything(vectors))
            index.search(questions[:1], [LIMIT])
            fill = time.perf_counter() - started
            one = [milliseconds(index, questions[place : place + 1]) for place in range(QUESTIONS)]
            batches = np.split(questions, QUESTIONS // BATCH)
            rate = (
                1000
                * BATCH
                / statistics.median(milliseconds(index, batch) for batch in batches for _ in range(3))
            )
            scores = [
                score for matches in index.search(questions[:8], [LIMIT] * 8) for score in best(matches)
            ]
            assert expected in (None, scores), f"{name} finds something else"
            expected = scores
            p50 = statistics.median(one)
            print(f"| {count:,} x {dim} | {name} | {fill:.2f} | {p50:.2f} | {rate:,.0f} |", flush=True)
            del index


def stores() -> Iterator[tuple[str, StoreMaker]]:
    for name, choose in STORES.items():
        try:
            yield name, choose()
        except IndexUnavailable as error:
            print(f"without {name}: {error.detail}")


def speech_like(count: int, dim: int) -> tuple[Embeddings, Embeddings]:
    """Segments in topics of about 200, and questions that are segments seen through another modality."""
    chance = np.random.default_rng(0)
    topics = chance.normal(size=(count // 200, dim)).astype(np.float32)
    vectors = topics[chance.integers(len(topics), size=count)]
    vectors = unit(vectors + 0.8 * chance.standard_normal((count, dim), np.float32))
    chosen = vectors[chance.integers(count, size=QUESTIONS)]
    return vectors, unit(chosen + 0.8 * unit(chance.normal(size=(QUESTIONS, dim))))


def everything(vectors: Embeddings) -> Changes:
    owners, ordinals = np.divmod(np.arange(len(vectors)), SEGMENTS)
    return Changes(1, frozenset(owners.tolist()), owners, ordinals, vectors)


def milliseconds(index: VectorIndex, questions: Embeddings) -> float:
    started = time.perf_counter()
    index.search(questions, [LIMIT] * len(questions))
    return 1000 * (time.perf_counter() - started)


def best(matches: list[Match]) -> list[float]:
    return sorted((match.score for match in matches), reverse=True)[:LIMIT]


if __name__ == "__main__":
    main()
