"""Filters: exactly the recordings that plain Python would choose, whatever is in their metadata."""

import itertools
import operator
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clasp_core.catalog import Catalog, Recording
from clasp_core.filters import Bound, Condition, Filter
from tests.core.doubles import STORED_MODEL, complete, random_vectors, register
from tests.postgres import catalogue_url

MEMBERS: list[tuple[str, object]] = [
    ("text", "x"),
    ("text", "1"),
    ("text", "true"),
    ("text", ""),
    ("number", 1),
    ("number", 1.5),
    ("number", 0),
    ("number", -0.1),
    ("number", 2**53 + 1),
    ("number", 2**70),
    ("truth", True),
    ("truth", False),
    ("none", None),
    ("list", ["x"]),
    ("object", {"x": "x"}),
    ('quo"te', "x"),
    ("quo'te", "x"),
    ("dots.and[0]", "x"),
    ("dots", {"and": ["x"]}),
    ("back\\slash", "x"),
    ("new\nline", "x"),
    ("نام", "سعدی"),
    ("emoji😀", "😀"),
    ("", "x"),
    ("$", "x"),
    ("%", "x"),
    ("'; DROP TABLE recordings; --", "x"),
    ('") OR 1=1 --', "x"),
]
VALUES = [
    "x",
    "1",
    "x\0",
    "\0x",
    "true",
    "",
    "سعدی",
    "😀",
    "%",
    1,
    1.0,
    1.5,
    0,
    -0.1,
    2**53,
    2**53 + 1,
    2**70,
    True,
    False,
]


RELATIONS = ("eq", "ne", "in", "gt", "gte", "lt", "lte", "exists")
ORDERS = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    opened = Catalog(f"sqlite:///{tmp_path_factory.mktemp('filters') / 'catalog.sqlite3'}")
    opened.adopt(STORED_MODEL)
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def each_catalog(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Catalog]:
    with catalogue_url(request.param, tmp_path_factory.mktemp("each")) as url:
        opened = Catalog(url)
        opened.adopt(STORED_MODEL)
        yield opened
        opened.close()


def kind(value: object) -> str | None:
    """Where Python calls 1 and true equal, and JSON does not."""
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else None if value is not None else "null"


def same(ours: object, theirs: object) -> bool:
    ours, theirs = near(ours), near(theirs)
    return kind(ours) is not None and kind(ours) == kind(theirs) and ours == theirs


def near(value: object) -> object:
    """A number as databases have it: an integer of 64 bits, or a double."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and not -(2**63) <= value < 2**63 else value  # type: ignore[operator,arg-type]


def numbered(listed: list[Recording]) -> list[int]:
    return sorted(int(recording.id.rpartition(".")[2]) for recording in listed)


def passes(metadata: dict[str, Any], name: str, relation: str, value: Any) -> bool:
    """The oracle: what a filter's condition means, said once more."""
    there, ours = name in metadata, metadata.get(name)
    if relation == "exists":
        return there is value
    if relation == "ne":
        return not (there and same(ours, value))
    if relation == "in":
        return there and any(same(ours, one) for one in value)
    if relation == "eq":
        return there and same(ours, value)
    return there and kind(ours) == kind(value) and ORDERS[relation](near(ours), near(value))


names = st.sampled_from(["a", "نام", "a.b", 'q"u', "", "nul\0"])
odd_texts = [
    "",
    "a",
    "A",
    "ab",
    "ä",
    "z",
    "1",
    "true",
    "null",
    "سعدی",
    "سعدى",
    "😀",
    "\uffff",
    "a\0b",
    "a\0c",
]
texts = st.sampled_from(odd_texts) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
edges = [
    sign * (2**power + step) for sign in (1, -1) for power in (31, 53, 63, 64, 70) for step in (-1, 0, 1)
]
integers = st.integers(-2, 2) | st.sampled_from(edges)
odd_floats = [0.0, -0.0, 1.0, 0.1, 0.1 + 0.2, 0.3, 1e22, 1e23, 2.0**53, 5e-324, 1.7976931348623157e308]
floats = st.sampled_from(odd_floats) | st.floats(allow_nan=False, allow_infinity=False)
numbers = integers | floats
scalars = st.none() | st.booleans() | texts | numbers
nested = st.lists(scalars, max_size=2) | st.dictionaries(names, scalars, max_size=2)
objects = st.dictionaries(names, scalars | nested, max_size=3)


@st.composite
def conditions(draw: st.DrawFn) -> tuple[str, str, Any]:
    relation = draw(st.sampled_from(RELATIONS))
    if relation == "exists":
        value: Any = draw(st.booleans())
    elif relation == "in":
        value = draw(st.lists(scalars, min_size=1, max_size=4))
    else:
        value = draw(texts | numbers if relation in ORDERS else scalars)
    return draw(names), relation, value


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(objects, min_size=1, max_size=8), st.lists(conditions(), min_size=1, max_size=3))
@example([{"a": "a\0b"}, {"a": "a"}], [("a", "eq", "a")])
@example([{"a": 0.30000000000000004}, {"a": 0.3}], [("a", "gt", 0.3)])
def test_a_filter_chooses_what_plain_python_chooses(
    catalog: Catalog, contents: list[dict[str, Any]], wanted: list[tuple[str, str, Any]]
) -> None:
    """A filter is often a permission. A text cut short, a double read to 15 digits, a true that is 1: each
    shows somebody what is not theirs, or hides what is."""
    collection = f"{next(COLLECTIONS)}"
    for number, metadata in enumerate(contents):
        register(catalog, f"{collection}.{number}", collection=collection, metadata=metadata)
    meant = Filter(collection=collection, metadata=tuple(Condition.of(*one) for one in wanted))  # type: ignore[arg-type]
    expected = [
        number for number, metadata in enumerate(contents) if all(passes(metadata, *one) for one in wanted)
    ]
    listed = catalog.page(limit=100, wanted=meant)
    assert numbered(listed) == expected
    assert catalog.count(meant, status=None) == len(expected)


COLLECTIONS = itertools.count()


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_with_every_kind(each_catalog: Catalog, relation: str) -> None:
    """Names in any script, with any quotes and dots, are names and not paths or SQL; kinds are never
    mixed. PostgreSQL holds no U+0000, but can be asked for one."""
    catalog = each_catalog
    collection = f"kinds-{relation}"
    for number, (name, value) in enumerate(MEMBERS):
        register(
            catalog,
            f"{collection}.{number}",
            collection=collection,
            metadata={name: value, "same": "everywhere"},
        )
    everywhere = Condition.of("same", "eq", "everywhere")
    tried: list[Any] = [True, False] if relation == "exists" else [*VALUES, None]
    for name in {name for name, _ in MEMBERS} | {"absent", "dots.and", '$."text"', "dots.and[0", "text\0"}:
        for value in tried if catalog.database.dialect == "sqlite" else tried[::3]:
            if value == 2**70 and catalog.database.dialect == "postgresql":
                continue  # a decimal there, as it was written, and not the nearest double
            if relation in ORDERS and kind(value) not in ("text", "number"):
                with pytest.raises(ValueError, match="compares"):
                    Condition.of(name, relation, value)  # type: ignore[arg-type]
                continue
            given_value = [value] if relation == "in" else value
            wanted = Condition.of(name, relation, given_value)  # type: ignore[arg-type]
            meant = Filter(collection=collection, metadata=(wanted, everywhere))
            listed = catalog.page(limit=100, wanted=meant)
            assert numbered(listed) == [
                number
                for number, (its, own) in enumerate(MEMBERS)
                if passes({its: own}, name, relation, given_value)
            ], (name, relation, value)


def test_times_and_lengths_and_names(tmp_path: Path) -> None:
    """The record's own fields narrow as well; what has no length yet is on no side of any."""
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    catalog.adopt(STORED_MODEL)
    recordings = [register(catalog, f"{number}", lang=["fa", "en", None][number % 3]) for number in range(6)]
    for length, recording in enumerate(recordings[:4], 1):
        complete(catalog, recording, random_vectors(length, length))

    def found(**wanted: Any) -> list[str]:
        listed = catalog.page(limit=100, wanted=Filter(**wanted))
        assert catalog.count(Filter(**wanted), status=None) == len(listed)
        return sorted(recording.id for recording in listed)

    assert found(ids=frozenset({"1", "3", "9"})) == ["1", "3"]
    assert found(langs=frozenset({"fa", "en"})) == ["0", "1", "3", "4"]
    assert found(bounds=(Bound("duration_s", "gte", 2.0),)) == ["1", "2", "3"]
    assert found(bounds=(Bound("duration_s", "gt", 2.0), Bound("duration_s", "lte", 3.0))) == ["2"]
    assert found(bounds=(Bound("duration_s", "lt", 100.0),)) == ["0", "1", "2", "3"]
    third = recordings[3].created_at
    assert found(bounds=(Bound("created_at", "lt", third),)) == ["0", "1", "2"]
    assert found(bounds=(Bound("created_at", "gte", third),)) == ["3", "4", "5"]
    future = datetime.now(UTC).replace(tzinfo=None) + timedelta(days=1)
    assert found(bounds=(Bound("created_at", "gt", future),)) == []
    catalog.close()
