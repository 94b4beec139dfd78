"""Answering questions: the one thread that owns the text encoder.

Questions that arrive while it is busy are encoded and searched together, in one batch. Whoever asks
awaits; a question whose asker has gone is dropped before it costs anything. What it answers with is
one `Engine`, which can be exchanged between two batches.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from app.telemetry import Metrics, request_id
from clasp_core.errors import IndexUnavailable, NotReady
from clasp_core.ingest import embed_recording
from clasp_core.library import Hit, Library, Question, mean_vector
from clasp_core.models import Model, SpeechEncoder
from clasp_core.tracing import record
from clasp_core.types import Seconds

MAX_BATCH = 32
MAX_WAITING = 1024
MAX_RECORDINGS_WAITING = 32
MAX_QUERY_RECORDING_S: Seconds = 60.0


class Engine:
    """A model and the library opened with it. Questions that one encodes are searched for by the same one."""

    def __init__(self, model: Model, library: Library) -> None:
        """Loads the text encoder and brings the index up to date, unless that lies elsewhere and does not
        answer: then questions say so, until it does."""
        self.model = model
        self.library = library
        with ThreadPoolExecutor(1) as aside:
            current = aside.submit(library.refresh)
            self.text_encoder = model.text_encoder()
            self.text_encoder.encode(["warm-up"])
            with suppress(IndexUnavailable):
                current.result()

    def embed_recording(
        self, path: Path, lang: str | None, given_up: Callable[[], bool]
    ) -> NDArray[np.float32]:
        """A recording as a query, in which `lang` is spoken: one unit vector (dim,). From one thread.

        Raises InvalidAudio, and NotReady soon after it is `given_up`.
        """
        segments = embed_recording(
            self._speech, path, max_duration_s=MAX_QUERY_RECORDING_S, lang=lang, given_up=given_up
        )
        return mean_vector(segments)

    @cached_property
    def _speech(self) -> SpeechEncoder:
        return self.model.speech_encoder()


class EngineChanged(Exception):
    """A query vector was made by an engine that has been exchanged since: make it again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Hits, the model they are by, and the seconds that the question's batch took to encode and to search."""

    model: Model
    hits: list[Hit]
    encode_s: Seconds
    search_s: Seconds


@dataclass(slots=True)
class _Waiting:
    query: str | NDArray[np.float32]
    question: Question
    made_by: Engine | None
    answer: asyncio.Future[Answer]
    """Of its asker's event loop, which alone may set it."""
    asked: Seconds = field(default_factory=time.perf_counter)
    stages: tuple[tuple[str, Seconds, Seconds], ...] = ()
    """What the time went to: stage, begin and end."""
    request_id: str = field(default_factory=request_id)


class Answerer:
    """`ask` from any task; everything else happens on its own thread."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine = engine
        """What the next batch is answered with. Any thread may put another in its place."""
        self._metrics = metrics
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="answerer", daemon=True)
        self._recordings = 0
        # a thread of their own: those who wait for it hold none of the threads that all others need
        self._listener = ThreadPoolExecutor(1, "listener")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answer what has been asked, then end."""
        self._listener.shutdown(wait=False, cancel_futures=True)
        self._waiting.put(None)
        self._thread.join()

    async def ask(
        self, query: str | NDArray[np.float32], question: Question, *, made_by: Engine | None = None
    ) -> Answer:
        """`query` is a normalised text, or a unit vector (dim,) that was `made_by` an engine.

        Raises NotReady where too many questions wait, and EngineChanged where `made_by` no longer answers.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(query, question, made_by, loop.create_future())
        try:
            self._waiting.put_nowait(waiting)
        except queue.Full:
            raise NotReady("Too many questions are waiting; ask again in a moment.") from None
        answer = await waiting.answer
        for stage, began, ended in waiting.stages:  # on the other thread, but part of this request's trace
            record(stage, began, ended)
        return answer

    def waiting(self) -> int:
        """About how many questions wait."""
        return self._waiting.qsize()

    def check_room(self) -> None:
        """Raises NotReady where so many recordings wait to be questions that one more would wait in vain."""
        if self._recordings >= MAX_RECORDINGS_WAITING:
            raise NotReady("Too many recordings are waiting to be searched by; ask again in a moment.")

    async def embed(self, engine: Engine, path: Path, lang: str | None) -> NDArray[np.float32]:
        """As `engine.embed_recording`, one at a time; given up when the task is cancelled.

        Raises NotReady, too, where too many wait.
        """
        self.check_room()
        self._recordings += 1
        over = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._listener, engine.embed_recording, path, lang, over.is_set)
        finally:
            over.set()
            self._recordings -= 1

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, ending = [first], False
            while len(batch) < MAX_BATCH and not ending:
                try:
                    following = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    ending = True
                else:
                    batch.append(following)
            if batch := [waiting for waiting in batch if not waiting.answer.done()]:
                with structlog.contextvars.bound_contextvars(request_ids=[one.request_id for one in batch]):
                    self._answer(batch)
            if ending:
                return

    def _answer(self, batch: list[_Waiting]) -> None:
        started = time.perf_counter()
        engine = self.engine
        _tell([(one, EngineChanged()) for one in batch if one.made_by not in (None, engine)])
        batch = [waiting for waiting in batch if waiting.made_by in (None, engine)]
        if not batch:
            return
        try:
            vectors = np.empty((len(batch), engine.model.dim), np.float32)
            texts = {
                place: waiting.query for place, waiting in enumerate(batch) if isinstance(waiting.query, str)
            }
            vectors[list(texts)] = engine.text_encoder.encode(list(texts.values()))
            for vector, waiting in zip(vectors, batch, strict=True):
                if not isinstance(waiting.query, str):
                    vector[:] = waiting.query
            encoded = time.perf_counter()
            results = engine.library.search(vectors, [waiting.question for waiting in batch])
        except Exception as error:
            _tell([(waiting, error) for waiting in batch])
            return
        searched = time.perf_counter()
        encode_s, search_s = encoded - started, searched - encoded
        self._metrics.search_batch.observe(len(batch))
        self._metrics.search_seconds.labels("encode").observe(encode_s)
        self._metrics.search_seconds.labels("search").observe(search_s)
        answers: list[tuple[_Waiting, Answer | Exception]] = []
        for waiting, hits in zip(batch, results, strict=True):
            self._metrics.search_wait.observe(started - waiting.asked)
            waiting.stages = (
                ("queue", waiting.asked, started),
                ("encode", started, encoded),
                ("search", encoded, searched),
            )
            answers.append((waiting, Answer(engine.model, hits, encode_s, search_s)))
        _tell(answers)


def _tell(answers: Sequence[tuple[_Waiting, Answer | Exception]]) -> None:
    """Let those who await these go on, of one event loop all of them: it is woken once for all."""

    def tell() -> None:
        for waiting, answer in answers:
            if waiting.answer.done():  # its asker has gone
                continue
            if isinstance(answer, Exception):
                waiting.answer.set_exception(answer)
            else:
                waiting.answer.set_result(answer)

    if answers:
        answers[0][0].answer.get_loop().call_soon_threadsafe(tell)
