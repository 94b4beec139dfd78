"""Rolling upgrades: two versions of the program on one catalogue for a while."""

import subprocess
import tarfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from clasp_core.catalog import Catalog
from clasp_core.database import create_engine
from clasp_core.errors import DataMismatch
from tests.core.doubles import register
from tests.load_proof import clip
from tests.postgres import postgres_url
from tests.service import ROOT, RunningService, eventually

MIGRATIONS = "clasp_core/migrations/versions"


def in_sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'catalog.sqlite3'}"


def in_postgres(_: Path) -> str:
    return postgres_url()


def upgraded_to(url: str, revision: str) -> None:
    """As a version to come would leave a catalogue: with a column and a table that nobody knows yet."""
    engine = create_engine(url)
    with engine.begin() as db:
        db.exec_driver_sql("ALTER TABLE recordings ADD COLUMN mood TEXT")
        db.exec_driver_sql("CREATE TABLE moods (name TEXT PRIMARY KEY)")
        db.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    engine.dispose()


@pytest.mark.parametrize("where", [in_sqlite, in_postgres])
def test_an_older_program_goes_on_where_the_newer_one_says_that_it_can(
    where: Callable[[Path], str], tmp_path: Path
) -> None:
    """In a rolling upgrade a worker of the old version dies and is started again, by a service of the old
    version: it must work, if the new schema only adds to what it knows, and must not, if it does not."""
    url = where(tmp_path)
    with closing(Catalog(url)) as running:
        register(running, "before")
        upgraded_to(url, "0999_bears_0001")
        register(running, "after")
        with closing(Catalog(url)) as started:
            register(started, "later")
            assert [item.id for item in started.page(limit=9)] == ["later", "after", "before"]
    for revision in ("0999_bears_0998", "0999"):
        engine = create_engine(url)
        with engine.begin() as db:
            db.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
        engine.dispose()
        with pytest.raises(DataMismatch, match="newer version"):
            Catalog(url)


# --- with a real older version


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as it was before the newest migration, out of the history that this checkout has."""
    newest = max(path.name for path in (ROOT / MIGRATIONS).glob("[0-9]*.py"))
    git = partial(subprocess.run, cwd=ROOT, capture_output=True)
    commits = git(["git", "rev-list", "HEAD"]).stdout.decode().split()
    asked = [
        f"{commit}:{path}" for commit in commits for path in (f"{MIGRATIONS}/{newest}", "tests/stand_in.py")
    ]
    told = git(["git", "cat-file", "--batch-check"], input="\n".join(asked).encode()).stdout.decode()
    there = ["missing" not in line for line in told.splitlines()]
    for commit, has_newest, has_stand_in in zip(commits, there[::2], there[1::2], strict=True):
        if has_stand_in and not has_newest:
            tree = git(["git", "archive", commit, "app", "clasp_core", "tests"]).stdout
            folder = tmp_path_factory.mktemp("older")
            with tarfile.open(fileobj=BytesIO(tree)) as archive:
                archive.extractall(folder, filter="data")
            return folder
    pytest.skip("the history here does not go back to before the newest migration (a shallow clone?)")


def of_version(tree: Path) -> Any:
    """What starts that tree's program in place of ours."""

    def start(command: list[str], *, env: dict[str, str], **more: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=env | {"PYTHONPATH": str(tree)}, **more)

    return start


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_version_before_goes_on_beside_this_one(database: str, older: Path, tmp_path: Path) -> None:
    """Nobody stops a service of several machines as a whole for an upgrade: the first new one upgrades the
    catalogue, and the old ones must keep all their promises until their turn comes."""
    shared: dict[str, object] = {"data_dir": tmp_path / "index_data"}
    if database == "postgresql":
        shared["database_url"] = postgres_url()
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    numbers = iter(range(100))
    uploaded: dict[str, bytes] = {}

    def upload(service: RunningService) -> str:
        name = service.ready(content := clip(9, next(numbers)))["id"]
        uploaded[name] = content
        return str(name)

    with (
        RunningService(tmp_path / "old", program="tests.stand_in") as old,
        RunningService(tmp_path / "new", program="tests.stand_in") as new,
    ):
        old.new_process = of_version(older)
        for service in (old, new):
            service.settings |= shared
        old.start()
        upload(old)
        new.start()
        for service in (old, new, old, new):
            upload(service)
        gone = upload(old)
        new.client.delete(f"/audio/{gone}").raise_for_status()
        del uploaded[gone]
        headers = {"Idempotency-Key": "once"}
        content = clip(9, next(numbers))
        names = {service.upload(content, headers=headers).json()["id"] for service in (new, old)}
        assert len(names) == 1
        uploaded[names.pop()] = content
        eventually(lambda: new.metric("clasp_recordings", status="ready") == len(uploaded), within_s=30)
        for service in (old, new):
            assert {hit["id"] for hit in service.found("anything", limit=100)} == uploaded.keys()
            for name, content in uploaded.items():
                assert service.found_by_sound(content, limit=1)[0]["id"] == name
        # its worker dies and may not come back: it goes on answering all the same, and is not ready
        old.kill_workers()
        assert {hit["id"] for hit in old.found("anything", limit=100)} == uploaded.keys()
        assert old.stop() == 0
        upload(new)
        assert new.stop() == 0
        assert "unexpected error" not in old.log() + new.log()
