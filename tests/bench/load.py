"""Clients of an HTTP service, as a process of their own: `ask` sends questions and times the answers.

In a closed loop every connection asks again as soon as it is answered: what comes of it is throughput. In an
open one questions arrive by a Poisson process of a fixed rate, whether earlier ones are answered or not, and
wait for a free connection; what counts as latency is the time from the arrival that was due, so a service
that stalls cannot hide it by not being asked (Gil Tene's "coordinated omission").
"""

import asyncio
import json
import random
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle

import httptools
import numpy as np
import uvloop

from tests.bench.measuring import ROOT

WARM_S = 0.3
"""What is answered in the first of it does not count."""
LEFT_S = 60.0
"""How long answers that are owed are waited for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What clients saw."""

    seconds: float
    latencies: list[float]
    """Seconds, of every question that was answered in this time (closed loop) or was due in it (open)."""
    client_cpu: float
    """Processor time that asking took, as a share of one core."""

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        """Milliseconds."""
        return 1000 * float(np.percentile(self.latencies, percent))


def ask(
    port: int, requests: Sequence[bytes], *, clients: int, seconds: float, rate: float | None = None
) -> Asked:
    """Send the requests, over and over, by so many connections: each of them all the time, or `rate` a
    second in all. Raises RuntimeError where an answer is not 200, or does not come."""
    task = {
        "port": port,
        "requests": [request.decode("latin-1") for request in requests],
        "clients": clients,
        "seconds": seconds,
        "rate": rate,
    }
    command = [sys.executable, "-m", "tests.bench.load"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Asked(**json.loads(done.stdout))


class _Client(asyncio.Protocol):
    """One connection, with one request at a time on it."""

    def __init__(self, load: "_Load") -> None:
        self._load = load
        self._due = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self._parser = httptools.HttpResponseParser(self)

    def send(self, request: bytes, due: float) -> None:
        self._due = due
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() != 200:
            self._load.fail(f"answered {self._parser.get_status_code()}")
        else:
            self._load.answered(self, self._due)

    def connection_lost(self, error: Exception | None) -> None:
        self._load.fail(f"connection lost: {error}")


class _Load:
    def __init__(self, requests: Iterator[bytes], seconds: float, rate: float | None) -> None:
        self._requests = requests
        self._seconds = seconds
        self._rate = rate
        self._clients: list[_Client] = []
        self._free: deque[_Client] = deque()
        self._arrived: deque[float] = deque()
        """When those were due that no connection was free for."""
        self._owed = 0
        self.latencies: list[float] = []

    async def run(self, port: int, clients: int) -> float:
        """The processor's seconds that it took."""
        loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = loop.create_future()
        for _ in range(clients):
            _, client = await loop.create_connection(lambda: _Client(self), "127.0.0.1", port)
            self._clients.append(client)
        began = time.perf_counter()
        self._from, self._until = began + WARM_S, began + WARM_S + self._seconds
        if self._rate is None:
            for client in self._clients:
                self._send(client, began)
        else:
            self._free.extend(self._clients)
            arriving = asyncio.create_task(self._arrive(self._rate))
        spent = _processor_time()
        await asyncio.sleep(self._until - time.perf_counter())
        if self._rate is not None:
            await arriving
        spent = _processor_time() - spent
        if self._owed and not self._over.done():
            await asyncio.wait_for(asyncio.shield(self._over), LEFT_S)
        if self._over.done():
            self._over.result()
        return spent

    async def _arrive(self, rate: float) -> None:
        chance = random.Random(0)
        due = time.perf_counter()
        while (due := due + chance.expovariate(rate)) < self._until:
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            if self._free:
                self._send(self._free.popleft(), due)
            else:
                self._arrived.append(due)

    def _send(self, client: _Client, due: float) -> None:
        self._owed += 1
        client.send(next(self._requests), due)

    def answered(self, client: _Client, due: float) -> None:
        now = time.perf_counter()
        self._owed -= 1
        if self._from <= (now if self._rate is None else due) < self._until:
            self.latencies.append(now - due)
        if self._rate is None and now < self._until:
            self._send(client, now)
        elif self._arrived:
            self._send(client, self._arrived.popleft())
        else:
            self._free.append(client)
            if not self._owed and now >= self._until and not self._over.done():
                self._over.set_result(None)

    def fail(self, what: str) -> None:
        if not self._over.done() and self._owed:
            self._over.set_exception(RuntimeError(what))


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    task = json.load(sys.stdin)
    requests = cycle([request.encode("latin-1") for request in task["requests"]])
    load = _Load(requests, task["seconds"], task["rate"])
    spent = uvloop.run(load.run(task["port"], task["clients"]))
    share = spent / (WARM_S + task["seconds"])
    print(json.dumps(asdict(Asked(task["seconds"], load.latencies, share))))


if __name__ == "__main__":
    main()
