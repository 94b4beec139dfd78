"""Damage as those see it who start a service, or ask one: a line or an error that says what to do."""

from pathlib import Path

from tests.app.test_errors import check_problem
from tests.app.test_processes import recording, refuses_to_start
from tests.postgres import IN_A_FILE
from tests.service import RunningService


@IN_A_FILE
def test_a_damaged_catalogue_is_refused(tmp_path: Path) -> None:
    """Above all one that is empty or gone beside its recordings: a service that began anew there would sweep
    them away. The line says that there are backups."""
    stored = tmp_path / "index_data" / "audio" / "ab" / ("c" * 62)
    stored.parent.mkdir(parents=True)
    stored.write_bytes(b"a recording")
    catalog = tmp_path / "index_data" / "catalog.sqlite3"
    for content in (None, b"", b"This was a catalogue. " * 1000):
        if content is not None:
            catalog.write_bytes(content)
        refuses_to_start(tmp_path, catalog.name, "clasp restore", program="tests.stand_in")
    assert stored.read_bytes() == b"a recording"


def test_lost_bytes_are_an_error_and_come_back_with_the_next_upload(tmp_path: Path) -> None:
    """Half a recording under a 200 would be taken for all of it, and a 404 for a deletion."""
    content = recording(1)
    with RunningService(tmp_path, program="tests.stand_in") as service:
        service.start()
        service.ready(content, id="one")
        (stored,) = (tmp_path / "index_data" / "audio").glob("??/*")
        stored.write_bytes(content[:-1])
        check_problem(service.client.get("/audio/one/content"), 500, "data_damaged")
        stored.unlink()
        check_problem(service.client.get("/audio/one/content"), 500, "data_damaged")
        assert service.upload(content).json()["id"] == "one"
        assert service.client.get("/audio/one/content").content == content
        assert service.stop() == 0
