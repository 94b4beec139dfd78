"""A service whose library outgrows one kind of index after the other, asked and changed all the while."""

import threading
from pathlib import Path

from tests.core.doubles import wav_bytes
from tests.milvus import IN_MEMORY
from tests.service import RunningService, eventually


def sound(number: int) -> bytes:
    """A tone that no other number has."""
    return wav_bytes(150.0 + 37 * number, 0.3)


def kind_of(service: RunningService) -> str:
    (kind,) = [kind for kind in ("flat", "half", "ivf") if service.metric("clasp_index_kind", kind=kind)]
    return kind


@IN_MEMORY
def test_a_library_grows_through_all_kinds_and_never_answers_wrongly(tmp_path: Path) -> None:
    """What was uploaded is its own best hit, what was deleted is none, in every kind of index and between
    them, and after a restart from the snapshot of the last. Nobody who asks can tell when they changed."""
    settings = {"flat_up_to": 8, "half_up_to": 20, "index_mmap": True, "recall_floor": 0.9}
    with RunningService(tmp_path, program="tests.stand_in", **settings) as service:
        service.start()
        there: set[int] = set()
        gone: set[int] = set()
        over = threading.Event()
        wrong: list[str] = []

        def check(number: int) -> None:
            """Of what is there and of what is gone: asked for before and after, or it was in between."""
            was_there, was_gone = number in there, number in gone
            ids = [hit["id"] for hit in service.found_by_sound(sound(number), limit=3)]
            if was_there and number in there and ids[:1] != [f"{number}"]:
                wrong.append(f"{number} is there, found: {ids}")
            if was_gone and f"{number}" in ids:
                wrong.append(f"{number} is gone, found: {ids}")

        def ask() -> None:
            turn = 0
            while not over.is_set():
                known = sorted(there | gone)
                if known:
                    check(known[turn * 7 % len(known)])
                turn += 1
                over.wait(0.1)

        asker = threading.Thread(target=ask)
        asker.start()
        for number in range(42):
            service.upload(sound(number), id=f"{number}", headers={"Prefer": "wait=30"}).raise_for_status()
            there.add(number)
            if number % 6 == 5:
                there.remove(number - 3)
                service.client.delete(f"/audio/{number - 3}").raise_for_status()
                gone.add(number - 3)
            if number in (5, 15, 35):
                wanted = {5: "flat", 15: "half", 35: "ivf"}[number]
                eventually(lambda wanted=wanted: kind_of(service) == wanted, within_s=20)
        over.set()
        asker.join()
        assert wrong == []
        assert 0.9 <= service.metric("clasp_index_recall") <= 1
        assert service.stop() == 0
        assert "the index is ivf now" in service.log()
        assert list((tmp_path / "index_data" / "index").glob("vectors-*-ivf.faiss"))
        service.start()
        assert kind_of(service) == "ivf"
        for number in sorted(there | gone)[::4]:
            check(number)
        assert wrong == []
        assert service.stop() == 0
