"""Which recordings are meant: what a filter says, and how a database is asked for it.

Members of the metadata are compared as JSON has them. A value has a kind (null, truth, number, text), and
what is of two kinds is neither equal nor more nor less: 1 is 1.0, but neither true nor "1". Texts compare
by code points, so that times of one ISO 8601 form compare as times do; integers of more than 64 bits as the
nearest double. Lists and objects have no value to compare: they are there (`exists`), and unequal to
everything (`ne`).
"""

import json
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from clasp_core.types import Seconds

Scalar: TypeAlias = str | int | float | bool | None
Order = Literal["gt", "gte", "lt", "lte"]
Relation: TypeAlias = Literal["eq", "ne", "in", "exists"] | Order

SQL_FUNCTION = "clasp_holds"
"""What `holds` is called in SQLite."""

_ORDERS: Mapping[str, Callable[[Any, Any], Any]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """That a top-level member of the metadata stands in a relation to a value, or to one of several (`in`).

    `ne` is true of what lacks the member, too; nothing else is, but `exists` false. Made by `of`.
    """

    name: str
    relation: Relation
    value: str
    """JSON: as values of Python, 1 and true would be the same condition."""

    @classmethod
    def of(cls, name: str, relation: Relation, value: Scalar | list[Scalar]) -> "Condition":
        """ValueError for more or less than a null, a truth, a list, or NaN."""
        if relation in _ORDERS and (isinstance(value, bool) or not isinstance(value, str | int | float)):
            raise ValueError(f"{relation} compares numbers and texts, not {value!r}")
        plain = [_plain(one) for one in value] if isinstance(value, list) else _plain(value)
        return cls(name, relation, json.dumps(plain, allow_nan=False))


class Bound(NamedTuple):
    """That a recording's time of arrival (UTC, without a zone), or its length in seconds, is more or less."""

    field: Literal["created_at", "duration_s"]
    relation: Order
    value: datetime | Seconds


@dataclass(frozen=True, slots=True)
class Filter:
    """Which recordings are meant: those of which everything given here is true; by default all.

    `within` holds the collections that the asker may see; `langs` are canonical tags, compared whole. A
    recording without a length (not embedded yet) is on neither side of any bound.
    """

    collection: str | None = None
    within: frozenset[str] | None = None
    ids: frozenset[str] | None = None
    langs: frozenset[str] | None = None
    bounds: tuple[Bound, ...] = ()
    metadata: tuple[Condition, ...] = ()

    def where(self, table: sa.Table, dialect: str) -> sa.ColumnElement[bool]:
        """The same in SQL, of a table with the columns of recordings."""
        said: list[sa.ColumnElement[bool]] = [sa.true()]
        if self.collection is not None:
            said.append(table.c.collection == self.collection)
        for allowed, column in (
            (self.within, table.c.collection),
            (self.ids, table.c.id),
            (self.langs, table.c.lang),
        ):
            if allowed is not None:
                said.append(column.in_(sorted(allowed)))
        said += [_ORDERS[bound.relation](table.c[bound.field], bound.value) for bound in self.bounds]
        if dialect == "postgresql":
            said += [_in_postgresql(condition, table) for condition in self.metadata]
        elif self.metadata:
            said.append(_in_sqlite(self.metadata, table))
        return sa.and_(*said)


EVERYTHING = Filter()


def holds(metadata: str, conditions: str) -> bool:
    """Whether an object, as JSON, meets all conditions, as `Filter.where` writes them.

    SQLite's own JSON will not do: it ends a text at U+0000, and reads doubles to 15 digits.
    """
    members = json.loads(metadata)
    return all(test(_kind_and_value(members.get(name, _ABSENT))) for name, test in _tests(conditions))


_ABSENT = object()
_Compared: TypeAlias = tuple[str, Any]


def _plain(value: Scalar) -> Scalar:
    """With integers that no database's integers hold as doubles."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        try:
            return float(value)
        except OverflowError:
            return sys.float_info.max if value > 0 else -sys.float_info.max
    return value


def _kind_and_value(value: object) -> _Compared:
    if isinstance(value, str):
        return "text", value
    if isinstance(value, bool):
        return "truth", value
    if isinstance(value, int | float):
        return "number", _plain(value)
    return ("absent" if value is _ABSENT else "null" if value is None else "composed"), None


@lru_cache(maxsize=256)
def _tests(conditions: str) -> list[tuple[str, Callable[[_Compared], bool]]]:
    return [(name, _test(relation, value)) for name, relation, value in json.loads(conditions)]


def _test(relation: Relation, value: Scalar | list[Scalar]) -> Callable[[_Compared], bool]:
    if relation == "exists":
        return lambda ours: (ours[0] != "absent") is value
    if relation == "in":
        assert isinstance(value, list)
        allowed = frozenset(map(_kind_and_value, value))
        return lambda ours: ours in allowed
    kind, bound = theirs = _kind_and_value(value)
    if relation == "eq":
        return lambda ours: ours == theirs
    if relation == "ne":
        return lambda ours: ours != theirs
    compare = _ORDERS[relation]
    return lambda ours: ours[0] == kind and compare(ours[1], bound)


def _in_sqlite(conditions: tuple[Condition, ...], table: sa.Table) -> sa.ColumnElement[bool]:
    """By our own function; SQLite's JSON, which is four times faster, first says which need it."""
    given = [[one.name, one.relation, json.loads(one.value)] for one in conditions]
    exact = getattr(sa.func, SQL_FUNCTION)(table.c.metadata, json.dumps(given), type_=sa.Boolean)
    possible = [
        quick
        for name, relation, value in given
        if (quick := _quick(name, relation, value, table)) is not None
    ]
    # not `and`: SQLite asks a subquery after the function
    return sa.case((sa.and_(*possible), exact), else_=sa.false()) if possible else exact


def _quick(name: str, relation: Relation, value: Scalar, table: sa.Table) -> sa.ColumnElement[bool] | None:
    """What is true wherever a condition is, and quickly asked: for texts, truths and small integers.

    Not by SQLAlchemy's `metadata[name]`: it builds a JSON path, in which SQLite finds no name that JSON had
    to escape ("نام" among them), and a comparison without types, in which "x" is 0.
    """
    if relation != "eq" or "\0" in name:
        return None
    members = sa.func.json_each(table.c.metadata).table_valued("key", "value", "type")
    if isinstance(value, bool):
        same = members.c.type == ("true" if value else "false")
    elif isinstance(value, str) and "\0" not in value:
        same = (members.c.type == "text") & (members.c.value == value)
    elif isinstance(value, int) and abs(value) < 2**31:
        same = members.c.type.in_(("integer", "real")) & (members.c.value == value)
    else:
        return None
    return sa.exists().where((members.c.key == name) & same)


def _in_postgresql(condition: Condition, table: sa.Table) -> sa.ColumnElement[bool]:
    """By jsonb, whose null is not SQL's, and texts not by the database's collation. Its numbers are decimals
    as they were written: beyond 2**53, those of an integer and of the same double may differ. No text and no
    name of a member there has a U+0000."""
    if "\0" in condition.name:
        value = json.loads(condition.value)
        return sa.literal(condition.relation == "ne" or (condition.relation == "exists" and not value))
    member = sa.func.jsonb_extract_path(sa.cast(table.c.metadata, JSONB), condition.name, type_=JSONB)
    value = json.loads(condition.value)
    if condition.relation == "exists":
        return member.is_not(None) if value else member.is_(None)
    if condition.relation == "in":
        return sa.or_(sa.false(), *(member == _jsonb(one) for one in value if "\0" not in str(one)))
    if condition.relation in ("eq", "ne") and "\0" in str(value):
        return sa.literal(condition.relation == "ne")
    if condition.relation == "eq":
        return member == _jsonb(value)
    if condition.relation == "ne":
        return member.is_distinct_from(_jsonb(value))
    ours: sa.ColumnElement[Any]
    kind, ours, theirs, relation = "number", member, _jsonb(value), condition.relation
    if isinstance(value, str):
        value, nul, _ = value.partition("\0")
        if nul:  # what is less than "a\0..." is at most "a"
            relation = "lte" if relation in ("lt", "lte") else "gt"
        text = member.op("#>>", return_type=sa.Text)(sa.literal_column("'{}'"))
        kind, ours, theirs = "string", text.collate("C"), sa.literal(value, sa.Text)
    ordered: sa.ColumnElement[bool] = _ORDERS[relation](ours, theirs)
    return (sa.func.jsonb_typeof(member) == kind) & ordered


def _jsonb(value: Scalar) -> sa.ColumnElement[Any]:
    return sa.cast(sa.literal(json.dumps(value), sa.Text), JSONB)
