"""Real Milvus for tests: milvus-lite's server, and the server proper of the `milvus` package."""

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest

IN_MEMORY = pytest.mark.skipif(
    os.environ.get("CLASP_TEST_VECTOR_STORE") == "milvus",
    reason="it is about the index in the service's own memory",
)


@cache
def lite_server() -> str:
    """The URI of a milvus-lite server, which lives as long as this process. Several may talk to it."""
    folder = Path(tempfile.mkdtemp(prefix="milvus-lite-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return start_lite(folder, free_port())[0]


def start_lite(folder: Path, port: int) -> tuple[str, "subprocess.Popen[bytes]"]:
    """The URI and the process of a milvus-lite server on what is in that folder."""
    code = "import sys; from milvus_lite.cmdline import main; sys.exit(main())"
    address = ["--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "server", *address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(process.kill)
    wait_for(port, process, within_s=60)
    return f"http://127.0.0.1:{port}", process


@cache
def whole_server() -> str:
    """The URI of a Milvus server proper, which lives as long as this process. Skips the test where its
    package is not installed. It takes etcd's ports, so there is one at a time on a machine."""
    program = Path(sys.executable).with_name("milvus-server")
    if not program.exists():
        pytest.skip("the package milvus, which has a server for Linux on x86-64, is not installed")
    folder = tempfile.mkdtemp(prefix="milvus-server-")
    port = free_port()
    process = subprocess.Popen(
        [program, "--data", folder, "--proxy-port", str(port)],
        env=os.environ | {"QUERYNODE_SEGCORE_INTERIMINDEX_ENABLEINDEX": "false"},  # docs/operations.md
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def stop() -> None:
        os.killpg(process.pid, signal.SIGKILL)  # the program leaves its server behind
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    wait_for(port, process, within_s=120)
    return f"http://127.0.0.1:{port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: "subprocess.Popen[bytes]", within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.1)
