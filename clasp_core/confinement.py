"""What a process gives up before it reads a stranger's file: rights, network, descriptors, memory, time.

Owns the calls to the kernel; who is confined, and what such a process may still do, is its caller's affair
(`clasp_core.sandbox` decodes audio so, `clasp_core.checkpoints` reads pickles).
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000
_NOBODY = 65_534


def bare_environment() -> dict[str, str]:
    """The environment of a process to be confined: what imports need, and none of the service's secrets."""
    return {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def drop_rights() -> None:
    """Enter an empty network and become nobody, as far as the kernel and our rights allow."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _unshare(_CLONE_NEWNET)  # granted to root only, who must ask before stepping down
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # root's processes are exempt from RLIMIT_NPROC
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def die_with_parent() -> None:
    """Be killed when the parent ends. Ask after `drop_rights`: a change of user cancels the wish."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def limit(*, descriptors: int, memory_bytes: int, cpu_s: int, file_bytes: int = 0) -> None:
    """Bound this process for good. It can no longer start another, nor dump its memory.

    descriptors: one more than the highest number it may have open; where it has all of them, neither
        files nor sockets can be opened any more.
    memory_bytes: address space beyond what is mapped now.
    file_bytes: size up to which it may write files it has open.
    """
    memory = memory_bytes + _mapped_bytes()
    for what, most in (
        (resource.RLIMIT_NOFILE, descriptors),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (most, most))


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _unshare(what: int) -> None:
    with contextlib.suppress(AttributeError):  # not Linux
        ctypes.CDLL(None).unshare(what)


def _mapped_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return 1 << 30
