"""The vector index in Milvus, which any number of processes share: a lite file, one server, or a cluster.

Milvus proposes, the catalogue decides: candidates' vectors are read from the catalogue and scored as those of
a local index are, and what the catalogue does not have is no hit. So all that is asked of Milvus is that no
segment be missing up to a point of the change sequence, and that holds whatever is written late, twice or
by a process that died in the middle:

- A row is named by its segment's number and by the newest change when its vector was read (`seq`). To apply
  changes is to put their rows, and only then to remove older rows of the same recordings. What is late is
  older, so it takes away nothing newer; rows that it leaves behind are candidates too many.
- The point is a row of a second collection, written once the rows are acknowledged. One that comes too late
  says less than is true, which costs work.
- A collection whose point is none of the catalogue's history is left, for a new one with another name. A
  pointer row says which is to be used; until it is complete, whoever has the turn fills it.

The turn (`catalog.take_turn`) saves processes from doing the same at once. Nothing depends on it.
"""

import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

import grpc
import numpy as np
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient
from pymilvus.client.ts_utils import get_collection_ts
from pymilvus.client.types import SegmentState
from pymilvus.exceptions import MilvusException

from clasp_core.catalog import Catalog, Changes
from clasp_core.errors import DiskFull, IndexUnavailable
from clasp_core.faults import fault
from clasp_core.filters import EVERYTHING
from clasp_core.index import (
    FINER,
    ORDINAL_BITS,
    QUESTIONS,
    Among,
    Grouping,
    Match,
    best_recordings,
    best_segments,
    check_vectors,
    exact_scores,
    follow_up,
    place_of,
    questions_near,
    read_rows,
    read_vectors,
)
from clasp_core.ivf import (
    DEPTH,
    NEARLY_ALL,
    RECALL_AT,
    GivenUp,
    Recall,
    Wanted,
    fewest_probes,
    lists_for,
)
from clasp_core.types import Embeddings, Seconds
from clasp_core.vectors import FaissStore

_log = logging.getLogger(__name__)

# they log what failed, with the request: what people asked for, and the names of their collections
for _name in ("pymilvus", "pymilvus.milvus_client", "milvus_lite"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

FORMAT = 1
"""Of the rows; another one is kept apart."""
POINTS = "clasp_points"
"""The collection of points and pointers, of all libraries in one Milvus."""
DEEPEST = 16_384
"""How many neighbours Milvus gives at most (its quota `topK`)."""
ROWS_AT_ONCE = 1000
KEYS_AT_ONCE = 5000
"""Recordings that one expression names."""
LOOK_EVERY_S: Seconds = 5.0
"""How soon it is noticed that Milvus was put back to an earlier state, or that another collection counts."""
TURN_S: Seconds = 5.0
"""How long others wait for a process that died at work."""
WAIT_AT_MOST_S: Seconds = 20.0
"""How long a search waits for another process to apply what it must see."""
REST_S: Seconds = 1.0
"""After trouble, how long nobody asks again: requests then fail at once, not each after a timeout."""
UNUSED_KEPT_S: Seconds = 600.0
"""How long a collection that is not used any more outlives its last change."""
SEALED_BYTES = 512 << 20
"""Milvus's own segments, each of which has lists of its own, are full at this size. Smaller ones get fewer
lists (one for 39 rows), by themselves."""
EVERY_LIST = 65_536
"""The most that Milvus takes; more than there are is all of them."""
SETTLED = 0.98
"""The share of the rows that must be in lists for recall to be measured: others are looked at whole."""
SETTLE_AT_MOST_S: Seconds = 60.0
SETTLE_AGAIN_S: Seconds = 600.0
"""How long nobody tries again where they were not: each time seals a segment, be it ever so small."""
RECALL_KEPT_S: Seconds = 86_400.0
"""After which it is measured again: Milvus merges segments, and two have twice the lists of one."""
MEASURED_AT_ONCE = 10
MEASURING_S: Seconds = 60.0
"""The turn of who measures."""
ANSWER_WITHIN_S: Seconds = 10.0
WRITE_WITHIN_S: Seconds = 60.0

_COLLECTION_NAME = re.compile(r"[A-Za-z0-9_:-][A-Za-z0-9._:-]*")


Layout = Literal["flat", "ivf"]


def milvus_at(
    uri: str, token: str = "", *, kind: Layout = "flat", exhaustive_up_to: int = 200_000
) -> Callable[[Catalog, str, int], "MilvusIndex"]:
    """What opens the index in the Milvus at `uri`: `http://` or `https://` with host and port, or the path of
    a milvus-lite file that ends in `.db`. The token, or `user:password` in the URI, is in no message.
    `kind` and `exhaustive_up_to` are as MilvusIndex has them.

    Raises IndexUnavailable for another kind of URI.
    """
    if not uri.endswith(".db"):
        parts = urlsplit(uri)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise IndexUnavailable(
                "CLASP_VECTOR_STORE=milvus:URI takes http(s)://HOST:PORT, or a file named *.db."
            )
        userinfo, _, host = parts.netloc.rpartition("@")
        token = token or unquote(userinfo)
        uri = urlunsplit(parts._replace(netloc=host))
    return partial(MilvusIndex, uri=uri, token=token, kind=kind, exhaustive_up_to=exhaustive_up_to)


@dataclass(frozen=True, slots=True)
class _State:
    """A collection, the point up to which it is complete, and the time of Milvus (a hybrid timestamp; 0 if
    unknown) at which all of that was written."""

    name: str
    point: tuple[int, str]
    written: int

    @property
    def fresh(self) -> Mapping[str, Any]:
        """What a reader says to see it all, and to wait for nothing else."""
        if not self.written:
            return {"consistency_level": "Strong"}
        return {"consistency_level": "Customized", "guarantee_timestamp": self.written}


@dataclass(frozen=True, slots=True)
class _Proposals:
    """Segments' numbers with scores as Milvus has them, best first; whether there are no others."""

    scored: Sequence[tuple[float, int]]
    complete: bool


class MilvusIndex:
    """Cosine search over unit vectors that are in Milvus. Connects when first followed.

    Exact where it is flat. `ivf` is Milvus's IVF_FLAT: scores are exact, and so many lists are looked at as
    was measured to be enough (`calibrate`); all of them until then, and where a filter leaves no more than
    `exhaustive_up_to` rows.
    """

    is_shared = True

    def __init__(
        self,
        catalog: Catalog,
        model: str,
        dim: int,
        *,
        uri: str,
        token: str = "",
        kind: Layout = "flat",
        exhaustive_up_to: int = 200_000,
    ) -> None:
        self.model = model
        self.kind: Layout = kind
        self.lists = lists_for(SEALED_BYTES // (4 * dim)) if kind == "ivf" else 1
        """In each of Milvus's segments, at most."""
        self.exhaustive_up_to = exhaustive_up_to
        self._measured: tuple[str, Recall | None, float] = ("", None, 0.0)
        """Of which collection, what, and when (seconds since 1970)."""
        self._unsettled_until = 0.0
        self.dim = dim
        self._catalog = catalog
        self._uri = uri
        self._token = token
        self._owner = secrets.token_hex(8)
        self._noise = FaissStore(dim).noise  # Milvus, too, sums in float32 in some order
        self._client: Any = None
        self._library = ""
        self._base = ""
        """What names of this library's and model's collections begin with."""
        self._state: _State | None = None
        self._looked = -LOOK_EVERY_S
        self._turn_until = 0.0
        self._resting_until = 0.0
        self._trouble = ""
        self._counts: dict[tuple[_State, str], int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def point(self) -> tuple[int, str]:
        return (0, "") if self._state is None else self._state.point

    def save(self, folder: object) -> None:
        """Milvus keeps it."""

    # --- following

    def follow(self, catalog: Catalog, at_once: int) -> bool:
        """As `Index.follow`. What others have applied is taken as it is; what nobody has is applied here,
        or awaited, where it is another's turn. Raises IndexUnavailable."""
        last = catalog.last_change()
        with self._asking():
            self._connect()
            if self._state is None or time.monotonic() - self._looked > LOOK_EVERY_S:
                self._look()
            if self._state is not None and (
                self._state.point == last
                or (self._state.point[0] > last[0] and catalog.holds(self._state.point))
            ):
                return False
            self._catch_up(last, at_once)
            return True

    def _connect(self) -> None:
        if self._client is None:
            self._client = MilvusClient(uri=self._uri, token=self._token, timeout=ANSWER_WITHIN_S)
            self._library = f"clasp_{self._catalog.identity()}"
            model = re.sub(r"[^A-Za-z0-9]", "_", self.model)
            kind = "" if self.kind == "flat" else f"_{self.kind}"
            self._base = f"{self._library}_{model}_{self.dim}_{FORMAT}{kind}"

    def _look(self) -> None:
        """What Milvus says. Whether that is less than was known here is asked twice, since an answer may be a
        moment old; then Milvus is right: it was put back."""
        known = self._state
        said = None if known is None else self._said("Eventually")
        if known is None or said is None or said.name != known.name or said.point[0] < known.point[0]:
            said = self._said("Strong")
            if said is not None:  # after a restart, nobody else may have
                self._client.load_collection(said.name, timeout=WRITE_WITHIN_S)
        self._state = said
        self._looked = time.monotonic()
        if said is not None:
            self._how_many(said, "")

    def _said(self, consistency: str) -> _State | None:
        known = () if self._state is None else (self._state.name, _recall_of(self._state.name))
        notes = self._notes([self._base, *known], consistency)
        if (pointer := notes.get(self._base)) is None:
            return None
        name = pointer["collection"]
        if name not in notes:
            notes = self._notes([name, _recall_of(name)], consistency)
        note, measured = notes.get(name), notes.get(_recall_of(name))
        if note is None or not self._client.has_collection(name, timeout=ANSWER_WITHIN_S):
            return None
        if measured is not None:
            recall = Recall(**json.loads(measured["collection"]))
            self._measured = (name, recall, float(measured["noted_at"]))
        return _State(name, (int(note["seq"]), note["token"]), int(note["written"]))

    def _notes(self, names: Sequence[str], consistency: str) -> dict[str, Mapping[str, Any]]:
        fields = ["name", "collection", "seq", "token", "written", "noted_at"]
        try:
            rows = self._client.query(
                POINTS,
                filter=f"name in {json.dumps(names)}",
                output_fields=fields,
                consistency_level=consistency,
                timeout=ANSWER_WITHIN_S,
            )
        except MilvusException:
            if not self._client.has_collection(POINTS, timeout=ANSWER_WITHIN_S):
                return {}
            self._client.load_collection(POINTS, timeout=WRITE_WITHIN_S)
            raise
        return {row["name"]: row for row in rows}

    def _catch_up(self, last: tuple[int, str], at_once: int) -> None:
        patience = time.monotonic() + WAIT_AT_MOST_S
        while not self._take_turn():
            if time.monotonic() > patience:
                raise IndexUnavailable("Another process is still filling the vector index; ask again later.")
            time.sleep(0.05)
            said = self._said("Eventually")
            if said is not None and said.point[0] >= last[0] and self._catalog.holds(said.point):
                self._state = said
                return
        try:
            self._fill(at_once)
        finally:
            with suppress(DiskFull):
                self._catalog.end_turn(self._base, self._owner)

    def _take_turn(self) -> bool:
        try:
            taken = self._catalog.take_turn(self._base, self._owner, TURN_S)
        except DiskFull:
            taken = True
        if taken:
            self._turn_until = time.monotonic() + TURN_S
        return taken

    def _fill(self, at_once: int) -> None:
        """Apply all that is missing, in the collection there is or in a new one."""
        said = self._said("Eventually")
        if said is not None and self._state is not None and said.name == self._state.name:
            if said.point[0] > self._state.point[0]:  # others were here
                self._state = said
        else:
            self._look()
        if self._state is not None and not self._catalog.holds(self._state.point):
            self._state = None  # look for certain: another process may just have begun anew
            self._look()
        state = self._state
        if state is None or not self._catalog.holds(state.point):
            # Milvus lost it, or has it of a history that is not the catalogue's: one put back, say
            state = self._begin()
        while changes := self._catalog.changes(state.point[0], limit=at_once, model=self.model, dim=self.dim):
            state = self._state = self._apply(state, changes)
            follow_up(self._catalog, changes, self.model)
        if self.kind == "ivf":  # by which it is known when to measure again
            self._how_many(state, "")

    def _begin(self) -> _State:
        """A new, empty collection, which all go over to."""
        if not self._client.has_collection(POINTS, timeout=ANSWER_WITHIN_S):
            self._create_points()
        state = _State(f"{self._base}_{secrets.token_hex(4)}", (0, ""), 0)
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, max_length=48, is_primary=True)
        schema.add_field("recording", DataType.INT64)
        schema.add_field("seq", DataType.INT64)
        schema.add_field("collection", DataType.VARCHAR, max_length=128)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.dim)
        if self.kind == "ivf":
            self._create(state.name, schema, "IP", index_type="IVF_FLAT", params={"nlist": self.lists})
        else:
            self._create(state.name, schema, "IP")
        fault("milvus.created")
        self._note(state.name, state)
        self._note(self._base, state)
        fault("milvus.named")
        self._counts.clear()
        return state

    def _create_points(self) -> None:
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("name", DataType.VARCHAR, max_length=255, is_primary=True)
        schema.add_field("library", DataType.VARCHAR, max_length=64)
        schema.add_field("collection", DataType.VARCHAR, max_length=255)
        schema.add_field("seq", DataType.INT64)
        schema.add_field("token", DataType.VARCHAR, max_length=64)
        schema.add_field("written", DataType.INT64)
        schema.add_field("noted_at", DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)  # there is no collection without one
        try:
            self._create(POINTS, schema, "L2")
        except MilvusException:  # unless another process was quicker
            if not self._client.has_collection(POINTS, timeout=ANSWER_WITHIN_S):
                raise

    def _create(
        self, name: str, schema: object, metric: str, *, index_type: str = "FLAT", **more: object
    ) -> None:
        index = MilvusClient.prepare_index_params()
        index.add_index("vector", index_type=index_type, metric_type=metric, **more)
        self._client.create_collection(
            name, schema=schema, index_params=index, consistency_level="Strong", timeout=WRITE_WITHIN_S
        )

    def _apply(self, state: _State, changes: Changes) -> _State:
        check_vectors(changes.vectors, self.dim)
        numbers = (changes.owners << ORDINAL_BITS) | changes.ordinals
        written = state.written
        for some in _parts(range(len(numbers)), ROWS_AT_ONCE):
            self._keep_turn()
            rows = [
                {
                    "id": f"{numbers[row]}:{changes.seen}",
                    "recording": int(changes.owners[row]),
                    "seq": changes.seen,
                    "collection": changes.collections[row],
                    "vector": changes.vectors[row],
                }
                for row in some
            ]
            self._client.upsert(state.name, rows, timeout=WRITE_WITHIN_S)
            written = self._last_write(state.name)
        fault("milvus.added")
        for keys in _parts(sorted(changes.recordings), ROWS_AT_ONCE):
            self._keep_turn()
            older = f"recording in {json.dumps(keys)} and seq < {changes.seen}"
            # Strong: it is Milvus that looks for them, and what it does not see it leaves
            removed = self._client.delete(
                state.name, filter=older, consistency_level="Strong", timeout=WRITE_WITHIN_S
            )
            if not isinstance(removed, dict) or removed.get("delete_count", 1):
                # 2.3 does not say when it removed them: before what is written next
                self._note(state.name, state)
                written = self._last_write(POINTS)
        fault("milvus.removed")
        state = _State(state.name, (changes.seq, changes.token), written)
        self._note(state.name, state)
        fault("milvus.noted")
        return state

    def _note(self, name: str, state: _State, says: str = "") -> None:
        row = {
            "name": name,
            "library": self._library,
            "collection": says or state.name,
            "seq": state.point[0],
            "token": state.point[1],
            "written": state.written,
            "noted_at": int(time.time()),
            "vector": [0.0, 0.0],
        }
        self._client.upsert(POINTS, [row], timeout=WRITE_WITHIN_S)

    def _last_write(self, name: str) -> int:
        """When this process last wrote to a collection, by Milvus's clock; 0 if the client does not say."""
        try:
            address = self._client._get_connection().server_address
            return int(get_collection_ts(name, address, self._client._config.db_name) or 0)
        except AttributeError:  # it is none of the client's public interface
            return 0

    def _keep_turn(self) -> None:
        if time.monotonic() > self._turn_until - TURN_S / 2:
            self._take_turn()

    # --- searching

    def search(
        self,
        queries: Embeddings,
        limits: Sequence[int],
        *,
        among: Among | None = None,
        segments: int = 5,
        group_by: Grouping = "recording",
    ) -> list[list[Match]]:
        """As `VectorIndex.search`, but for `Match.among`: rows in Milvus, of which a few may be of recordings
        that were just changed or deleted. Raises IndexUnavailable."""
        check_vectors(queries, self.dim)
        where = _expressions(among)
        state = self._state
        if not len(queries) or not where:
            return [[] for _ in limits]
        with self._asking():
            if state is None:
                raise IndexUnavailable("The vector index is being opened; ask again in a moment.")
            search = _Search(
                self, state, {one: self._how_many(state, one) for one in where}, segments, group_by
            )
            depths = [min(DEEPEST, 4 * limit + 16) for limit in limits]
            found = search.nearest(queries, max(depths))
            firsts = [_cut(one, depth) for one, depth in zip(found, depths, strict=True)]
            search.read(number for first in firsts for _, number in first.scored)
            return [
                search.decide(query, limit, depth, first)
                for query, limit, depth, first in zip(queries, limits, depths, firsts, strict=True)
            ]

    def _how_many(self, state: _State, expression: str) -> int:
        if (state, expression) in self._counts:
            return self._counts[state, expression]
        (row,) = self._client.query(
            state.name,
            filter=expression,
            output_fields=["count(*)"],
            timeout=ANSWER_WITHIN_S,
            **state.fresh,
        )
        count = int(row["count(*)"])
        if not expression:
            self._count = count
        if len(self._counts) > 100:
            self._counts.clear()
        if len(expression) < 1000:
            self._counts[state, expression] = count
        return count

    # --- recall

    @property
    def recall(self) -> Recall | None:
        """What was measured last of this collection, by whichever process. It counts for none that there are
        now (count 0) once it is to be measured again."""
        state, (name, recall, measured_at) = self._state, self._measured
        if state is None or recall is None or state.name != name:
            return None
        return recall if time.time() - measured_at < RECALL_KEPT_S else replace(recall, count=0)

    def calibrate(self, floor: float, given_up: Wanted = lambda: False) -> None:
        """As `VectorIndex.calibrate`, for all processes: the figures are kept in Milvus, beside the point.

        Milvus has to seal the rows and to put them into lists first, which this awaits. Where it does not, or
        cannot tell, or another process is measuring, nothing changes, and it can be tried again. Raises
        GivenUp soon after that is so.
        """
        state, before = self._state, self._measured
        if self.kind != "ivf" or state is None or time.monotonic() < self._unsettled_until:
            return
        turn = _recall_of(self._base)
        if not self._catalog.take_turn(turn, self._owner, MEASURING_S):
            return
        try:
            self._said("Strong")
            if self._measured == before and self._settled(state, given_up):
                self._measure(state, floor, turn, given_up)
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError):
            _log.debug("recall cannot be measured: Milvus does not tell what is in lists")
        finally:
            self._catalog.end_turn(turn, self._owner)

    def _settled(self, state: _State, given_up: Wanted) -> bool:
        """Have what was written sealed; whether nearly all of it is in lists then."""
        self._unsettled_until = time.monotonic() + SETTLE_AGAIN_S
        patience = time.monotonic() + SETTLE_AT_MOST_S
        self._client.flush(state.name, timeout=WRITE_WITHIN_S)
        while time.monotonic() < patience:
            # by their ids, since each replica of the collection has them
            kept = {one.segment_id: one for one in self._client.list_persistent_segments(state.name)}
            listed = {one.segment_id for one in self._client.list_loaded_segments(state.name) if one.index_id}
            rows = {number: one.num_rows for number, one in kept.items() if one.state == SegmentState.Flushed}
            if sum(rows[number] for number in rows.keys() & listed) >= SETTLED * sum(rows.values()) > 0:
                self._unsettled_until = 0.0
                return True
            if given_up():
                raise GivenUp
            time.sleep(0.5)
        return False

    def _measure(self, state: _State, floor: float, turn: str, given_up: Wanted) -> None:
        chance = np.random.default_rng()
        search = _Search(self, state, {"": self._how_many(state, "")}, RECALL_AT, "recording")
        needed: list[NDArray[np.int64]] = []
        questions = questions_near(self._drawn(chance), chance)
        for start in range(0, len(questions), MEASURED_AT_ONCE):
            if given_up():
                raise GivenUp
            self._catalog.take_turn(turn, self._owner, MEASURING_S)
            needed += search.probes_needed(questions[start : start + MEASURED_AT_ONCE])
        probes, share, at_least = fewest_probes(needed, floor, lists=self.lists)
        filtered = min(self.lists, math.ceil(FINER * probes))
        recall = Recall(share, at_least, probes, self._how_many(state, ""), filtered)
        self._note(_recall_of(state.name), state, json.dumps(asdict(recall)))
        self._measured = (state.name, recall, time.time())

    def _drawn(self, chance: np.random.Generator) -> Embeddings:
        """Some vectors of the catalogue, each segment about as likely as any other."""
        keys = self._catalog.matching(EVERYTHING)
        some = chance.choice(keys, min(8 * QUESTIONS, len(keys)), replace=False)
        recordings = self._catalog.by_key(some.tolist()).values()
        numbers = [(one.key << ORDINAL_BITS) + np.arange(one.segments or 0) for one in recordings]
        drawn = chance.permutation(np.concatenate([np.empty(0, np.int64), *numbers]))[: 2 * QUESTIONS]
        return read_vectors(partial(self._catalog.vectors, model=self.model), drawn, self.dim)

    # --- tidying

    def forget_others(self, models: Set[str]) -> None:
        """As `Index.forget_others`; and what this library left for new collections, once nobody adds to it.
        What is searched after all answers IndexUnavailable once, and is opened anew."""
        if self._client is None:
            return
        with self._asking():
            prefixes = [f"{self._library}_{re.sub(r'[^A-Za-z0-9]', '_', model)}_" for model in models]
            notes = self._client.query(
                POINTS,
                filter=f'library == "{self._library}"',
                output_fields=["name", "collection", "noted_at"],
                consistency_level="Strong",
                timeout=ANSWER_WITHIN_S,
            )
            # a library that went over to the other kind leaves a pointer, too
            flat = self._base.removesuffix("_ivf")
            other = flat if self.kind == "ivf" else f"{flat}_ivf"
            used = {note["collection"] for note in notes if note["name"] not in (note["collection"], other)}
            noted_at = {note["name"]: int(note["noted_at"]) for note in notes}
            gone: list[str] = []
            for name in self._client.list_collections(timeout=ANSWER_WITHIN_S):
                if not name.startswith(f"{self._library}_"):
                    continue
                known = name.startswith(tuple(prefixes))
                # one without a point was left by a process that died there, or is about to have one
                idle = name in noted_at and time.time() - noted_at[name] > UNUSED_KEPT_S
                if not known or (name not in used and idle):
                    self._client.drop_collection(name, timeout=WRITE_WITHIN_S)
                    gone.append(name)
            gone += [note["name"] for note in notes if note["name"] == other and note["collection"] in gone]
            gone += [_recall_of(name) for name in gone]
            gone += [name for name in noted_at if not name.startswith(tuple(prefixes))]
            if gone:
                self._client.delete(POINTS, filter=f"name in {json.dumps(gone)}", timeout=WRITE_WITHIN_S)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Trouble of Milvus as IndexUnavailable, after which all is asked anew."""
        if time.monotonic() < self._resting_until:
            raise IndexUnavailable(self._trouble)
        try:
            yield
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
            code = getattr(error, "code", "no connection")
            code = code() if callable(code) else code
            self._trouble = (
                "The vector index cannot be asked: Milvus does not answer, or not as it should"
                f" ({getattr(code, 'name', code)}). Ask again later."
            )
            self._state = None
            self._counts.clear()
            self._resting_until = time.monotonic() + REST_S
            # not with its cause, which tells what was asked for
            raise IndexUnavailable(self._trouble) from None


class _Search:
    """One search for several questions: how candidates are proposed, read and decided.

    `where` are expressions, each with how many rows pass it.
    """

    def __init__(
        self,
        index: MilvusIndex,
        state: _State,
        where: Mapping[str, int],
        segments: int,
        group_by: Grouping,
    ) -> None:
        self._index = index
        self._state = state
        self._where = where
        self._size = sum(where.values())
        self._recall = index.recall
        self._segments = segments
        self._group_by = group_by
        self._vectors: dict[int, NDArray[np.float32] | None] = {}

    def nearest(
        self, queries: Embeddings, depth: int, *, without: Set[int] = frozenset()
    ) -> list[_Proposals]:
        found: list[list[tuple[float, int]]] = [[] for _ in queries]
        short = [True] * len(found)
        for expression, passing in self._where.items():
            lists = self._index.lists
            probes = lists if without else self._probes(expression, passing, depth)
            if without:
                others = f"recording not in {json.dumps(sorted(without))}"
                expression = f"{expression} and {others}" if expression else others
            answer = self._ask(queries, expression, depth, probes)
            if probes < lists:  # too few say nothing yet
                few = [place for place, hits in enumerate(answer) if len(hits) < depth]
                for place, hits in zip(few, self._ask(queries[few], expression, depth, lists), strict=True):
                    answer[place] = hits
            for place, hits in enumerate(answer):
                short[place] &= len(hits) < depth
                found[place] += hits
        return [
            # fewer than asked for are all there are; not so where one row was found in two places
            _cut(
                _Proposals(
                    sorted(scored, key=_by_score),
                    not scored or (is_short and (depth > self._size or bool(without))),
                ),
                depth,
            )
            for scored, is_short in zip(found, short, strict=True)
        ]

    def _probes(self, expression: str, passing: int, depth: int) -> int:
        """In how many lists to look for so many neighbours; as IvfStore does, but for what a filter hides, of
        which Milvus does not say in which lists it is."""
        index, recall = self._index, self._recall
        few = bool(expression) and passing <= index.exhaustive_up_to
        if recall is None or few or passing <= depth:
            return index.lists
        probes: float = recall.probes
        if passing < NEARLY_ALL * len(index):
            probes = max(probes, recall.filtered * len(index) / passing)
        return min(index.lists, math.ceil(max(1.0, depth / DEPTH) * probes))

    def _ask(
        self, queries: Embeddings, expression: str, depth: int, probes: int
    ) -> list[list[tuple[float, int]]]:
        """For each query the best rows of so many lists: scores and segments' numbers."""
        if not len(queries):
            return []
        if probes >= self._index.lists:
            probes = EVERY_LIST
        nprobe = {"params": {"nprobe": probes}} if self._index.kind == "ivf" else {}
        answer = self._index._client.search(
            self._state.name,
            data=list(queries),
            filter=expression,
            limit=depth,
            output_fields=["recording"],  # milvus-lite gives everything where nothing is asked for
            search_params={"metric_type": "IP", **nprobe},
            timeout=ANSWER_WITHIN_S,
            **self._state.fresh,
        )
        return [[(hit["distance"], int(hit["id"].partition(":")[0])) for hit in hits] for hits in answer]

    def probes_needed(self, queries: Embeddings) -> list[NDArray[np.int64]]:
        """For each query as `IvfStore.probes_needed`, to the next power of two."""
        lists, depth = self._index.lists, DEPTH
        while True:
            whole = self._ask(queries, "", depth, lists)
            best = [_firsts(hits) for hits in whole]
            short = any(len(own) < RECALL_AT for own in best) and max(map(len, whole)) == depth
            if not short or depth == DEEPEST:
                break
            depth = min(DEEPEST, 4 * depth)
        needed = [np.full(len(own), lists) for own in best]
        probes = 1
        while probes < lists and any((ranks == lists).any() for ranks in needed):
            for own, ranks, hits in zip(best, needed, self._ask(queries, "", depth, probes), strict=True):
                ranks[(ranks == lists) & np.isin(own, [number for _, number in hits])] = probes
            probes *= 2
        return needed

    def read(self, numbers: Iterable[int]) -> None:
        """Vectors from the catalogue, where it has them."""
        unread = np.array(sorted(set(numbers) - self._vectors.keys()), np.int64)
        read = partial(self._index._catalog.vectors, model=self._index.model)
        rows, there = read_rows(read, unread, self._index.dim)
        for number, row, is_there in zip(unread.tolist(), rows, there, strict=True):
            self._vectors[number] = row if is_there else None

    def decide(self, query: NDArray[np.float32], limit: int, depth: int, found: _Proposals) -> list[Match]:
        """Look deeper until nothing that was not seen can be among the `limit` best; where Milvus goes no
        deeper, among the recordings that were not found yet."""
        kept: dict[int, float] = {}
        without: set[int] = set()
        while True:
            floor = -np.inf if found.complete else found.scored[-1][0] + self._index._noise
            scored = {number: score for number, score in self._score(query, found) if score > floor} | kept
            count = len({place_of(number)[0] for number in scored} if self._by_recording else scored)
            if found.complete or count >= limit:
                break
            if depth == DEEPEST:
                new = {place_of(number)[0] for number in scored} - without
                if not (self._by_recording and new):
                    break  # more than DEEPEST segments are equal to within what float32 tells apart
                kept, without = scored, without | new
            depth = min(DEEPEST, 4 * depth)
            (found,) = self.nearest(query[None], depth, without=without)
            self.read(number for _, number in found.scored)
        if self._by_recording:
            return best_recordings(scored.items(), limit, self._size, self._segments)
        return best_segments(scored.items(), limit, self._size)

    @property
    def _by_recording(self) -> bool:
        return self._group_by == "recording"

    def _score(self, query: NDArray[np.float32], found: _Proposals) -> Iterable[tuple[int, float]]:
        read = {number: self._vectors[number] for _, number in found.scored}
        known = {number: vector for number, vector in read.items() if vector is not None}
        if not known:
            return ()
        return zip(known, exact_scores(query, np.stack(list(known.values()))), strict=True)


def _by_score(proposal: tuple[float, int]) -> float:
    return -proposal[0]


def _firsts(scored: Iterable[tuple[float, int]]) -> list[int]:
    """The best segments of the ten best recordings."""
    firsts: dict[int, int] = {}
    for _, number in sorted(scored, key=_by_score):
        firsts.setdefault(place_of(number)[0], number)
    return list(firsts.values())[:RECALL_AT]


def _cut(found: _Proposals, depth: int) -> _Proposals:
    if len(found.scored) < depth or (found.complete and len(found.scored) == depth):
        return found
    return _Proposals(found.scored[:depth], found.complete and len(found.scored) <= depth)


def _recall_of(name: str) -> str:
    """What the row is called that has the recall of a collection, as JSON, in the place of a name."""
    return f"{name}_recall"


def _expressions(among: Among | None) -> list[str]:
    """What Milvus is asked for, in as many parts as need be; none where nothing can be meant."""
    if among is None:
        return [""]
    if isinstance(among, Set):
        names = sorted(name for name in among if _COLLECTION_NAME.fullmatch(name))
        return [f"collection in {json.dumps(part)}" for part in _parts(names, KEYS_AT_ONCE)]
    return [f"recording in {json.dumps(part)}" for part in _parts(among.tolist(), KEYS_AT_ONCE)]


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))
