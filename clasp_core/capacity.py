"""What a library of some size needs: memory, disk, processors, machines, cost, and what gives way first.

Arithmetic on measured figures: `python -m tests.bench.capacity` measures them, and what it found on one
machine is in `data/capacity.json`. What is assumed rather than measured is a constant below, with its reason,
or a default that a caller can replace. docs/capacity.md works three sizes through.
"""

import json
import math
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from clasp_core.errors import InvalidInput

MEASURED = Path(__file__).parent / "data" / "capacity.json"
DIMS = {"mini": 384, "hybrid": 384, "paper": 768}
BYTES_OF_A_NUMBER = {"flat": 4, "half": 2, "ivf": 4, "sq8": 1}
"""In memory, by index: exact; exact in 16 bits; inverted lists; inverted lists in 8 bits, in Milvus."""
BYTES_OF_AN_ENTRY = 16
"""Of a vector beside its numbers: its number and its place."""
BATCH = 32
"""Questions that the service answers together at most."""

# --- assumed
BATCH_WITHIN_S = 0.1
"""What searching a full batch may take before exact search is too slow."""
BUSY = 0.6
"""How much of a processor may be used on average: whoever asks then waits for others one and a half times as
long as an answer takes (M/M/1: 0.6 / 0.4)."""
INDEX_SHARE = 0.5
"""Of a machine's memory for vectors: an index is built aside, beside the one that answers."""
ENGINE_OVERHEAD = 1.2
"""Memory of Milvus for a byte of vectors: segments that grow, and are merged, are there twice for a while."""
ENGINE_SHARE = 0.75
"""Of a query node's memory for vectors."""
WRITES_OF_A_RECORDING = 3
"""Transactions: registered, leased (often several at once), finished."""
BEAT_S = 5.0
"""A worker at work writes that it lives."""
LOG_FACTOR = 2.0
"""Bytes that PostgreSQL writes for one that it stores: its log, and the table."""
DATABASE_CORES = 4
DATABASE_BYTES = 4e12
"""The largest catalogue for one PostgreSQL: at 50 MB/s, to restore it takes a day."""
REBUILD_WITHIN_S = 4 * 3600.0
"""The longest that making an index anew from the catalogue may take."""
MONTH_H = 730.0


@dataclass(frozen=True)
class Figures:
    """What one machine does, by `python -m tests.bench.capacity`. Processor times are of one core."""

    model: str
    machine: str
    dim: int
    segment_s: float
    """Sound for each segment, pauses included."""
    embed_cpu_s_per_hour: float
    """To embed an hour of sound."""
    catalogue_bytes_per_segment: float
    """On disk beside the vector's numbers, with its share of the recording's row."""
    catalogue_recordings_per_s: float
    """Registered, leased and finished one after the other, each on disk; SQLite."""
    read_back_vectors_per_s: float
    """From the catalogue into a new index."""
    search_cpu_s_per_million_numbers: float
    """Of one question among 32, exact search."""
    ivf_visited: float
    """Share of the vectors that an inverted file reads to find 0.95 of the exact ten."""
    question_cpu_s: float
    """Of the API for a question on a small index: HTTP and the text encoder."""
    api_bytes: float
    """Resident, without an index."""
    worker_bytes: float


def read_figures(path: Path = MEASURED) -> Figures:
    """Raises InvalidInput where the file is not one that `tests.bench.capacity` wrote."""
    try:
        return Figures(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        wanted = ", ".join(field.name for field in fields(Figures))
        raise InvalidInput(f"{path} has no measured figures ({wanted}): {error}") from error


@dataclass(frozen=True)
class Demand:
    """What is asked of a library. All numbers are positive; `hours_per_day` may be 0."""

    segments: float
    questions_per_s: float = 1.0
    hours_per_day: float = 0.0
    """New sound."""
    backlog_days: float = 30.0
    """In which what there is at first is to be embedded."""
    recording_s: float = 600.0
    """Length of a recording."""
    kbit_per_s: float = 64.0
    """Of the files as they are uploaded."""
    dim: int = 384
    speed: float | None = None
    """Hours of sound that a worker embeds in an hour, where it is a GPU and not a core as measured."""
    index: str = "auto"
    """One of `BYTES_OF_A_NUMBER`, or `auto`."""


@dataclass(frozen=True)
class Machine:
    cores: int = 16
    memory: float = 64e9
    """Bytes."""
    disk: float = 4e12


@dataclass(frozen=True)
class Prices:
    """A month of each, in any currency. The defaults are examples, not offers."""

    core: float = 20.0
    memory_gb: float = 3.0
    disk_gb: float = 0.10
    object_gb: float = 0.02
    gpu: float = 1000.0


@dataclass(frozen=True)
class Limit:
    """Something that gives way: `share` is how much of it is used, so over 1 it has."""

    what: str
    used: float
    allowed: float
    unit: str
    way_out: str

    @property
    def share(self) -> float:
        return self.used / self.allowed


@dataclass(frozen=True)
class Plan:
    """What `demand` needs, by `figures`. Bytes, seconds, processors' cores."""

    demand: Demand
    figures: Figures
    machine: Machine = Machine()
    prices: Prices = Prices()

    # --- what is stored

    @property
    def hours(self) -> float:
        return self.demand.segments * self.figures.segment_s / 3600

    @property
    def recordings(self) -> float:
        return self.hours * 3600 / self.demand.recording_s

    @property
    def audio(self) -> float:
        return self.hours * 3600 * self.demand.kbit_per_s * 1000 / 8

    @property
    def catalogue(self) -> float:
        return self.demand.segments * (4 * self.demand.dim + self.figures.catalogue_bytes_per_segment)

    def vectors(self, index: str) -> float:
        """In memory, in one copy."""
        return self.demand.segments * (BYTES_OF_A_NUMBER[index] * self.demand.dim + BYTES_OF_AN_ENTRY)

    # --- searching

    @cached_property
    def index(self) -> str:
        if self.demand.index != "auto":
            return self.demand.index
        if BATCH * self.search_cpu("flat") <= BATCH_WITHIN_S:
            return "flat"
        return "ivf" if self.vectors("ivf") <= INDEX_SHARE * self.machine.memory else "sq8"

    def search_cpu(self, index: str) -> float:
        """Seconds of a core for one question, among others."""
        read = self.demand.segments
        if index in ("ivf", "sq8"):
            read = read * self.figures.ivf_visited + 4 * math.sqrt(read)  # and the lists' centroids
        return self.figures.search_cpu_s_per_million_numbers * read * self.demand.dim / 1e6

    @property
    def local(self) -> bool:
        """Whether the API holds the vectors, rather than Milvus."""
        return self.index != "sq8"

    @property
    def question_cores(self) -> float:
        spent = self.figures.question_cpu_s + (self.search_cpu(self.index) if self.local else 0)
        return self.demand.questions_per_s * spent

    @property
    def replicas(self) -> int:
        least = 2 if self.profile == "scaled" else 1
        return max(least, math.ceil(self.question_cores / BUSY))

    @property
    def replica_memory(self) -> float:
        return self.figures.api_bytes + (self.vectors(self.index) if self.local else 0)

    @property
    def engine_memory(self) -> float:
        """Of all query nodes of Milvus."""
        return 0 if self.local else ENGINE_OVERHEAD * self.vectors("sq8")

    @property
    def engine_nodes(self) -> int:
        by_memory = self.engine_memory / (ENGINE_SHARE * self.machine.memory)
        return math.ceil(max(by_memory, self.engine_cores / self.machine.cores))

    @property
    def engine_cores(self) -> float:
        return 0 if self.local else self.demand.questions_per_s * self.search_cpu("sq8") / BUSY

    # --- embedding

    @property
    def speed(self) -> float:
        """Hours of sound that a worker embeds in an hour."""
        return self.demand.speed or 3600 / self.figures.embed_cpu_s_per_hour

    @property
    def steady_workers(self) -> int:
        """For what comes every day; each is a core, or a GPU where a speed was given."""
        return math.ceil(self.demand.hours_per_day / 24 / self.speed / BUSY)

    @property
    def backlog_workers(self) -> int:
        """For what there is at first, in the days for that."""
        return math.ceil(self.hours / (24 * self.demand.backlog_days * self.speed))

    @property
    def workers(self) -> int:
        return max(1, self.steady_workers, self.backlog_workers)

    @property
    def recordings_per_s(self) -> float:
        steady = self.demand.hours_per_day * 3600 / self.demand.recording_s / 86400
        return max(steady, self.recordings / (86400 * self.demand.backlog_days))

    @property
    def transactions_per_s(self) -> float:
        return WRITES_OF_A_RECORDING * self.recordings_per_s + self.workers / BEAT_S

    @property
    def database_bytes_per_s(self) -> float:
        segments = self.recordings_per_s * self.demand.recording_s / self.figures.segment_s
        return LOG_FACTOR * segments * self.catalogue / self.demand.segments

    # --- what gives way

    @cached_property
    def limits(self) -> list[Limit]:
        """Of one machine and then of one database, the most used one first."""
        figures, machine = self.figures, self.machine
        beside = "workers on other machines (scaled)"
        found = [
            Limit(
                "exact search of a batch",
                BATCH * self.search_cpu("flat"),
                BATCH_WITHIN_S,
                "s",
                "an inverted file (ivf)",
            ),
            Limit(
                "vectors in a machine's memory",
                self.vectors("ivf") / 1e9,
                INDEX_SHARE * machine.memory / 1e9,
                "GB",
                "Milvus (scaled)",
            ),
            Limit("one API process", self.question_cores, BUSY, "cores", "replicas (scaled)"),
            Limit(
                "recordings and catalogue on a disk",
                (self.audio + self.catalogue) / 1e12,
                machine.disk / 1e12,
                "TB",
                "an S3 store (scaled)",
            ),
            Limit(
                "catalogue in one PostgreSQL",
                self.catalogue / 1e12,
                DATABASE_BYTES / 1e12,
                "TB",
                "several installations, by collection",
            ),
            Limit(
                "transactions, one after the other",
                self.transactions_per_s,
                WRITES_OF_A_RECORDING * figures.catalogue_recordings_per_s,
                "a second",
                "longer recordings, or more days",
            ),
            Limit(
                "an index made anew",
                self.demand.segments / figures.read_back_vectors_per_s / 3600,
                REBUILD_WITHIN_S / 3600,
                "h",
                "several installations",
            ),
        ]
        if self.demand.speed is None:
            found.append(Limit("workers in a machine", self.workers, machine.cores / 2, "cores", beside))
        else:
            found.append(Limit("workers in a machine", self.workers, 1, "GPUs", beside))
        return sorted(found, key=lambda limit: -limit.share)

    @cached_property
    def profile(self) -> str:
        """`single` or `scaled`."""
        of_a_machine = [limit for limit in self.limits if limit.way_out.endswith("(scaled)")]
        return "scaled" if any(limit.share > 1 for limit in of_a_machine) else "single"

    # --- machines and cost

    @property
    def cores(self) -> float:
        workers = self.steady_workers if self.demand.speed is None else 0
        database = DATABASE_CORES if self.profile == "scaled" else 0
        return self.replicas + max(1, workers) + self.engine_cores + database

    @property
    def memory(self) -> float:
        workers = max(1, self.steady_workers) * self.figures.worker_bytes
        database = min(0.1 * self.catalogue, 256e9) if self.profile == "scaled" else 0
        return self.replicas * self.replica_memory + workers + self.engine_memory + database

    @property
    def disk(self) -> float:
        """Block storage: the catalogue, the indexes, and without an S3 store the recordings."""
        saved = self.replicas * self.vectors(self.index) if self.local else 2 * self.vectors("sq8")
        return self.catalogue + saved + (self.audio if self.profile == "single" else 0)

    @property
    def machines(self) -> int:
        """When the backlog is done, Milvus's among them; `backlog_workers` are beside these for its time."""
        cores, memory = self.cores - self.engine_cores, self.memory - self.engine_memory
        rest = max(cores / self.machine.cores, memory / self.machine.memory)
        return self.engine_nodes + math.ceil(rest)

    @property
    def month(self) -> float:
        """Cost of a month, when the backlog is done."""
        prices = self.prices
        gpus = self.steady_workers if self.demand.speed is not None else 0
        return (
            self.cores * prices.core
            + self.memory / 1e9 * prices.memory_gb
            + self.disk / 1e9 * prices.disk_gb
            + (self.audio / 1e9 * prices.object_gb if self.profile == "scaled" else 0)
            + gpus * prices.gpu
        )

    @property
    def backlog_cost(self) -> float:
        """Once: the hours of cores, or GPUs, that what there is at first takes."""
        hours = self.hours / self.speed
        return hours / MONTH_H * (self.prices.core if self.demand.speed is None else self.prices.gpu)
