"""Access: keys with scopes and collections, revocation, and tenants that learn nothing of each other."""

import base64
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.errors import STATUS_OF
from tests.app.test_errors import check_problem
from tests.audio_files import encode, speech
from tests.service import RunningService, clasp, eventually, sql

KEYS = {
    "reader": ("--scope", "read"),
    "writer": ("--scope", "write"),
    "operator": ("--scope", "admin"),
    "a": ("--scope", "read,write", "--collection", "tenant-a"),
    "b": ("--scope", "read,write", "--collection", "tenant-b"),
    "ab": ("--scope", "write,read", "--collection", "tenant-b", "--collection", "tenant-a"),
}


def recording(seed: int) -> bytes:
    """A second of babble unlike any other seed's."""
    return encode(speech(1.0, seed=seed), 16_000)


class Keyed:
    """A running service that has keys, and a client for each of them."""

    def __init__(self, service: RunningService) -> None:
        self.service = service
        self.texts: dict[str, str] = {}

    def keys(self, *arguments: object) -> Any:
        done = clasp("keys", *arguments, "--json", cwd=self.service.data_dir)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def create(self, name: str, *arguments: object) -> str:
        self.texts[name] = self.keys("create", name, *arguments)["key"]
        return self.texts[name]

    def ask(self, by: str, method: str, path: str, **more: Any) -> httpx.Response:
        """A request with the key of that name."""
        headers = {"Authorization": f"Bearer {self.texts[by]}"} | more.pop("headers", {})
        return self.service.client.request(method, path, headers=headers, **more)

    def upload(self, by: str, content: bytes, **form: str) -> httpx.Response:
        return self.ask(by, "POST", "/audio", files={"file": content}, data=form)

    def ready(self, by: str, content: bytes, **form: str) -> str:
        """The id of a new recording once it can be found."""
        uploaded = self.upload(by, content, **form)
        assert uploaded.status_code == 202, uploaded.text
        record = uploaded.json()

        def is_ready() -> bool:
            where = {"collection": record["collection"]}
            now = self.ask("operator", "GET", f"/audio/{record['id']}", params=where).json()
            return now["status"] == "ready"

        eventually(is_ready, within_s=60)
        return record["id"]

    def found(self, by: str, **parameters: Any) -> list[tuple[str, str]]:
        """(collection, id) of all hits of a question, which is the same for all."""
        answer = self.ask(by, "GET", "/search", params={"q": "bees", "limit": 1000} | parameters)
        return [(hit["collection"], hit["id"]) for hit in answer.raise_for_status().json()["hits"]]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """One service with a key of each kind, made while it runs. Open until the first of them."""
    with RunningService(tmp_path_factory.mktemp("keyed"), program="tests.stand_in") as running:
        keyed = Keyed(running.start())
        assert running.client.get("/audio").status_code == 200
        for name, arguments in KEYS.items():
            keyed.create(name, *arguments)
        yield keyed


# --- keys


def test_the_first_key_closes_a_running_service(keyed: Keyed) -> None:
    """From then on there is no way in without one, to addresses that do not exist either; health is open, and
    so is the API's description."""
    for path in (
        "/audio",
        "/v1/search?q=a",
        "/metrics",
        "/nowhere",
        "/audio/x/content",
    ):
        for headers in ({}, {"X-API-Key": "clasp_" + 12 * "0" + "_" + 64 * "0"}):
            answer = keyed.service.client.get(path, headers=headers)
            check_problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert keyed.service.client.get(path).status_code == 200


def test_each_of_many_who_come_at_once_is_who_they_are(keyed: Keyed) -> None:
    """Keys that are presented at the same time are looked up together; nobody may get another's rights."""
    names = [*KEYS, None] * 12

    def who(name: str | None) -> str | int:
        headers = {"X-API-Key": keyed.texts[name] if name else "clasp_" + 12 * "0" + "_" + 64 * "0"}
        answer = keyed.service.client.get("/session", headers=headers)
        return answer.json()["name"] if answer.is_success else answer.status_code

    with ThreadPoolExecutor(24) as people:
        assert list(people.map(who, names)) == [name or 401 for name in names]


def test_a_key_opens_in_either_header(keyed: Keyed) -> None:
    """What is needed to ask is any key, given whole."""
    key = keyed.texts["reader"]
    for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}):
        assert keyed.service.client.get("/audio", headers=headers).status_code == 200
    another = keyed.texts["writer"]
    for wrong in (key[:-1], key + "0", key.upper(), key[:18] + another[18:], key[19:], key[5:]):
        check_problem(keyed.service.client.get("/audio", headers={"X-API-Key": wrong}), 401, "unauthorized")


def test_a_revoked_key_is_worthless_at_once(keyed: Keyed) -> None:
    """A key that leaked must be stopped without a restart, and its end may not be what opens the doors."""
    keyed.create("leaked", "--scope", "read")
    assert keyed.ask("leaked", "GET", "/audio").status_code == 200
    revoked = keyed.keys("revoke", "leaked")
    check_problem(keyed.ask("leaked", "GET", "/audio"), 401, "unauthorized")
    assert keyed.keys("revoke", "leaked") == revoked, "to revoke twice is no other thing"
    again = clasp("keys", "create", "leaked", "--scope", "read", cwd=keyed.service.data_dir)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)


def test_a_library_without_a_valid_key_stays_closed(tmp_path: Path) -> None:
    """Whoever revokes the only key means to let nobody in, not everybody; over a restart, too."""
    keyed = Keyed(RunningService(tmp_path, program="tests.stand_in", workers=0))
    keyed.create("only", "--scope", "admin")
    keyed.keys("revoke", "only")
    with keyed.service as service:
        service.start()
        for headers in ({}, {"X-API-Key": keyed.texts["only"]}):
            check_problem(service.client.get("/audio", headers=headers), 401, "unauthorized")


def test_keys_are_listed_without_their_secrets(keyed: Keyed) -> None:
    """The list is for people to see who has which rights; whoever reads the database gets no key from it."""
    known = {key["name"]: key for key in keyed.keys("list")["keys"]}
    assert known.keys() >= KEYS.keys()
    assert (known["ab"]["scopes"], known["ab"]["collections"]) == (
        ["read", "write"],
        ["tenant-a", "tenant-b"],
    )
    assert (known["reader"]["collections"], known["reader"]["revoked_at"]) == (None, None)
    table = clasp("keys", "list", cwd=keyed.service.data_dir).stdout
    kept = b"".join(path.read_bytes() for path in (keyed.service.data_dir / "index_data").glob("catalog*"))
    for text in keyed.texts.values():
        assert re.fullmatch("clasp_[0-9a-f]{12}_[0-9a-f]{64}", text)
        secret = text[19:]
        assert secret not in json.dumps(known) + table + keyed.service.log()
        assert secret.encode() not in kept


def test_the_log_says_which_key_asked(keyed: Keyed) -> None:
    """After a leak somebody has to find out what was done with the key."""
    keyed.ask("reader", "GET", "/audio", headers={"X-Request-ID": "traced-1"})

    def written() -> list[dict[str, Any]]:  # after the answer
        lines = [json.loads(line) for line in keyed.service.log().splitlines()]
        return [line for line in lines if line.get("request_id") == "traced-1"]

    (line,) = eventually(written, within_s=10)
    assert line["key"] == "reader"


# --- scopes


READS = [
    ("GET", "/audio"),
    ("GET", "/audio/none"),
    ("GET", "/audio/none/content"),
    ("HEAD", "/audio/none/content"),
    ("GET", "/audio/none/waveform"),
    ("GET", "/collections"),
    ("GET", "/search?q=a"),
    ("POST", "/search"),
    ("POST", "/search/audio"),
    ("GET", "/v1/audio"),
    ("POST", "/v1/search"),
]
WRITES = [
    ("POST", "/audio"),
    ("PATCH", "/audio/none"),
    ("DELETE", "/audio/none"),
    ("POST", "/audio/delete"),
    ("POST", "/v1/audio"),
    ("DELETE", "/v1/audio/none"),
]
ADMINS = [("GET", "/metrics")]


@pytest.mark.parametrize(("method", "path"), READS + WRITES + ADMINS)
def test_a_call_needs_its_scope(keyed: Keyed, method: str, path: str) -> None:
    """A key in a web page that searches must not be able to delete, nor an uploader's to listen."""
    call = (method, path)
    needed = "read" if call in READS else "write" if call in WRITES else "admin"
    for name, has in (("reader", {"read"}), ("writer", {"write"}), ("operator", {"read", "write", "admin"})):
        answer = keyed.ask(name, method, path)
        if needed in has:
            assert answer.status_code not in (401, 403), answer.text
        elif method == "HEAD":
            assert answer.status_code == 403
        else:
            assert needed in check_problem(answer, 403, "forbidden")["detail"]


def test_the_description_says_which_scope(keyed: Keyed) -> None:
    """Generated clients learn from it how to present a key, and people which one they need."""
    described = keyed.ask("reader", "GET", "/openapi.json").json()
    assert described["components"]["securitySchemes"].keys() == {"bearer", "header"}
    for method, path in READS + WRITES + ADMINS:
        place = path.partition("?")[0].replace("none", "{id}")
        if method != "HEAD" and not path.startswith("/v1"):
            scope = "read" if (method, path) in READS else "write" if (method, path) in WRITES else "admin"
            security = described["paths"][place][method.lower()]["security"]
            assert security == [{"bearer": [scope]}, {"header": [scope]}, {}]


# --- tenants


def test_a_limited_key_sees_only_its_collections(keyed: Keyed) -> None:
    """Two customers in one service: for each, in every call, it is as if the other were not there."""
    shared, own = recording(1), recording(2)
    in_a = keyed.ready("a", shared)
    in_b = keyed.ready("b", shared)
    only_a = keyed.ready("a", own, collection="tenant-a")
    elsewhere = keyed.ready("operator", own)
    assert set(keyed.found("a")) == {("tenant-a", in_a), ("tenant-a", only_a)}
    assert keyed.found("b") == [("tenant-b", in_b)] == keyed.found("b", collection="tenant-b")
    assert set(keyed.found("ab")) == set(keyed.found("a")) | set(keyed.found("b"))
    assert ("default", elsewhere) in keyed.found("reader")

    several = keyed.ask("b", "POST", "/search", json={"queries": [{"q": "bees"}, {"q": "honey"}]}).json()
    by_sound = keyed.ask("b", "POST", "/search/audio", files={"file": own}).json()
    for answer in (*several["results"], by_sound):
        assert [hit["id"] for hit in answer["hits"]] == [in_b]
    assert [item["id"] for item in keyed.ask("b", "GET", "/audio").json()["items"]] == [in_b]
    assert [item["id"] for item in keyed.ask("a", "GET", "/audio").json()["items"]] == [only_a, in_a]

    keyed.ask("a", "DELETE", f"/audio/{in_a}").raise_for_status()
    assert keyed.ask("b", "GET", f"/audio/{in_b}/content").content == shared
    assert keyed.found("b") == [("tenant-b", in_b)]


@pytest.mark.parametrize(
    ("method", "suffix"),
    [("GET", ""), ("GET", "/content"), ("GET", "/waveform"), ("PATCH", ""), ("DELETE", "")],
)
def test_another_s_recording_is_not_there(keyed: Keyed, method: str, suffix: str) -> None:
    """Not "forbidden": that would say that the id is in use. Every byte is as for an id that nobody has."""
    theirs = keyed.upload("a", recording(3)).json()["id"]
    same = {"headers": {"X-Request-ID": "same"}} | ({"json": {}} if method == "PATCH" else {})
    answer = keyed.ask("b", method, f"/audio/{theirs}{suffix}", **same)
    check_problem(answer, 404, "recording_not_found")
    unknown = keyed.ask("b", method, f"/audio/none{suffix}", **same)
    assert answer.text.replace(theirs, "none") == unknown.text
    assert answer.headers.keys() == unknown.headers.keys()
    assert keyed.ask("a", "GET", f"/audio/{theirs}").status_code == 200


def test_an_id_tells_nothing_of_another_s(keyed: Keyed) -> None:
    """Were an id refused because another tenant has it, trying ids would list that tenant's recordings."""
    assert keyed.upload("a", recording(4), id="call-1").status_code == 202
    theirs = keyed.upload("b", recording(5), id="call-1")
    assert (theirs.status_code, theirs.json()["collection"]) == (202, "tenant-b")
    check_problem(keyed.upload("a", recording(6), id="call-1"), 409, "id_conflict")
    same = keyed.upload("b", recording(4))
    assert (same.status_code, same.json()["duplicate"]) == (202, None)
    assert keyed.ask("a", "GET", "/audio/call-1/content").content == recording(4)
    assert keyed.ask("b", "GET", "/audio/call-1/content").content == recording(5)


def test_who_sees_two_of_one_id_says_which(keyed: Keyed) -> None:
    """A key for both collections must neither get nor delete the wrong one of two."""
    for tenant, seed in (("a", 7), ("b", 8)):
        keyed.upload(tenant, recording(seed), id="twice").raise_for_status()
    for name in ("ab", "operator"):
        check_problem(keyed.ask(name, "GET", "/audio/twice"), 409, "ambiguous_id")
        check_problem(keyed.ask(name, "DELETE", "/audio/twice"), 409, "ambiguous_id")
    where = {"collection": "tenant-b"}
    assert keyed.ask("ab", "GET", "/audio/twice/content", params=where).content == recording(8)
    assert keyed.ask("ab", "DELETE", "/audio/twice", params=where).status_code == 204
    assert keyed.ask("ab", "GET", "/audio/twice").json()["collection"] == "tenant-a"


@pytest.mark.parametrize("collection", ["tenant-b", "nobody-s"])
def test_another_collection_cannot_be_named(keyed: Keyed, collection: str) -> None:
    """Whether it exists or not the answer is the same, so names of collections cannot be tried out."""
    where = {"collection": collection}
    answers = [
        keyed.upload("a", recording(9), **where),
        keyed.ask(
            "a", "POST", "/audio", params=where, content=b"RIFF", headers={"Content-Type": "audio/wav"}
        ),
        keyed.ask("a", "GET", "/audio", params=where),
        keyed.ask("a", "GET", "/audio/none", params=where),
        keyed.ask("a", "DELETE", "/audio/none", params=where),
        keyed.ask("a", "PATCH", "/audio/none", params=where, json={}),
        keyed.ask("a", "POST", "/audio/delete", json={"all": True} | where),
        keyed.ask("a", "GET", "/search", params={"q": "bees"} | where),
        keyed.ask("a", "POST", "/search", json={"queries": [{"q": "bees"}, {"q": "bees"} | where]}),
        keyed.ask("a", "POST", "/search/audio", params=where, files={"file": recording(9)}),
    ]
    for answer in answers:
        assert "tenant-a" not in check_problem(answer, 403, "forbidden")["detail"]


def test_an_upload_by_a_key_for_several_names_one(keyed: Keyed) -> None:
    """To guess would put one customer's recording among another's."""
    check_problem(keyed.upload("ab", recording(10)), STATUS_OF["collection_required"], "collection_required")
    uploaded = keyed.upload("ab", recording(10), collection="tenant-b")
    assert (uploaded.status_code, uploaded.json()["collection"]) == (202, "tenant-b")


def test_a_cursor_counts_nothing(keyed: Keyed) -> None:
    """A cursor made of a running number would tell how much all the others upload."""
    for seed in (11, 12, 13):
        keyed.upload("a", recording(seed)).raise_for_status()
    page = keyed.ask("a", "GET", "/audio", params={"limit": 2}).json()
    last = page["items"][-1]
    cursor = page["next_cursor"]
    said = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    assert said[1:] == [last["id"], last["collection"]]
    assert last["created_at"].startswith(said[0])
    where = "SELECT key FROM recordings WHERE id = :id"
    ((key,),) = sql(keyed.service.data_dir / "index_data", where, id=last["id"])
    assert key not in said


# --- addresses


def refused(folder: Path, **settings: object) -> str:
    done = clasp("serve", cwd=folder, **({"port": 0, "host": "0.0.0.0"} | settings))
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", ""])
def test_other_machines_are_not_served_without_a_key(tmp_path: Path, host: str) -> None:
    """The mistake that puts databases on the internet; the line says every way out."""
    began = time.monotonic()
    line = refused(tmp_path, host=host)
    assert time.monotonic() - began < 20, "a model was loaded before"
    for words in (host, "clasp keys create", "CLASP_API_KEYS", "CLASP_ALLOW_ANONYMOUS=true"):
        assert words in line


@pytest.mark.parametrize("way", ["a key", "CLASP_ALLOW_ANONYMOUS"])
def test_every_way_out_of_the_refusal_is_one(tmp_path: Path, way: str) -> None:
    """Each is followed as far as it goes without loading a model: to a model that is not there. (With
    CLASP_API_KEYS, test_processes goes on to an address that is not there.)"""
    settings: dict[str, object] = {"model": "nowhere"}
    if way == "a key":
        assert clasp("keys", "create", "me", "--scope", "read", cwd=tmp_path).returncode == 0
    else:
        settings["allow_anonymous"] = "true"
    assert "nowhere" in refused(tmp_path, **settings)
