"""Fetching weights: whole, verified, recorded, resumed after a kill; and nothing of it when all is there."""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clasp_core import hub
from clasp_core.errors import ModelUnavailable, UnsafeCheckpoint, WeightsMismatch
from clasp_core.hub import Fetched, PublishedFile, Repository, WebFile
from tests.hub_server import FIRST, SECOND, Hub
from tests.service import environment

WEIGHTS = bytes(range(256)) * 100
CONFIG = b'{"hidden_size": 1024}'
NOWHERE = "http://127.0.0.1:9"


class Call:
    """Pickles as a call of whatever function it is given."""

    def __init__(self, function: Any, argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> Any:
        return self.call


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pickled(folder: Path, value: object) -> bytes:
    torch.save(value, folder / "pickled")
    content = (folder / "pickled").read_bytes()
    (folder / "pickled").unlink()
    return content


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with two repositories and a web server, and the parts that are published there."""
    monkeypatch.setattr(hub, "_PAUSE_S", 0.0)
    with Hub() as served:
        served.publish(
            "someone/encoder", FIRST, "main", config__json=CONFIG, dense___model__safetensors=WEIGHTS
        )
        served.publish(
            "others/fusion",
            FIRST,
            "main",
            one__pt=pickled(tmp_path, {"x": torch.arange(6.0)}),
            two__safetensors=b"two" * 1000,
            three__safetensors=b"three" * 1000,
        )
        served.web["models/net-0000.bin"] = (net := pickled(tmp_path, {"y": torch.arange(8.0)}))
        published: dict[str, Repository | WebFile] = {
            "encoder": Repository(
                "Encoder",
                "MIT",
                "someone/encoder",
                FIRST,
                (
                    PublishedFile("config.json"),
                    PublishedFile("dense/model.safetensors", sha256(WEIGHTS), len(WEIGHTS)),
                ),
                1,
            ),
            "one": Repository("One", "MIT", "others/fusion", "main", (PublishedFile("one.pt"),), 1),
            "two": Repository("Two", "MIT", "others/fusion", "main", (PublishedFile("two.safetensors"),), 1),
            "three": Repository(
                "Three", "MIT", "others/fusion", "main", (PublishedFile("three.safetensors"),), 1
            ),
            "net": WebFile(
                "Net",
                "MIT",
                "web",
                "",
                (PublishedFile("net-0000.bin", sha256(net)[:8]),),
                1,
                f"{served.endpoint}/models/net-0000.bin",
            ),
        }
        monkeypatch.setattr(hub, "PUBLISHED", published)
        monkeypatch.setattr(hub, "GROUPS", {"both": ("encoder", "two"), "speech": ("encoder",)})
        yield served


def fetch(server: Hub, folder: Path, *names: str, **revisions: str) -> dict[str, Fetched]:
    """Fetch into `folder`; what came of it, by the file's name there."""
    done = hub.fetch(names, folder, revisions=revisions, endpoint=server.endpoint)
    return {str(file.path.relative_to(folder)): file for file in done}


def in_folder(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def recorded(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "fetched.json").read_text())
    assert content["format"] == "clasp-fetched/1"
    files: dict[str, Any] = content["files"]
    return files


# --- what comes


def test_files_come_where_they_belong_and_are_recorded(server: Hub, tmp_path: Path) -> None:
    """Other modules read this layout, and the record is what later fetches are held to."""
    steps: list[tuple[str, int, int | None]] = []
    hub.fetch(["encoder"], tmp_path, endpoint=server.endpoint, progress=lambda *step: steps.append(step))
    config, weights = "someone/encoder/config.json", "someone/encoder/dense/model.safetensors"
    assert in_folder(tmp_path) == {config, weights, "fetched.json"}
    assert (tmp_path / config).read_bytes() == CONFIG
    assert (tmp_path / weights).read_bytes() == WEIGHTS
    assert recorded(tmp_path) == {
        name: {
            "source": "someone/encoder",
            "revision": FIRST,
            "commit": FIRST,
            "sha256": sha256(content),
            "size": len(content),
        }
        for name, content in ((config, CONFIG), (weights, WEIGHTS))
    }
    assert steps[-1] == (weights, len(WEIGHTS), len(WEIGHTS))
    assert {name for name, _, _ in steps} == {config, weights}


def test_pickles_are_converted_beside_themselves(server: Hub, tmp_path: Path) -> None:
    """The service reads no pickles; a fetch that left one only would be of no use."""
    files = fetch(server, tmp_path, "one", "net")
    assert {name: file.how for name, file in files.items()} == {
        "others/fusion/one.pt": "fetched",
        "others/fusion/one.safetensors": "converted",
        "web/net-0000.bin": "fetched",
        "web/net-0000.safetensors": "converted",
    }
    for name, file in files.items():
        assert file.sha256 == sha256((tmp_path / name).read_bytes()) == recorded(tmp_path)[name]["sha256"]
    assert files["others/fusion/one.safetensors"].commit == FIRST
    assert files["web/net-0000.bin"].commit is None


def test_a_part_of_two_groups_is_fetched_once(server: Hub, tmp_path: Path) -> None:
    """Two systems share their speech encoder."""
    files = fetch(server, tmp_path, "speech", "both", "two")
    assert [file.part for file in files.values()] == ["encoder", "encoder", "two"]
    fetched = [request.path for request in server.requests if request.method == "GET"]
    assert len(fetched) == len(set(fetched))


def test_a_renamed_repository_is_found(server: Hub, tmp_path: Path) -> None:
    """The hub answers old names by redirects within itself."""
    server.publish("new/encoder", FIRST, config__json=CONFIG, dense___model__safetensors=WEIGHTS)
    server.files = {key: content for key, content in server.files.items() if key[0] != "someone/encoder"}
    server.renamed["someone/encoder"] = "new/encoder"
    assert fetch(server, tmp_path, "encoder")["someone/encoder/config.json"].commit == FIRST


# --- what is there already


def test_nothing_is_asked_when_all_is_there(server: Hub, tmp_path: Path) -> None:
    """Start scripts run `fetch` each time, also where there is no network."""
    fetch(server, tmp_path, "both", "one")
    record = (tmp_path / "fetched.json").read_bytes()
    server.requests.clear()
    assert {file.how for file in fetch(server, tmp_path, "both", "one").values()} == {"present"}
    assert server.requests == []
    assert (tmp_path / "fetched.json").read_bytes() == record


def test_a_folder_filled_by_hand_is_taken(server: Hub, tmp_path: Path) -> None:
    """Where there is no network, people carry files; they are verified, recorded, and held to."""
    folder = tmp_path / "someone" / "encoder"
    (folder / "dense").mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "dense" / "model.safetensors").write_bytes(WEIGHTS)
    files = hub.fetch(["encoder"], tmp_path, endpoint=NOWHERE)
    assert [(file.how, file.commit) for file in files] == [("present", None)] * 2
    (folder / "config.json").write_bytes(b"{}")
    with pytest.raises(WeightsMismatch, match="recorded when it was first used"):
        hub.fetch(["encoder"], tmp_path, endpoint=NOWHERE)


def test_a_file_put_there_by_hand_must_be_the_published_one(server: Hub, tmp_path: Path) -> None:
    """A mirror's copy may be anything; it is neither used nor overwritten."""
    path = tmp_path / "someone" / "encoder" / "dense" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(WeightsMismatch, match=sha256(WEIGHTS)):
        fetch(server, tmp_path, "encoder")
    assert path.read_bytes() == b"something else"


@pytest.mark.parametrize("name", ["one.pt", "one.safetensors"])
def test_a_file_that_changed_is_refused(server: Hub, tmp_path: Path, name: str) -> None:
    """Recorded on first use, required ever after: vectors of two models must never meet unnoticed."""
    fetch(server, tmp_path, "one")
    path = tmp_path / "others" / "fusion" / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsMismatch, match=name):
        fetch(server, tmp_path, "one")


def test_a_converted_pickle_may_be_removed(server: Hub, tmp_path: Path) -> None:
    """It takes as much disk as the weights that are read."""
    fetch(server, tmp_path, "one")
    (tmp_path / "others" / "fusion" / "one.pt").unlink()
    server.requests.clear()
    assert set(fetch(server, tmp_path, "one")) == {"others/fusion/one.safetensors"}
    assert server.requests == []


def test_a_damaged_record_is_not_ignored(server: Hub, tmp_path: Path) -> None:
    """To begin a new one would be to trust whatever is there."""
    fetch(server, tmp_path, "encoder")
    (tmp_path / "fetched.json").write_text("{")
    with pytest.raises(WeightsMismatch, match=r"fetched\.json"):
        fetch(server, tmp_path, "encoder")


# --- which version


def test_the_first_commit_that_answers_is_the_one(server: Hub, tmp_path: Path) -> None:
    """A branch moves; the parts of one repository must still fit each other."""
    fetch(server, tmp_path, "two")
    server.publish("others/fusion", SECOND, "main", three__safetensors=b"other")
    server.requests.clear()
    assert fetch(server, tmp_path, "three")["others/fusion/three.safetensors"].commit == FIRST
    assert {request.path for request in server.requests if "resolve" in request.path} == {
        f"others/fusion/resolve/{FIRST}/three.safetensors"
    }


def test_a_file_that_is_fetched_again_must_be_the_same(server: Hub, tmp_path: Path) -> None:
    """A history that was rewritten, or a mirror that lies."""
    fetch(server, tmp_path, "encoder")
    path = tmp_path / "someone" / "encoder" / "config.json"
    path.unlink()
    server.publish("someone/encoder", FIRST, config__json=b'{"hidden_size": 1}')
    with pytest.raises(WeightsMismatch, match="recorded"):
        fetch(server, tmp_path, "encoder")
    assert not path.exists()


def test_another_revision_is_had_by_asking(server: Hub, tmp_path: Path) -> None:
    """What is published of one commit says nothing of another; and two never mix in one folder."""
    server.publish("someone/encoder", SECOND, config__json=b"{}", dense___model__safetensors=b"newer")
    files = fetch(server, tmp_path / "new", "encoder", encoder=SECOND)
    assert {file.commit for file in files.values()} == {SECOND}
    with pytest.raises(WeightsMismatch, match=SECOND):
        fetch(server, tmp_path / "new", "encoder")
    with pytest.raises(WeightsMismatch, match=FIRST):
        fetch(server, tmp_path / "old", "encoder") and fetch(
            server, tmp_path / "old", "encoder", encoder=SECOND
        )
    assert {file.how for file in fetch(server, tmp_path / "old", "encoder").values()} == {"present"}


# --- what goes wrong on the way

KILLED = """
import sys
from pathlib import Path
from clasp_core import hub
file = hub.PublishedFile("model.safetensors")
hub.PUBLISHED = {"big": hub.Repository("Big", "MIT", "big/big", "main", (file,), 1)}
hub.fetch(["big"], Path(sys.argv[1]), endpoint=sys.argv[2])
"""


def test_a_fetch_that_was_killed_goes_on(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes over a weak line: what came before the kill must not come again."""
    content = os.urandom(1 << 20) * 6
    server.publish("big/big", FIRST, "main", model__safetensors=content)
    server.stall_after = 4 << 20
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path, server.endpoint], env=environment()
    ) as fetching:
        assert server.stalled.wait(60)
        end = time.monotonic() + 20
        while sum(path.stat().st_size for path in tmp_path.rglob("*.part")) < 3 << 20:
            assert time.monotonic() < end
            time.sleep(0.02)
        fetching.kill()
    assert not (tmp_path / "big" / "big" / "model.safetensors").exists()
    server.stall_after = None
    before = server.sent_bytes
    repository = Repository("Big", "MIT", "big/big", "main", (PublishedFile("model.safetensors"),), 1)
    monkeypatch.setattr(hub, "PUBLISHED", {"big": repository})
    (file,) = fetch(server, tmp_path, "big").values()
    assert file.path.read_bytes() == content
    assert server.sent_bytes - before <= 3 << 20
    assert in_folder(tmp_path) == {"big/big/model.safetensors", "fetched.json"}


def test_a_connection_that_breaks_is_taken_up_again(server: Hub, tmp_path: Path) -> None:
    """A server that closes long transfers must not make people type the command again."""
    server.stop_after = [10_000, 5_000]
    fetch(server, tmp_path, "encoder")
    ranges = [request.range for request in server.requests if request.path.startswith("cdn/")]
    assert ranges == [None, "bytes=10000-", "bytes=15000-"]
    assert (tmp_path / "someone/encoder/dense/model.safetensors").read_bytes() == WEIGHTS


def test_a_connection_that_always_breaks_is_given_up(server: Hub, tmp_path: Path) -> None:
    """And what has come is kept for the next time."""
    server.stop_after = [10_000] + [0] * 20
    with pytest.raises(ModelUnavailable, match="broke off"):
        fetch(server, tmp_path, "encoder")
    (part,) = tmp_path.rglob("*.part")
    assert part.stat().st_size == 10_000


def test_a_server_without_ranges_sends_it_all_again(server: Hub, tmp_path: Path) -> None:
    """Two beginnings in a row would have the right length at best."""
    server.stop_after = [10_000]
    server.ignore_ranges = True
    fetch(server, tmp_path, "encoder")
    assert (tmp_path / "someone/encoder/dense/model.safetensors").read_bytes() == WEIGHTS


def test_halves_of_two_versions_are_not_joined(server: Hub, tmp_path: Path) -> None:
    """The branch moved between the kill and the next day."""
    server.stop_after = [100] + [0] * 20
    with pytest.raises(ModelUnavailable):
        fetch(server, tmp_path, "two")
    server.stop_after = []
    server.publish("others/fusion", SECOND, "main", two__safetensors=b"newer" * 1000)
    assert fetch(server, tmp_path, "two")["others/fusion/two.safetensors"].commit == SECOND
    assert (tmp_path / "others/fusion/two.safetensors").read_bytes() == b"newer" * 1000
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize("name", ["encoder", "net"])
def test_a_file_with_another_hash_is_not_kept(server: Hub, tmp_path: Path, name: str) -> None:
    """Whoever holds the server must not hold the models as well."""
    server.publish("someone/encoder", FIRST, dense___model__safetensors=b"evil" * 100)
    server.web["models/net-0000.bin"] = b"evil" * 100
    with pytest.raises(WeightsMismatch, match="is published"):
        fetch(server, tmp_path, name)
    assert in_folder(tmp_path) <= {"someone/encoder/config.json", "fetched.json"}


def test_a_file_that_changed_on_the_way_is_not_kept(server: Hub, tmp_path: Path) -> None:
    """Where no hash was published before, the hub's own still shows what a bad line or proxy did."""
    server.damage = True
    with pytest.raises(WeightsMismatch, match="did not arrive"):
        fetch(server, tmp_path, "two")
    assert in_folder(tmp_path) == set()


def test_a_pickle_that_could_run_something_is_not_converted(server: Hub, tmp_path: Path) -> None:
    """The hub flags the authors' own files as suspicious; here it is the next one that would be."""
    trace = tmp_path / "trace"
    server.publish(
        "others/fusion", FIRST, one__pt=pickled(tmp_path, {"x": Call(os.system, f"touch {trace}")})
    )
    with pytest.raises(UnsafeCheckpoint, match=r"posix\.system"):
        fetch(server, tmp_path / "models", "one")
    assert not trace.exists()
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_two_at_once_do_not_write_the_same_files(server: Hub, tmp_path: Path) -> None:
    """Two appending to one file would join what no hash could mend."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(ModelUnavailable, match="Another process"):
            fetch(server, tmp_path, "encoder")
    finally:
        os.close(descriptor)
    fetch(server, tmp_path, "encoder")


def test_what_cannot_be_had_is_said_in_one_line(server: Hub, tmp_path: Path) -> None:
    """And says what to do: the address, and where a file carried here by hand belongs."""
    for problem, words in {
        "names": "'whisper'",
        "stray": "two",
        "fixed": "no revisions",
        "missing": "404",
        "offline": str(tmp_path / "offline" / "someone" / "encoder" / "config.json"),
        "nonsense": "nonsense",
    }.items():
        endpoint = {"offline": NOWHERE, "nonsense": "nonsense"}.get(problem, server.endpoint)
        revisions = {"stray": {"two": FIRST}, "fixed": {"net": FIRST}, "missing": {"encoder": "9" * 40}}
        names = {"names": ["encoder", "whisper"], "fixed": ["net"]}.get(problem, ["encoder"])
        with pytest.raises(ModelUnavailable) as error:
            hub.fetch(names, tmp_path / problem, revisions=revisions.get(problem), endpoint=endpoint)
        assert words in error.value.detail, problem
        assert "\n" not in error.value.detail


# --- the table


def test_what_is_said_to_be_published_could_be() -> None:
    """A slip in a hash or a commit would be seen only by whoever fetches first."""
    places: dict[str, PublishedFile] = {}
    for part in hub.PUBLISHED.values():
        assert part.title
        assert part.licence
        assert re.fullmatch(r"[0-9a-f]{40}|main", part.revision) or isinstance(part, WebFile)
        assert any(file.name.endswith((".safetensors", ".bin", ".pt", ".pth")) for file in part.files)
        for file in part.files:
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}", file.sha256)
            assert places.setdefault(f"{part.folder}/{file.name}", file) == file
            assert part.url(file, part.revision, hub.HUB).startswith("https://")
    assert set(hub.parts_named(["paper"])) == {"hubert-large", "efficientnet-b7", "labse", "clasp-concat"}
