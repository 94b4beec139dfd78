"""What changes records, and what is asked once: patches, preconditions, deletion by filter, idempotent
uploads, filters and hits by segment. On a stand-in for a model, since none of it depends on what one
understands."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.app.test_errors import check_problem
from tests.audio_files import encode, speech
from tests.service import RunningService, clasp, eventually, is_alive, sql


def recording(seed: int, seconds: float = 1.0) -> bytes:
    """A second of babble unlike any other seed's."""
    return encode(speech(seconds, seed=seed), 16_000)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("changes")
    with RunningService(folder, program="tests.stand_in") as running:
        yield running.start()
        assert running.stop() == 0
        assert "unexpected error" not in running.log(), "something that a test asked met a bug"


def patch(service: RunningService, recording_id: str, change: Any, **headers: str) -> httpx.Response:
    kind = {"Content-Type": "application/merge-patch+json"}
    content = change if isinstance(change, bytes) else json.dumps(change)
    return service.client.patch(f"/audio/{recording_id}", content=content, headers=kind | headers)


def etag(service: RunningService, recording_id: str) -> str:
    return service.client.get(f"/audio/{recording_id}").raise_for_status().headers["etag"]


def fill(
    service: RunningService, collection: str, metadata: list[dict[str, Any]], first: int = 0
) -> list[str]:
    """Ids of ready recordings with that metadata, of seeds from the `first` on."""
    ids = [f"{collection}-{number:02}" for number in range(len(metadata))]
    for number, about in enumerate(metadata):
        form = {"collection": collection, "id": ids[number], "metadata": json.dumps(about)}
        service.upload(recording(first + number), **form).raise_for_status()
    for recording_id in ids:
        assert service.settled(recording_id)["status"] == "ready"
    return ids


def hits(service: RunningService, collection: str, **body: Any) -> list[str]:
    question = {"q": "bees", "collection": collection, "limit": 100} | body
    answer = service.client.post("/search", json=question)
    assert answer.status_code == 200, answer.text
    return sorted(hit["id"] for hit in answer.json()["hits"])


# --- ETag


def test_an_etag_changes_with_the_record_and_only_then(service: RunningService, collection: str) -> None:
    """Clients cache and lock by it: one that stays where something changed loses somebody's edit, one that
    changes for nothing refuses everybody's."""
    service.upload(recording(1), collection=collection, id=collection).raise_for_status()
    service.settled(collection)
    seen = [etag(service, collection)]
    assert seen[0].startswith('"')
    assert seen[0] == etag(service, collection)
    for change in ({"metadata": {"a": 1}}, {"lang": "fa"}, {"metadata": None, "lang": None}):
        changed = patch(service, collection, change)
        assert changed.status_code == 200, changed.text
        assert changed.headers["etag"] == etag(service, collection)
        seen.append(changed.headers["etag"])
    assert seen[3] == seen[0], "it is what it was"
    assert len(set(seen[:3])) == 3


def test_what_is_known_is_not_sent_again(service: RunningService, collection: str) -> None:
    """A client that polls for a change is told in a few bytes that there is none."""
    service.ready(recording(1), collection=collection, id=collection)
    known = etag(service, collection)
    for header in (known, f'"other", {known}', f"W/{known}", "*"):
        answer = service.client.get(f"/audio/{collection}", headers={"If-None-Match": header})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", known)
    for header in ('"other"', known.strip('"'), ""):
        answer = service.client.get(f"/audio/{collection}", headers={"If-None-Match": header})
        assert answer.status_code == 200
    patch(service, collection, {"lang": "fa"}).raise_for_status()
    changed = service.client.get(f"/audio/{collection}", headers={"If-None-Match": known})
    assert (changed.status_code, changed.json()["lang"]) == (200, "fa")


def test_a_change_of_what_is_not_there_any_more_is_refused(service: RunningService, collection: str) -> None:
    """The second of two editors, or a deletion decided on what somebody has corrected since."""
    service.ready(recording(1), collection=collection, id=collection)
    old = etag(service, collection)
    new = patch(service, collection, {"metadata": {"n": 1}}, **{"If-Match": old}).headers["etag"]
    for stale in (old, f"W/{new}", new.strip('"'), ""):
        headers = {"If-Match": stale}
        check_problem(
            patch(service, collection, {"metadata": {"n": 2}}, **headers), 412, "precondition_failed"
        )
        refused = service.client.delete(f"/audio/{collection}", headers=headers)
        check_problem(refused, 412, "precondition_failed")
    assert etag(service, collection) == new
    patch(service, collection, {"metadata": {"n": 2}}, **{"If-Match": "*"}).raise_for_status()
    current = {"If-Match": f'"other", {etag(service, collection)}'}
    assert service.client.delete(f"/audio/{collection}", headers=current).status_code == 204
    gone = service.client.delete(f"/audio/{collection}", headers={"If-Match": "*"})
    check_problem(gone, 404, "recording_not_found")


def test_of_many_editors_at_once_each_change_counts(service: RunningService, collection: str) -> None:
    """Between the look at the ETag and the change nobody may come: a counter that many count up by If-Match
    loses nothing."""
    service.ready(recording(1), collection=collection, id=collection, metadata='{"n": 0}')

    def count_up(_: int) -> None:
        while True:
            record = service.client.get(f"/audio/{collection}")
            change = {"metadata": {"n": record.json()["metadata"]["n"] + 1}}
            changed = patch(service, collection, change, **{"If-Match": record.headers["etag"]})
            if changed.status_code == 200:
                return
            assert changed.status_code == 412

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(count_up, range(30)))
    assert service.client.get(f"/audio/{collection}").json()["metadata"] == {"n": 30}


# --- PATCH


@pytest.mark.parametrize(
    ("target", "change", "result"),
    [
        # RFC 7396, appendix A, as far as an object is patched by an object
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ({"a": 1}, {}, {"a": 1}),
        ({"a": 1}, None, {}),
        ({"نام": "سعدی"}, {"شهر": "شیراز"}, {"نام": "سعدی", "شهر": "شیراز"}),
    ],
)
def test_metadata_is_merged_as_the_standard_says(
    service: RunningService, patched: str, target: Any, change: Any, result: Any
) -> None:
    """Clients use libraries for merge patches, whose results must be ours."""
    patch(service, patched, {"metadata": None}).raise_for_status()
    patch(service, patched, {"metadata": target}).raise_for_status()
    with_null = {name: value for name, value in result.items() if value is not None}
    answer = patch(service, patched, {"metadata": change})
    assert (
        answer.json()["metadata"] == with_null == service.client.get(f"/audio/{patched}").json()["metadata"]
    )


@pytest.fixture(scope="module")
def patched(service: RunningService) -> str:
    """A recording to change."""
    return service.ready(recording(1), collection="patched", id="patched")["id"]


def test_a_patched_recording_stays_ready_and_is_found_by_its_new_metadata(
    service: RunningService, collection: str
) -> None:
    """To correct a title must not cost an hour of embedding, nor hide the recording meanwhile."""
    (recording_id,) = fill(service, collection, [{"show": "news"}])
    before = service.client.get(f"/audio/{recording_id}").json()
    changed = patch(service, recording_id, {"lang": "FA-ir", "metadata": {"show": "weather", "n": 1}})
    after = before | {"lang": "fa-IR", "metadata": {"show": "weather", "n": 1}}
    assert changed.json() == after
    assert hits(service, collection, filter={"metadata": {"show": "weather"}}) == [recording_id]
    assert hits(service, collection, filter={"lang": "fa-IR"}) == [recording_id]
    assert hits(service, collection, filter={"metadata": {"show": "news"}}) == []
    shown = service.found("bees", collection=collection)[0]
    assert (shown["metadata"], shown["lang"]) == (after["metadata"], "fa-IR")
    assert patch(service, recording_id, {"lang": None}).json()["lang"] is None
    plain = service.client.patch(f"/v1/audio/{recording_id}", json={"metadata": {"n": None}})
    assert plain.json()["metadata"] == {"show": "weather"}


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"id": "other"}, 422, "invalid_input"),
        ({"status": "ready"}, 422, "invalid_input"),
        ({"metadata": {}, "collection": "other"}, 422, "invalid_input"),
        ({"metadata": [1]}, 422, "invalid_input"),
        ({"metadata": "x"}, 422, "invalid_input"),
        ({"lang": 1}, 422, "invalid_input"),
        ({"lang": "fa_IR"}, 422, "invalid_language"),
        ({"lang": ""}, 422, "invalid_language"),
        ([], 422, "invalid_input"),
        (None, 422, "invalid_input"),
        ({"metadata": {"long": "x" * 33_000}}, 422, "invalid_field"),
        (b'{"metadata": {"a":' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}}", 422, "invalid_field"),
        (b'{"metadata": {"a":' + b'{"a":' * 900 + b"null" + b"}" * 900 + b"}}", 422, "invalid_field"),
        (b'{"metadata": {"a": "\\ud800"}}', 400, "malformed_request"),
        (b'{"metadata": {"a": NaN}}', 400, "malformed_request"),
        (b'{"metadata": {"a": 1e999}}', None, None),
        (b"{", 400, "malformed_request"),
        (b"", 400, "malformed_request"),
        (b"[" * 100_000, 400, "malformed_request"),
        (b'{"metadata": ' + b" " * (5 << 20) + b"{}}", 413, "upload_too_large"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_no_other_change_is_made(
    service: RunningService, patched: str, change: Any, status: int | None, code: str | None
) -> None:
    """A patch that is half understood is worse than none: what cannot be changed, or stored, is refused
    whole."""
    before = etag(service, patched)
    answer = patch(service, patched, change)
    if status is None:
        assert 400 <= answer.status_code < 500
    else:
        assert code is not None
        check_problem(answer, status, code)
    assert etag(service, patched) == before


def test_the_result_is_bounded_and_not_the_patch_alone(service: RunningService, collection: str) -> None:
    """Else metadata of any size is made by many small patches."""
    service.ready(recording(1), collection=collection, id=collection)
    patch(service, collection, {"metadata": {"a": "x" * 20_000}}).raise_for_status()
    check_problem(patch(service, collection, {"metadata": {"b": "x" * 20_000}}), 422, "invalid_field")
    patch(service, collection, {"metadata": {"a": None, "b": "x" * 20_000}}).raise_for_status()


def test_a_patch_says_that_it_is_one(service: RunningService, patched: str) -> None:
    """A form or another kind of patch (RFC 6902, say) means something else."""
    for kind in ("application/json-patch+json", "text/plain", "application/x-www-form-urlencoded", ""):
        answer = service.client.patch(f"/audio/{patched}", content=b"{}", headers={"Content-Type": kind})
        check_problem(answer, 415, "unsupported_media_type")
    kind = "Application/JSON; charset=utf-8"
    answer = service.client.patch(f"/audio/{patched}", content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == 200
    check_problem(patch(service, "nobody", {}), 404, "recording_not_found")


# --- filters


def test_filters_have_operators(service: RunningService, collection: str) -> None:
    """In searches and in lists the same; the core's tests have every kind of value."""
    about: list[dict[str, Any]] = [
        {"n": 1, "date": "2026-01-31", "show": "news"},
        {"n": 2, "date": "2026-02-01", "show": "news"},
        {"n": 3.5, "date": "2026-03-01", "show": None},
        {"n": "2", "guest": "سعدی"},
        {"n": True},
    ]
    ids = fill(service, collection, about)
    for metadata, expected in (
        ({"show": "news"}, [0, 1]),
        ({"n": {"gte": 2}}, [1, 2]),
        ({"n": {"gt": 1, "lt": 3.5}, "show": "news"}, [1]),
        ({"n": {"in": [1, "2", True]}}, [0, 3, 4]),
        ({"n": {"gte": ""}}, [3]),
        ({"date": {"gte": "2026-02-01", "lt": "2026-03"}}, [1]),
        ({"show": {"exists": True}}, [0, 1, 2]),
        ({"show": {"eq": None}}, [2]),
        ({"show": {"ne": "news"}}, [2, 3, 4]),
        ({"guest": {"gt": "رودکی"}}, [3]),
        ({"n": {"eq": 1}}, [0]),
    ):
        expected_ids = [ids[number] for number in expected]
        assert hits(service, collection, filter={"metadata": metadata}) == expected_ids, metadata
        listed = service.listed(
            collection=collection, filter=json.dumps({"metadata": metadata}, ensure_ascii=False), limit=2
        )
        assert [item["id"] for item in listed] == expected_ids[::-1], metadata


def test_filters_narrow_by_the_record_itself(service: RunningService, collection: str) -> None:
    """What is not in the metadata, clients would else have to copy there."""
    ids = fill(service, collection, [{}] * 4)
    for recording_id, lang in zip(ids, ("fa", "en", "de", None), strict=True):
        patch(service, recording_id, {"lang": lang}).raise_for_status()
    created = [service.client.get(f"/audio/{recording_id}").json()["created_at"] for recording_id in ids]
    for wanted, expected in (
        ({"lang": "FA"}, [0]),
        ({"lang": {"in": ["fa", "DE"]}}, [0, 2]),
        ({"id": {"in": [ids[3], ids[1], "nobody"]}}, [1, 3]),
        ({"id": ids[2], "lang": "de"}, [2]),
        ({"created_at": {"gte": created[1], "lt": created[3]}}, [1, 2]),
        ({"created_at": {"gt": "2999-01-01T00:00:00+03:30"}}, []),
        ({"duration_s": {"gte": 0.9, "lt": 1.1}}, [0, 1, 2, 3]),
        ({"duration_s": {"gt": 1.1}}, []),
    ):
        assert hits(service, collection, filter=wanted) == [ids[number] for number in expected], wanted


def test_one_batch_keeps_its_filters_apart(service: RunningService, collection: str) -> None:
    """1 and true are the same to Python, and questions of a batch that filter alike are searched together:
    one of them once got the other's recordings."""
    ids = fill(service, collection, [{"n": 1}, {"n": True}])
    question = {"q": "bees", "collection": collection}
    queries = [question | {"filter": {"metadata": {"n": value}}} for value in (1, True, 1.0)]
    for _ in range(5):
        results = service.client.post("/search", json={"queries": queries}).json()["results"]
        assert [[hit["id"] for hit in result["hits"]] for result in results] == [[ids[0]], [ids[1]], [ids[0]]]


@pytest.mark.parametrize(
    "wanted",
    [
        {"metadata": {"n": {}}},
        {"metadata": {"n": {"between": [1, 2]}}},
        {"metadata": {"n": {"gt": True}}},
        {"metadata": {"n": {"gt": None}}},
        {"metadata": {"n": {"in": []}}},
        {"metadata": {"n": {"in": list(range(1001))}}},
        {"metadata": {"n": {"eq": {"a": 1}}}},
        {"metadata": {"n": {"exists": 1}}},
        {"metadata": {"n": {"in": [[1]]}}},
        {"lang": {"in": []}},
        {"lang": {}},
        {"id": {"eq": "x"}},
        {"created_at": {"gte": "2026-01-01"}},
        {"created_at": {"gte": 0}},
        {"created_at": {"gte": "0001-01-01T00:00:00+14:00"}},
        {"created_at": {}},
        {"created_at": "2026-01-01T00:00:00Z"},
        {"duration_s": {"eq": 1}},
        {"duration_s": {"gt": "long"}},
        {"colour": "red"},
    ],
    ids=lambda wanted: json.dumps(wanted)[:40],
)
def test_a_filter_of_another_form_is_refused(service: RunningService, wanted: Any) -> None:
    """In every call that takes one: what is silently ignored shows, or deletes, everything."""
    for answer in (
        service.client.post("/search", json={"q": "a", "filter": wanted}),
        service.client.post("/audio/delete", json={"filter": wanted}),
        service.client.get("/audio", params={"filter": json.dumps(wanted)}),
    ):
        pointers = [error["pointer"] for error in check_problem(answer, 422, "invalid_input")["errors"]]
        assert any("/filter/" in pointer for pointer in pointers)


@pytest.mark.parametrize("text", ["{", "x", "[]", "1", '"a"', "null", '{"metadata": {"a": NaN}}'])
def test_a_list_s_filter_is_an_object_of_json(service: RunningService, text: str) -> None:
    """A filter that is cut off on its way must not become no filter."""
    answer = service.client.get("/audio", params={"filter": text})
    (error,) = check_problem(answer, 422, "invalid_input")["errors"]
    assert error["pointer"] == "/query/filter"


def test_numbers_of_any_size_are_compared(service: RunningService, collection: str) -> None:
    """JSON bounds no number; one that no machine word holds once ended a search with an error of ours."""
    (recording_id,) = fill(service, collection, [{"n": 2**64}])
    for wanted in (2**64, {"gte": 2**63}, {"lt": 10**400}, {"gt": -(10**400)}, {"in": [0, 2**64]}):
        assert hits(service, collection, filter={"metadata": {"n": wanted}}) == [recording_id], wanted
    assert hits(service, collection, filter={"metadata": {"n": {"gt": 10**400}}}) == []


def test_filtered_pages_stand_still_while_records_change(service: RunningService, collection: str) -> None:
    """Who pages through "to do" and marks each record "done" on the way must come by every one, once."""
    ids = fill(service, collection, [{"state": "to do"} for _ in range(7)])
    wanted = json.dumps({"metadata": {"state": "to do"}})
    seen: list[str] = []
    parameters = {"collection": collection, "filter": wanted, "limit": "2"}
    while True:
        page = service.client.get("/audio", params=parameters).json()
        for item in page["items"]:
            seen.append(item["id"])
            patch(service, item["id"], {"metadata": {"state": "done"}}).raise_for_status()
        if page["next_cursor"] is None:
            break
        parameters["cursor"] = page["next_cursor"]
    assert seen == ids[::-1]


# --- hits by segment


def test_hits_may_be_segments(service: RunningService, collection: str) -> None:
    """Who looks for a sentence wants the sentences, though they are all in one recording: the best there
    are, each by itself, in each of the three ways to ask."""
    for number, seconds in enumerate((40, 25, 3)):
        content = recording(100 + number, seconds)
        service.upload(content, collection=collection, id=f"{collection}-{number}").raise_for_status()
    segments = sum(service.settled(f"{collection}-{number}")["segments"] for number in range(3))
    assert segments >= 4
    asked = {"q": "bees in the hive", "collection": collection, "limit": 1000}
    whole = service.found(**asked)
    every = service.found(**asked, group_by="segment")
    assert len(every) == segments
    assert [hit["rank"] for hit in every] == list(range(1, segments + 1))
    assert all(len(hit["segments"]) == 1 and hit["score"] == hit["segments"][0]["score"] for hit in every)
    order = [(-hit["score"], hit["id"], hit["segments"][0]["start_s"]) for hit in every]
    assert order == sorted(order)
    best = {hit["id"]: hit["segments"][0] for hit in reversed(every)}
    assert best == {hit["id"]: hit["segments"][0] for hit in whole}
    assert service.found(**asked | {"limit": 3}, group_by="segment") == every[:3]
    posted = service.client.post("/search", json=asked | {"group_by": "segment"}).json()["hits"]
    assert posted == every
    content = recording(102, 3)
    sound = service.found_by_sound(content, collection=collection, group_by="segment", limit=1000)
    assert len(sound) == segments
    assert sound[0]["id"] == f"{collection}-2"
    for refused in (
        service.client.get("/search", params=asked | {"group_by": "collection"}),
        service.client.post("/search", json=asked | {"group_by": None}),
    ):
        check_problem(refused, 422, "invalid_input")


# --- deletion by filter


def delete(service: RunningService, **body: Any) -> dict[str, Any]:
    answer = service.client.post("/audio/delete", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_what_matches_is_deleted_and_nothing_else(service: RunningService, collection: str) -> None:
    """Retention rules, and people who ask to be forgotten, are filters; when the answer is there it is
    done."""
    ids = fill(service, collection, [{"speaker": "ab"[n % 2]} for n in range(6)], first=500)
    theirs = f"{collection}-other"
    kept = service.ready(recording(500), collection=theirs, id=theirs, metadata='{"speaker": "a"}')
    wanted = {"collection": collection, "filter": {"metadata": {"speaker": "a"}}}
    assert delete(service, **wanted, dry_run=True) == {"matched": 3, "deleted": 0, "more": True}
    assert len(hits(service, collection)) == 6
    stored = service.stored()
    assert delete(service, **wanted) == {"matched": 3, "deleted": 3, "more": False}
    assert hits(service, collection) == ids[1::2]
    assert service.client.get(f"/audio/{ids[0]}").status_code == 404
    assert hits(service, theirs) == [theirs]
    gone = stored - service.stored()
    assert len(gone) == 2, "the third one's bytes are another collection's, too"
    assert f"{kept['sha256'][:2]}/{kept['sha256'][2:]}" not in gone
    assert delete(service, **wanted) == {"matched": 0, "deleted": 0, "more": False}


def test_a_deletion_says_whether_to_go_on(service: RunningService, collection: str) -> None:
    """A million recordings are not one request; each part is whole, and to ask again is to go on."""
    ids = fill(service, collection, [{"n": number} for number in range(5)])
    narrowed = {"collection": collection, "all": True, "limit": 2}
    answers = [delete(service, **narrowed) for _ in range(3)]
    assert [(answer["matched"], answer["deleted"], answer["more"]) for answer in answers] == [
        (5, 2, True),
        (3, 2, True),
        (1, 1, False),
    ]
    assert service.listed(collection=collection) == []
    assert {service.client.get(f"/audio/{recording_id}").status_code for recording_id in ids} == {404}


def test_more_than_a_batch_is_deleted(service: RunningService, collection: str) -> None:
    """Batches follow each other within a call; what is being embedded meanwhile goes, too."""
    with ThreadPoolExecutor(4) as threads:
        uploads = threads.map(
            lambda seed: service.upload(recording(1000 + seed, 0.3), collection=collection), range(210)
        )
        assert {uploaded.status_code for uploaded in uploads} == {202}
    assert delete(service, collection=collection, all=True) == {"matched": 210, "deleted": 210, "more": False}
    assert service.listed(collection=collection) == []
    assert hits(service, collection) == []


def test_what_failed_can_be_cleared_away(service: RunningService, collection: str) -> None:
    """A status narrows, too."""
    service.ready(recording(1), collection=collection, id=collection)
    failed = service.upload(b"RIFF no sound", collection=collection).json()["id"]
    service.settled(failed)
    assert delete(service, collection=collection, status="failed")["deleted"] == 1
    assert [item["id"] for item in service.listed(collection=collection)] == [collection]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"filter": {}},
        {"filter": {"metadata": {}}},
        {"filter": {"lang": None}},
        {"collection": "x"},
        {"all": False},
        {"all": True, "filter": {"lang": "fa"}},
        {"all": True, "status": "failed"},
    ],
    ids=json.dumps,
)
def test_an_empty_filter_deletes_nothing(service: RunningService, body: Any) -> None:
    """The mistake of a script whose variable was empty; everything is deleted by those who say so only."""
    check_problem(service.client.post("/audio/delete", json=body), 422, "invalid_field")


@pytest.mark.parametrize(
    "body",
    [
        {"all": 1},
        {"all": "true"},
        {"all": True, "limit": 0},
        {"all": True, "limit": 10_001},
        {"all": True, "dryrun": True},
        {"filter": None},
        [],
        None,
    ],
    ids=json.dumps,
)
def test_a_deletion_of_another_form_deletes_nothing(service: RunningService, body: Any) -> None:
    """A misspelt `dry_run` deletes, and a misspelt `limit` deletes all."""
    check_problem(service.client.post("/audio/delete", json=body), 422, "invalid_input")


# --- Idempotency-Key


def send(
    service: RunningService, key: str, content: bytes, headers: dict[str, str] | None = None, **form: str
) -> httpx.Response:
    return service.upload(content, headers={"Idempotency-Key": key} | (headers or {}), **form)


def test_the_same_request_again_is_answered_the_same(service: RunningService, collection: str) -> None:
    """A client that lost our answer sends again, and must get it: not a duplicate, nor a conflict of ids."""
    form = {"collection": collection, "metadata": '{"a": 1, "b": 2}', "lang": "fa"}
    first = send(service, f"k-{collection}", recording(1), **form)
    assert (first.status_code, first.json()["duplicate"]) == (202, None)
    service.settled(first.json()["id"])
    patch(service, first.json()["id"], {"metadata": {"a": 3}}).raise_for_status()
    record = service.client.get(first.headers["location"]).json()
    for again in (
        send(service, f"k-{collection}", recording(1), **form),
        send(service, f'"k-{collection}"', recording(1), **form | {"metadata": '{"b": 2, "a": 1}'}),
        send(service, f"k-{collection}", recording(1), **form | {"lang": "FA"}),
    ):
        assert (again.status_code, again.headers["location"]) == (202, first.headers["location"])
        assert again.json() == record, "as it is by now"
    waited = send(service, f"k-{collection}", recording(1), {"Prefer": "wait=5"}, **form)
    assert (waited.status_code, waited.json()) == (201, record)
    other = send(service, f"other-{collection}", recording(1), **form)
    assert (other.status_code, other.json()["duplicate"]) == (200, True)
    assert send(service, f"other-{collection}", recording(1), **form).json()["duplicate"] is True
    assert len(service.listed(collection=collection)) == 1


def test_another_request_under_the_same_key_is_refused(service: RunningService, collection: str) -> None:
    """A client that reuses keys by mistake would else be told that its second recording is safe."""
    form = {"collection": collection, "id": collection}
    send(service, collection, recording(1), **form).raise_for_status()
    for content, changed in (
        (recording(2), form),
        (recording(1), form | {"id": f"{collection}-2"}),
        (recording(1), form | {"lang": "fa"}),
        (recording(1), form | {"metadata": '{"a": 1}'}),
        (recording(1), form | {"collection": f"{collection}-2"}),
        (recording(1), {"collection": collection}),
    ):
        check_problem(send(service, collection, content, **changed), 422, "idempotency_mismatch")
    assert [item["id"] for item in service.listed(collection=collection)] == [collection]


def test_what_was_refused_keeps_no_key(service: RunningService, collection: str) -> None:
    """A mistake that is corrected is sent again, with the same key by most clients."""
    check_problem(send(service, collection, b"", collection=collection), 422, "empty_upload")
    refused = send(service, collection, recording(1), collection=collection, lang="fa_IR")
    check_problem(refused, 422, "invalid_language")
    assert send(service, collection, recording(1), collection=collection).status_code == 202


def test_a_deleted_recording_is_not_brought_back(service: RunningService, collection: str) -> None:
    """A retry that comes late gets its answer, and what it uploaded stays forgotten; of it nothing was
    kept."""
    form = {"collection": collection, "id": collection, "metadata": '{"secret": "سعدی"}'}
    first = send(service, collection, recording(1), **form)
    service.settled(collection)
    service.client.delete(f"/audio/{collection}").raise_for_status()
    again = send(service, collection, recording(1), {"Prefer": "wait=5"}, **form)
    assert (again.status_code, again.headers["location"]) == (202, first.headers["location"])
    record = again.json()
    assert (record["status"], record["error"]["code"]) == ("failed", "recording_not_found")
    same = ("id", "created_at", "sha256", "metadata", "collection", "size_bytes", "media_type")
    assert {name: record[name] for name in same} == {name: first.json()[name] for name in same}
    assert service.listed(collection=collection) == []
    assert service.client.get(f"/audio/{collection}").status_code == 404
    namesake = service.upload(recording(2), collection=collection, id=collection)
    assert namesake.status_code == 202
    assert send(service, collection, recording(1), **form).json()["status"] == "failed", "not the namesake"
    rows = sql(service.data_dir / "index_data", "SELECT * FROM once")
    assert "secret" not in repr(rows)


@pytest.mark.parametrize("key", ["", "x" * 256, "é", "a\tb", '"', '"a', '""', '"a"b"', '"a\\b"'])
def test_a_key_has_a_form(service: RunningService, key: str) -> None:
    """It is kept for a day, so it is bounded; a broken one is a mistake worth telling before the upload is
    sent."""
    headers = {b"Idempotency-Key": key.encode()}
    answer = service.client.post("/audio", files={"file": recording(1)}, headers=headers)
    check_problem(answer, 422, "invalid_field")
    twice = httpx.Headers([("Idempotency-Key", "a"), ("Idempotency-Key", "b")])
    answer = service.client.post("/audio", files={"file": recording(1)}, headers=twice)
    check_problem(answer, 422, "invalid_field")


def half_an_upload(service: RunningService, key: str) -> socket.socket:
    """A connection on which an upload with this key has begun, and does not go on."""
    connection = socket.create_connection(("127.0.0.1", service.port), 10)
    connection.sendall(
        f"POST /audio HTTP/1.1\r\nHost: x\r\nContent-Type: audio/wav\r\nIdempotency-Key: {key}\r\n"
        "Content-Length: 100000\r\n\r\nRIFF".encode()
    )
    return connection


def test_while_the_first_is_in_flight_a_second_waits(service: RunningService, collection: str) -> None:
    """Two of the same at once: one works, the other is told to ask again, and does not wait for ever."""
    with half_an_upload(service, collection):

        def is_refused() -> httpx.Response | None:
            answer = send(service, collection, recording(1), collection=collection)
            return answer if answer.status_code == 409 else None

        time.sleep(0.3)  # until the half one has come through
        refused = eventually(is_refused, within_s=10)
        check_problem(refused, 409, "idempotency_in_flight")
        assert refused.headers["retry-after"] == "1"
        assert send(service, f"{collection}-2", recording(2), collection=collection).status_code == 202

    def is_accepted() -> bool:
        return send(service, collection, recording(1), collection=collection).status_code == 202

    eventually(is_accepted, within_s=10)


def test_many_at_once_are_one(service: RunningService, collection: str) -> None:
    """A client with an eager retry sends the same several times together."""
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(lambda _: send(service, collection, recording(1), collection=collection), range(24))
        )
    assert {answer.status_code for answer in answers} <= {202, 409}
    accepted = {answer.headers["location"] for answer in answers if answer.status_code == 202}
    assert len(accepted) == 1
    assert len(service.listed(collection=collection)) == 1


def test_a_key_s_time_ends(service: RunningService, collection: str) -> None:
    """After a day the key is anybody's again; housekeeping removes what nobody asks for."""
    send(service, collection, recording(1), collection=collection).raise_for_status()
    sql(service.data_dir / "index_data", "UPDATE once SET kept_until = kept_until - 86401")
    assert send(service, collection, recording(2), collection=collection).status_code == 202
    assert len(service.listed(collection=collection)) == 2


# --- tenants


@pytest.fixture(scope="module")
def keyed(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RunningService, dict[str, dict[str, str]]]]:
    """A service of its own with keys, and the headers of each."""
    folder = tmp_path_factory.mktemp("keyed")
    headers = {}
    for name, arguments in {
        "reader": ("--scope", "read"),
        "a": ("--scope", "read,write", "--collection", "tenant-a"),
        "b": ("--scope", "read,write", "--collection", "tenant-b"),
    }.items():
        done = clasp("keys", "create", name, *arguments, "--json", cwd=folder)
        headers[name] = {"X-API-Key": json.loads(done.stdout)["key"]}
    with RunningService(folder, program="tests.stand_in") as running:
        running.start()
        yield running, headers


def test_tenants_learn_nothing_of_each_other_by_keys_filters_and_patches(
    keyed: tuple[RunningService, dict[str, dict[str, str]]],
) -> None:
    """Each of these calls looks through the library; for a tenant there is no other's recording in it."""
    service, headers = keyed
    client = service.client

    def post(by: str, seed: int, **form: str) -> httpx.Response:
        once = headers[by] | {"Idempotency-Key": "order-1"}
        return client.post("/audio", files={"file": recording(seed)}, data=form, headers=once)

    theirs = post("a", 1, id="call", metadata='{"v": 1}')
    ours = post("b", 2, id="call-2", metadata='{"v": 1}')
    assert (theirs.status_code, ours.status_code) == (202, 202), "the same key is each one's own"
    check_problem(post("a", 2, id="call", metadata='{"v": 1}'), 422, "idempotency_mismatch")
    assert post("b", 2, id="call-2", metadata='{"v": 1}').headers["location"] == "/audio/call-2"

    about_call = client.get("/audio/call", headers=headers["a"])
    for tag in ("*", about_call.headers["etag"]):
        by_b = headers["b"] | {"If-Match": tag}
        check_problem(client.patch("/audio/call", json={}, headers=by_b), 404, "recording_not_found")
        check_problem(client.delete("/audio/call", headers=by_b), 404, "recording_not_found")
    everything = {"filter": {"metadata": {"v": {"exists": True}}}}
    dry = client.post("/audio/delete", json=everything | {"dry_run": True}, headers=headers["b"]).json()
    assert dry["matched"] == 1
    named = client.post("/audio/delete", json=everything | {"collection": "tenant-a"}, headers=headers["b"])
    check_problem(named, 403, "forbidden")
    listed = client.get("/audio", params={"filter": '{"id": "call"}'}, headers=headers["b"]).json()
    assert listed["items"] == []
    deleted = client.post("/audio/delete", json={"all": True}, headers=headers["b"]).json()
    assert deleted["deleted"] == 1
    left = client.get("/audio/call", headers=headers["a"]).json()
    same = ("id", "collection", "sha256", "lang", "metadata", "created_at")  # it may be ready by now
    assert {name: left[name] for name in same} == {name: about_call.json()[name] for name in same}

    for call in (
        client.patch("/audio/call", json={}, headers=headers["reader"]),
        client.post("/audio/delete", json={"all": True}, headers=headers["reader"]),
    ):
        check_problem(call, 403, "forbidden")


# --- kill -9


def test_an_upload_happens_once_whenever_the_service_dies(tmp_path: Path) -> None:
    """Clients send again what was not answered. Whatever moment the service was killed at, each recording
    is there once, the retry is answered as the first would have been, and no key is stuck."""
    with RunningService(tmp_path, program="tests.stand_in", workers=0) as service:
        answered: dict[int, str] = {}
        for life in range(3):
            service.start(wait=False)
            eventually(lambda: answers(service), within_s=60)
            stuck = half_an_upload(service, "stuck")
            stop = threading.Event()

            def upload_on(first: int, stop: threading.Event = stop) -> None:
                for number in range(first, first + 200):
                    if stop.is_set():
                        return
                    try:
                        uploaded = send(service, f"key-{number}", recording(number, 0.3))
                    except httpx.TransportError:
                        return
                    assert uploaded.status_code == 202, uploaded.text
                    assert (
                        answered.setdefault(number, uploaded.headers["location"])
                        == uploaded.headers["location"]
                    )

            threads = [threading.Thread(target=upload_on, args=(1000 * n,)) for n in range(3)]
            for thread in threads:
                thread.start()
            eventually(lambda life=life: len(answered) > 20 * (life + 1), within_s=60)
            left = service.processes()
            assert service.process is not None
            os.kill(service.process.pid, signal.SIGKILL)
            service.process.wait()
            stop.set()
            for thread in threads:
                thread.join()
            stuck.close()
            eventually(lambda left=left: not any(map(is_alive, left)), within_s=40)
        service.start(wait=False)
        eventually(lambda: answers(service), within_s=60)
        most = {n: max(number for number in answered if number // 1000 == n) for n in range(3)}
        for n, last in most.items():
            for number in range(1000 * n, last + 2):  # the one after the last may have been in flight
                again = send(service, f"key-{number}", recording(number, 0.3))
                assert (again.status_code, again.json()["duplicate"]) == (202, None), again.text
                assert again.headers["location"] == answered.get(number, again.headers["location"])
        listed = service.listed(limit=1000)
        assert (
            len(listed)
            == len({item["sha256"] for item in listed})
            == sum(last % 1000 + 2 for last in most.values())
        )
        assert send(service, "stuck", recording(9)).status_code == 202


def answers(service: RunningService) -> bool:
    try:
        return service.client.get("/healthz").is_success
    except httpx.TransportError:
        return False
