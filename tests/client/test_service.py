"""The client with the real service: what its documentation promises, from upload to deletion."""

import inspect
import io
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from clasp_client import (
    AsyncClient,
    Client,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    NotReadyInTime,
    PreconditionFailed,
    Question,
    RecordingFailed,
    Retries,
    Unauthorized,
    Upload,
)
from tests.audio_files import encode, tone
from tests.client.calling import CALL_IDS, CALLS, Call
from tests.service import RunningService, eventually

TONES = {f"tone-{hertz}": encode(tone(1.5, frequency=hertz), 16_000) for hertz in (220, 440, 880)}
KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """The real service on a model that understands nothing."""
    folder = tmp_path_factory.mktemp("client")
    with RunningService(folder, program="tests.stand_in", api_keys=KEY) as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running.start()
        assert "unexpected error" not in running.log()
        assert KEY not in running.log()


@pytest.fixture
def url(served: RunningService, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CLASP_API_KEY", KEY)
    return str(served.client.base_url).rstrip("/")


@pytest.fixture(params=CALLS, ids=CALL_IDS)
def call(request: pytest.FixtureRequest) -> Call:
    made: Call = request.param
    return made


def test_a_recording_from_upload_to_deletion(url: str, call: Call, collection: str, tmp_path: Path) -> None:
    """The ordinary day: upload, wait, look, change, ask, listen, forget."""
    content = TONES["tone-440"]
    path = tmp_path / "bees.wav"
    path.write_bytes(content)
    metadata = {"title": "زنبورها", "tags": ["a", None], "year": 2026}
    here = {"collection": collection}
    record = call(url, "upload", path, id="bees", lang="EN-gb", metadata=metadata, wait=30, **here)
    assert (record.status, record.lang, record.metadata) == ("ready", "en-GB", metadata)
    assert record.duration_s == pytest.approx(1.5, abs=0.01)
    assert record.created_at <= datetime.now(UTC)
    again = call(url, "upload", content, **here)
    assert (again.id, again.duplicate) == ("bees", True)
    with pytest.raises(Conflict) as refused:
        call(url, "upload", TONES["tone-220"], id="bees", **here)
    assert refused.value.code == "id_conflict"

    record = call(url, "get", "bees", **here)
    change = {"metadata": {"title": None, "show": "news"}, "lang": None}
    changed = call(url, "update", "bees", change, if_match=record.etag, **here)
    assert (changed.lang, changed.metadata) == (None, {"tags": ["a", None], "year": 2026, "show": "news"})
    with pytest.raises(PreconditionFailed):
        call(url, "update", "bees", change, if_match=record.etag, **here)

    answer = call(url, "search", "bees", lang="en", min_score=-1, group_by="segment", **here)
    (hit,) = answer.hits
    assert (hit.id, hit.rank, len(hit.segments)) == ("bees", 1, 1)
    assert (answer.query.text, answer.model.name) == ("bees", "stand-in")
    (hit,) = call(url, "search_audio", io.BytesIO(content), **here).hits
    assert hit.score == pytest.approx(1)
    assert hit.links.content == "/audio/bees/content"

    waveform = call(url, "waveform", "bees", points=10, end_s=1.0, **here)
    assert (waveform.start_s, len(waveform.peaks)) == (0.0, 10)
    assert all(0 < peak <= 1 for peak in waveform.peaks)

    call(url, "content", "bees", tmp_path / "again.wav", **here)
    assert (tmp_path / "again.wav").read_bytes() == content
    with pytest.raises(PreconditionFailed):
        call(url, "delete", "bees", if_match=record.etag, **here)
    assert call(url, "delete", "bees", **here) is None
    with pytest.raises(NotFound):
        call(url, "get", "bees", **here)


def test_metadata_of_any_length_and_ids_of_any_letters(url: str, call: Call, collection: str) -> None:
    """Addresses have limits and proxies log them; the service's limits are others, and those are what
    count."""
    metadata = {"شرح": "س" * 15_000}
    passed: list[tuple[int, int | None]] = []
    options = {"metadata": metadata, "progress": lambda *seen: passed.append(seen)}
    record = call(url, "upload", TONES["tone-220"], collection=collection, **options)
    assert (record.metadata, record.collection) == (metadata, collection)
    assert (passed[0], passed[-1]) == ((0, record.size_bytes), (record.size_bytes, record.size_bytes))
    with pytest.raises(InvalidRequest) as refused:
        call(
            url, "upload", TONES["tone-880"], collection=collection, metadata=metadata | {"more": "x" * 9999}
        )
    assert refused.value.code == "invalid_field"
    with pytest.raises(NotFound):
        call(url, "get", "../healthz?x#y z")


def test_many_recordings(url: str, call: Call, collection: str, tmp_path: Path) -> None:
    """A folder in which one file is no recording, and one is gone, must not keep the others from being
    found."""
    noise = tmp_path / "noise.txt"
    noise.write_bytes(b"no recording at all")
    gone = tmp_path / "gone.wav"
    uploads = [Upload(content, id=name, collection=collection) for name, content in TONES.items()]
    given = [*uploads[:2], Upload(noise, collection=collection), gone, uploads[2]]
    results = call(url, "upload_many", iter(given), at_once=2, wait=30)
    assert len(results) == len(given)
    assert {done.record.id for done in results if done.record} == set(TONES)
    failed = {str(done.upload.recording): done.error for done in results if done.error}
    assert isinstance(failed[str(noise)], RecordingFailed)
    assert failed[str(noise)].record.error.code == "undecodable_audio"
    assert isinstance(failed[str(gone)], FileNotFoundError)

    listed = call(url, "list", collection=collection, page_size=2)
    assert [record.id for record in listed if record.status == "ready"] == [
        record.id
        for record in sorted(listed, key=lambda record: record.created_at, reverse=True)
        if record.status == "ready"
    ]
    assert {record.id for record in listed} > set(TONES)
    soon = {
        "created_at": {"lt": datetime.now(UTC) + timedelta(hours=1)},
        "id": {"in": ["tone-220", "tone-440"]},
    }
    assert len(call(url, "list", collection=collection, filter=soon)) == 2
    late = {"created_at": {"gt": datetime.now(UTC) + timedelta(hours=1)}}
    assert call(url, "list", collection=collection, filter=late) == []

    questions = ["bees", Question("trains", collection=collection, limit=2), *["x"] * 120]
    questions += [Question(like="tone-220", like_collection=collection, collection=collection)]
    answers = call(url, "search_many", questions)
    assert [answer.query.text for answer in answers[:3]] == ["bees", "trains", "x"]
    assert (len(answers), len(answers[1].hits)) == (123, 2)
    assert {hit.id for hit in answers[-1].hits} == {"tone-440", "tone-880"}
    at = {"at_s": 0.5, "like_collection": collection, "group_by": "segment"}
    alike = call(url, "like", "tone-220", collection=collection, **at).hits
    assert [hit.id for hit in alike] == [hit.id for hit in answers[-1].hits]
    (counted,) = [item for item in call(url, "collections") if item.name == collection]
    assert (counted.recordings, counted.ready, counted.failed, counted.segments) == (4, 3, 1, 3)
    assert counted.duration_s == pytest.approx(4.5, abs=0.1)

    counted = call(url, "delete_matching", collection=collection, filter=soon, dry_run=True)
    assert (counted.matched, counted.deleted, counted.more) == (2, 0, True)
    deleted = call(url, "delete_matching", collection=collection, filter=soon)
    assert (deleted.matched, deleted.deleted, deleted.more) == (2, 2, False)
    with pytest.raises(InvalidRequest, match="everything"):
        call(url, "delete_matching", collection=collection)
    call(url, "delete_matching", collection=collection, all=True)
    assert call(url, "list", collection=collection) == []


def test_the_service_and_who_may_ask_it(url: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors by what to do about them: no key, no right, no such thing on."""
    assert call(url, "health") is None
    ready = call(url, "ready")
    assert ready.status == "ready"
    assert set(ready.checks.values()) == {"ok"}
    with pytest.raises(Forbidden) as refused:
        call(url, "upload_url", "https://example.org/bees.opus", wait=1)
    assert refused.value.code == "url_not_allowed"
    with pytest.raises(Unauthorized):
        call(url, "list", options={"api_key": "another"})
    monkeypatch.delenv("CLASP_API_KEY")
    monkeypatch.setenv("CLASP_URL", url)
    with pytest.raises(Unauthorized):
        call(None, "search", "bees")


def test_an_upload_arrives_once_though_the_service_is_killed(
    served: RunningService, url: str, collection: str
) -> None:
    """kill -9 in the middle of an upload; and once more an answer that is lost when the recording was kept
    already. In the end there is one recording, and to who uploaded it, it is a new one."""
    content = encode(tone(20, frequency=300), 16_000)
    halfway, restarted = threading.Event(), threading.Event()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > len(content) // 2 and not restarted.is_set():
                halfway.set()
                restarted.wait(30)
            return super().read(size)

    def kill() -> None:
        halfway.wait(30)
        eventually(lambda: any(name.startswith("incoming/") for name in served.stored()), within_s=10)
        served.kill()
        served.start()
        restarted.set()

    killer = threading.Thread(target=kill)
    killer.start()
    transport = LosesAnswers()
    with Client(url, transport=transport, retries=Retries(base_s=0.05)) as clasp:
        record = clasp.upload(Slow(content), collection=collection)
        killer.join()
        assert transport.answered == [202, 202]
        assert (record.size_bytes, record.duplicate) == (len(content), None)
        assert clasp.wait_until_ready(record.id, timeout=30).status == "ready"
        assert [item.id for item in clasp.list(collection=collection)] == [record.id]


class LosesAnswers(httpx.HTTPTransport):
    """The first answer to an upload that was kept is never heard."""

    def __init__(self) -> None:
        super().__init__()
        self.answered: list[int] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.method == "POST":
            self.answered.append(response.status_code)
            if len(self.answered) == 1:
                response.close()
                raise httpx.ReadError("lost on its way", request=request)
        return response


def test_to_wait_has_an_end(url: str, collection: str) -> None:
    """A queue of hours must not hold a program for hours; what was uploaded is kept."""
    with Client(url) as clasp:
        record = clasp.upload(encode(tone(3, frequency=333), 16_000), collection=collection)
        with pytest.raises(NotReadyInTime) as late:
            clasp.wait_until_ready(record.id, collection=collection, timeout=0)
        assert late.value.record.id == record.id
        assert isinstance(late.value, TimeoutError)
        assert clasp.wait_until_ready(record.id, collection=collection, timeout=30).status == "ready"


def test_both_clients_have_the_same_methods() -> None:
    """Who learnt one knows the other; and editors and `help` show what a method takes and gives."""
    names = {name for name in vars(Client) if not name.startswith("_")}
    assert names == {name for name in vars(AsyncClient) if not name.startswith("_")}
    for name in names - {"list", "upload_many", "close"}:
        one, other = getattr(Client, name), getattr(AsyncClient, name)
        assert inspect.signature(one) == inspect.signature(other)
        assert one.__doc__ == other.__doc__
        assert inspect.iscoroutinefunction(other)
    assert str(inspect.signature(Client.get)).startswith("(self, id: str, *, collection: str | None = None)")
    assert inspect.signature(Client.get).return_annotation.__name__ == "Record"
