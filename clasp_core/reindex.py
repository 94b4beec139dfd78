"""Another model for a library, while it is in use: embed every recording anew, then switch at once.

    library = Library(folder, model=new.fingerprint, name=new.name, dim=new.dim, reindex=True)
    Reindexer(library, new.speech_encoder, max_duration_s=3600).run()

Until the switch all answers are by the old vectors. What was done stays done if this is killed; a later
run goes on from there, and several may run together.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from clasp_core import ingest
from clasp_core.catalog import Progress, Reindexing
from clasp_core.errors import ProcessingFailed
from clasp_core.faults import fault
from clasp_core.ingest import Ingester
from clasp_core.library import Library
from clasp_core.models import SpeechEncoder
from clasp_core.segmenting import SegmentConfig
from clasp_core.types import Seconds

PATIENCE = 3
"""Handfuls of recordings that may arrive and put off the switch, before arrivals have to wait for it."""
HOPEFUL = 20
"""Steps in vain after which it is the machine's or the model's trouble, and not the recordings'."""


Result = Literal["switched", "nothing to do", "stopped"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to: how many recordings it embedded itself, and why others failed (reasons by id).

    "switched" also where another run that shared the work was the one to switch; it has the failures then.
    """

    result: Result
    embedded: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)


class Reindexer:
    """Use from one thread; `stop` may be called from any."""

    def __init__(
        self,
        library: Library,
        speech_encoder: Callable[[], SpeechEncoder],
        *,
        max_duration_s: Seconds,
        segmenting: SegmentConfig | None = None,
    ) -> None:
        """`library` is one opened to `reindex`; the encoder is loaded only if there is something to embed."""
        self._library = library
        self._speech_encoder = speech_encoder
        self._max_duration_s = max_duration_s
        self._segmenting = segmenting
        self._stopping = threading.Event()
        self._ingester: Ingester | None = None

    def stop(self) -> None:
        """Give back what is being embedded, then return from `run`."""
        self._stopping.set()
        if self._ingester is not None:
            self._ingester.stop()

    def run(
        self, *, observe: Callable[[Progress], None] = lambda progress: None, poll_s: Seconds = 0.5
    ) -> Outcome:
        """Embed what lacks vectors of the library's new model, until none does; then switch to it.

        A recording that cannot be embedded is `failed` after the switch. Raises ProcessingFailed where
        none can any more, or too many could not, for reasons that are not theirs; the library then stays as
        it is, and a later run goes on from there.
        """
        self._library.catalog.forget_retired()  # where no service ever runs, nobody else would
        queue = self._library.catalog.reindexing(self._library.stored_model)
        if queue.is_done():
            queue.switch()  # tidies up after runs to other models that were given up
            return Outcome("nothing to do")
        least, completed = queue.progress().left, 0
        vain_steps = small_steps = 0
        while not self._stopping.is_set():
            worked = self._step(queue)
            fault("reindex.done")
            progress = queue.progress()
            observe(progress)
            if worked:
                in_vain = queue.completed == completed and progress.left >= least
                vain_steps = vain_steps + 1 if in_vain else 0
                if vain_steps >= HOPEFUL:
                    raise ProcessingFailed("Nothing more can be embedded by this model; the log says why.")
                least, completed = min(least, progress.left), queue.completed
                small_steps += worked < ingest.TOGETHER and progress.left <= ingest.TOGETHER
                queue.holding = small_steps >= PATIENCE
            elif progress.left and not queue.is_done():
                # it is in the hands of another run: arrivals need not wait for that
                small_steps, queue.holding = 0, False
                self._stopping.wait(poll_s)
            elif (failed := queue.switch()) is not None:
                fault("reindex.switched")
                return Outcome("switched", queue.completed, failed)
        return Outcome("stopped", queue.completed)

    def _step(self, queue: Reindexing) -> int:
        if self._ingester is None:
            if not queue.progress().left:
                return 0
            self._ingester = Ingester(
                self._library,
                self._speech_encoder(),
                max_duration_s=self._max_duration_s,
                segmenting=self._segmenting,
                queue=queue,
            )
        return self._ingester.step()
