"""The service on PostgreSQL: what somebody notices of it who only speaks HTTP. Other tests run on it
as well where CLASP_TEST_DATABASE=postgresql says so."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.app.test_errors import check_problem
from tests.app.test_processes import recording
from tests.postgres import Server, drop, postgres_url
from tests.service import RunningService, clasp, eventually

STAND_IN = "tests.stand_in"


@pytest.fixture
def url() -> Iterator[str]:
    url = postgres_url()
    yield url
    drop(url)


def test_replicas_and_workers_share_a_library(url: str, tmp_path: Path) -> None:
    """Two services start on an empty database at the same moment; what one is sent the other one finds, and
    is worked on by whoever is free, at once and not when somebody next looks."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        RunningService(tmp_path / "one", program=STAND_IN, database_url=url, workers=0) as one,
        RunningService(tmp_path / "two", program=STAND_IN, database_url=url) as two,
    ):
        for service in (one, two):
            service.settings["data_dir"] = tmp_path / "shared"
        one.start(wait=False)
        two.start()
        one.wait_until_ready()
        for number in range(3):
            uploaded = one.upload(recording(number), id=f"r{number}", headers={"Prefer": "wait=20"})
            assert uploaded.status_code == 201, uploaded.text
            assert f"r{number}" in {hit["id"] for hit in two.found("anything")}
        assert two.client.delete("/audio/r0").status_code == 204
        assert {hit["id"] for hit in one.found("anything")} == {"r1", "r2"}
        check_problem(two.client.get("/audio/a%00b"), 404, "recording_not_found")
        for service in (one, two):
            nul = service.upload(recording(9), metadata='{"a": "\\u0000"}')
            check_problem(nul, 422, "invalid_field")
            assert service.stop() == 0
            assert "Traceback" not in service.log()


def test_a_database_that_is_gone_for_a_while_is_waited_for(tmp_path: Path) -> None:
    """Whoever asks meanwhile is told to come again, workers and services outlive it, and all goes on when it
    is back: no recording has failed by it, nobody has to start anything anew. No password is in the log."""
    with (
        Server() as server,
        RunningService(tmp_path, program=STAND_IN, database_url=server.url(password="hush-hush")) as service,
    ):
        service.start()
        service.ready(recording(1), id="before")
        workers = service.worker_pids()
        server.stop()
        for refused in (service.upload(recording(2)), service.client.get("/audio/before")):
            check_problem(refused, 503, "database_unavailable")
            assert int(refused.headers["retry-after"]) > 0
        eventually(lambda: service.client.get("/readyz").status_code == 503, within_s=10)
        assert service.client.get("/healthz").is_success
        server.start()
        eventually(lambda: service.client.get("/readyz").is_success, within_s=20)
        assert service.upload(recording(2), id="after", headers={"Prefer": "wait=30"}).status_code == 201
        assert {hit["id"] for hit in service.found("anything")} == {"before", "after"}
        assert service.worker_pids() == workers
        engine = sa.create_engine(server.url(), poolclass=sa.NullPool)
        with engine.connect() as db:
            assert set(db.execute(sa.text("SELECT attempts FROM recordings")).scalars()) == {1}
        assert service.stop() == 0
        assert "hush" not in service.log()
        assert "unexpected error" not in service.log()


def test_a_database_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """Whoever sets a service up sees where it looked, and never the password."""
    nowhere = "postgresql://me:hush-hush@127.0.0.1:9/clasp"
    for command in (["keys", "list"], ["serve", "--help"]):
        done = clasp(*command, cwd=tmp_path, database_url=nowhere, program=STAND_IN)
        assert "hush" not in done.stdout + done.stderr
        if command[0] == "keys":
            assert done.returncode == 1
            assert done.stderr.startswith("clasp: ")
            assert done.stderr.count("\n") == 1, done.stderr
            assert "127.0.0.1/clasp" in done.stderr
