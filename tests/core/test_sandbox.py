"""The sandbox: the same samples and errors as `audio.decode`, and no harm from a decoder turned evil."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from clasp_core import audio, sandbox
from clasp_core.errors import AudioTooLong, InvalidAudio, NonFiniteAudio, UndecodableAudio
from tests import audio_files
from tests.audio_files import encode, tone

ROOT = Path(__file__).parents[2]
HOSTILE = audio_files.hostile()


@pytest.fixture(scope="module", autouse=True)
def no_zygote_left() -> Iterator[None]:
    yield
    sandbox.stop()


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Replaces the decoder inside the sandbox by the body of a generator function of `file`."""

    def use(body: str) -> None:
        lines = "\n    ".join(body.strip().splitlines())
        program = (
            "import os, signal, socket, sys, time, numpy as np\n"
            "from clasp_core import audio, errors, sandbox\n"
            f"def evil(file):\n    {lines}\n    yield np.zeros(1, np.float32)\n"
            "sandbox._warm_up()\n"
            "audio.decode = lambda file, **_: audio.AudioStream(evil(file))\n"
            "sandbox._warm_up = lambda: None\n"
            "sandbox._main()\n"
        )
        monkeypatch.setattr(sandbox, "_zygote", sandbox._Zygote(("-c", program)))

    sandbox.stop()
    yield use
    sandbox.stop()


def wav_file(seconds: float = 1.0) -> io.BytesIO:
    return io.BytesIO(encode(tone(seconds), 16_000))


def children_of(process: int) -> set[int]:
    """The living children; zombies are dead."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == process and state != "Z":
                found.add(int(stat.parent.name))
    return found


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("form", audio_files.FORMATS)
def test_the_samples_are_those_of_audio_decode(form: str) -> None:
    """The sandbox may cost time, never sound; and no decoder may need what it has been denied."""
    file = io.BytesIO(encode(tone(12.0, 48_000, 2), 48_000, form))
    for rate in (16_000, 22_050):
        inside = sandbox.decode(file, max_duration_s=60, sampling_rate=rate)
        here = audio.decode(file, max_duration_s=60, sampling_rate=rate)
        for ours, theirs in zip(inside, here, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.flags.writeable
        assert inside.info == here.info


@pytest.mark.parametrize("name", HOSTILE)
def test_refusals_are_those_of_audio_decode(name: str) -> None:
    """The uploader must get the same class and sentence, whether or not there was a process between."""
    file, _ = HOSTILE[name]
    answers = []
    for decode in (audio.decode, sandbox.decode):
        with pytest.raises(InvalidAudio) as refusal:
            list(decode(io.BytesIO(file), max_duration_s=60))
        answers.append((type(refusal.value), refusal.value.detail))
    assert answers[0] == answers[1]


def test_paths_and_open_files_are_taken(tmp_path: Path) -> None:
    """Spooled uploads, stored files and bytes in memory all come through the same door."""
    path = tmp_path / "x.raw"
    path.write_bytes(wav_file().getvalue())
    with path.open("rb") as opened, path.open("r+b") as writable:
        for file in (path, str(path), opened, writable, wav_file()):
            assert sum(map(len, sandbox.decode(file, max_duration_s=9))) == 16_000


def test_a_missing_file_is_the_callers_mistake(tmp_path: Path) -> None:
    """As in `audio.decode`: no upload is to blame."""
    with pytest.raises(FileNotFoundError):
        list(sandbox.decode(tmp_path / "nothing.wav", max_duration_s=1))


def test_nine_hours_in_four_megabytes_fit_in_little_memory() -> None:
    """A decompression bomb must meet the duration limit before the memory limit."""
    file = io.BytesIO(audio_files.silent_opus(9))
    with pytest.raises(AudioTooLong):
        list(sandbox.decode(file, max_duration_s=300, memory_bytes=64 << 20))


@pytest.mark.parametrize(
    "body",
    [
        "os.kill(os.getpid(), signal.SIGSEGV)",
        "os.abort()",
        "os._exit(0)",
        "raise RuntimeError",
        "bytearray(3 << 30)",
        "os.write(4, b'A')",
        "os.write(4, b'X' * 100)",
        "os.write(4, b'A' + b'\\xff' * 100)",
        "os.write(4, b'A' + bytes(100))",
        "os.write(4, b'Z\\0\\0\\0\\2{}')",
        "os.write(4, b'Z\\0\\0\\1\\0' + b'[' * 256)",
        'os.write(4, b\'E\\0\\0\\0\\x23\' + b\'{"code":"not_ready","detail":"boo"}\')',
    ],
)
def test_a_broken_decoder_is_an_undecodable_file(decoder: Callable[[str], None], body: str) -> None:
    """Crash, exhaustion or nonsense: the service lives on, and blames the file."""
    decoder(body)
    with pytest.raises(UndecodableAudio, match="broke the decoder"):
        list(sandbox.decode(wav_file(), max_duration_s=9))
    assert sandbox._zygote is not None
    assert alive(sandbox._zygote.pid)


@pytest.mark.parametrize("body", ["time.sleep(600)", "while True: pass"])
def test_a_hanging_decoder_is_ended(decoder: Callable[[str], None], body: str) -> None:
    """A decoder in a loop would otherwise hold a worker for ever."""
    decoder(body)
    assert sandbox._zygote is not None
    with pytest.raises(UndecodableAudio, match="too long"):
        list(sandbox.decode(wav_file(), max_duration_s=9, deadline_s=0.3))
    zygote = sandbox._zygote.pid
    assert eventually(lambda: not children_of(zygote))


def test_a_decoder_that_takes_over_is_not_believed(decoder: Callable[[str], None]) -> None:
    """Limits that only the child kept would be kept by its leave."""
    decoder("while True: yield np.ones(160_000, np.float32)")
    with pytest.raises(AudioTooLong):
        list(sandbox.decode(wav_file(), max_duration_s=30))


def test_nan_from_a_decoder_is_not_believed(decoder: Callable[[str], None]) -> None:
    """A NaN that reaches the index makes every search wrong."""
    decoder("yield np.full(100, np.nan, np.float32)")
    with pytest.raises(NonFiniteAudio):
        list(sandbox.decode(wav_file(), max_duration_s=30))


def test_a_decoder_can_touch_nothing(decoder: Callable[[str], None], tmp_path: Path) -> None:
    """Whoever takes over a decoder must find no file and no network, and must not alter the upload."""
    target = tmp_path / "target"
    target.write_bytes(wav_file().getvalue())
    decoder(f"""
tries = {{
    "read": lambda: open("/etc/hostname"),
    "create": lambda: open({str(tmp_path / "new")!r}, "w"),
    "write": lambda: os.write(3, b"spoilt"),
    "connect": lambda: socket.socket(),
    "list": lambda: os.listdir("/"),
    "pipe": os.pipe,
    "dup": lambda: os.dup(3),
    "fork": lambda: os.fork() or os._exit(0),
}}
done = []
for name, attempt in tries.items():
    try:
        attempt()
        done.append(name)
    except (OSError, LookupError):
        pass
raise errors.UndecodableAudio("did: " + " ".join(done))
""")
    with target.open("r+b") as file, pytest.raises(UndecodableAudio) as answer:
        list(sandbox.decode(file, max_duration_s=9))
    assert answer.value.detail == "did: "
    assert target.read_bytes() == wav_file().getvalue()


def test_the_zygote_does_not_inherit_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's environment holds passwords; a decoder has no use for them."""
    monkeypatch.setenv("CLASP_SECRET", "hunter2")
    sandbox.stop()
    list(sandbox.decode(wav_file(), max_duration_s=9))
    assert sandbox._zygote is not None
    assert b"hunter2" not in Path(f"/proc/{sandbox._zygote.pid}/environ").read_bytes()


def test_the_deadline_spares_the_callers_own_time() -> None:
    """Embedding between two blocks may take long, and is no fault of the file."""
    stream = sandbox.decode(wav_file(60.0), max_duration_s=100, deadline_s=1.0)
    for i, _ in enumerate(stream):
        if i < 2:
            time.sleep(0.7)
    assert stream.info.duration_s == 60


def test_memory_is_bounded_by_the_pipe() -> None:
    """A slow consumer must slow the decoder down, not have samples pile up."""
    with sandbox.decode(wav_file(600.0), max_duration_s=700) as stream:
        next(stream)
        assert sandbox._zygote is not None
        (child,) = children_of(sandbox._zygote.pid)
        assert eventually(
            lambda: "S" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        )
        assert sum(map(len, stream)) == 590 * 16_000


@pytest.mark.parametrize("how", ["close", "drop"])
def test_an_abandoned_stream_ends_its_process(how: str) -> None:
    """Cancelled requests must not leave decoders behind."""
    stream = sandbox.decode(wav_file(600.0), max_duration_s=700)
    next(stream)
    assert sandbox._zygote is not None
    zygote = sandbox._zygote.pid
    assert len(children_of(zygote)) == 1
    if how == "close":
        stream.close()
    del stream
    assert eventually(lambda: not children_of(zygote))


def test_no_descriptors_are_leaked() -> None:
    """A service that runs for months decodes millions of files."""
    list(sandbox.decode(wav_file(), max_duration_s=9))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for file in (wav_file().getvalue(), b"junk", HOSTILE["nan"][0]):
        with contextlib.suppress(InvalidAudio):
            list(sandbox.decode(io.BytesIO(file), max_duration_s=9))
    stream = sandbox.decode(wav_file(60.0), max_duration_s=99)
    next(stream)
    stream.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_threads_decode_at_once() -> None:
    """Each worker thread must get its own recording, also when all start the first zygote together."""
    sandbox.stop()
    wrong: list[int] = []
    start = threading.Barrier(6)

    def work(number: int) -> None:
        expected = tone(12.0, frequency=200.0 + 100 * number)[:, 0]
        file = encode(expected, 16_000, "wav-float")
        start.wait()
        for _ in range(3):
            samples = np.concatenate(list(sandbox.decode(io.BytesIO(file), max_duration_s=20)))
            if not np.array_equal(samples, expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


def test_a_dead_zygote_is_replaced() -> None:
    """The out-of-memory killer may pick the zygote; the next upload must not notice."""
    list(sandbox.decode(wav_file(), max_duration_s=9))
    assert sandbox._zygote is not None
    first = sandbox._zygote.pid
    os.kill(first, signal.SIGKILL)
    assert eventually(lambda: not alive(first))
    assert sum(map(len, sandbox.decode(wav_file(), max_duration_s=9))) == 16_000
    assert sandbox._zygote.pid != first


def test_stopping_ends_streams_under_way() -> None:
    """Shutdown must not wait for a three-hour file."""
    stream = sandbox.decode(wav_file(600.0), max_duration_s=700)
    next(stream)
    sandbox.stop()
    with pytest.raises(UndecodableAudio):
        list(stream)


PARENT = """
import sys, time
from clasp_core import sandbox
stream = sandbox.decode(sys.argv[1], max_duration_s=700)
next(stream)
print(sandbox._zygote.pid, flush=True)
time.sleep(600)
"""


def test_nothing_outlives_a_killed_parent(tmp_path: Path) -> None:
    """After kill -9 of the service no helper may linger with the user's file open."""
    path = tmp_path / "long.wav"
    path.write_bytes(wav_file(600.0).getvalue())
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, path], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        zygote = int(parent.stdout.readline())
        (child,) = children_of(zygote)
        parent.kill()
    assert eventually(lambda: not alive(zygote) and not alive(child))


FORKING = """
import os, sys
from clasp_core import sandbox
decode = lambda: sum(map(len, sandbox.decode(sys.argv[1], max_duration_s=9)))
first = decode(), sandbox._zygote.pid
child = os.fork()
if not child:
    assert sandbox._zygote is None
    second = decode(), sandbox._zygote.pid
    sandbox.stop()
    os._exit(0 if second[0] == first[0] and second[1] != first[1] else 1)
assert os.waitpid(child, 0)[1] == 0
assert (decode(), sandbox._zygote.pid) == first
"""


def test_a_forked_service_gets_its_own_zygote(tmp_path: Path) -> None:
    """Two processes talking to one zygote would receive each other's answers."""
    path = tmp_path / "x.wav"
    path.write_bytes(wav_file().getvalue())
    subprocess.run([sys.executable, "-W", "error", "-c", FORKING, path], check=True, cwd=ROOT)
