"""The two clients: how a step of an operation is done, and nothing else of what is asked."""

import asyncio
import concurrent.futures
import functools
import inspect
import itertools
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args

import httpx

from clasp_client.answers import Record
from clasp_client.operations import (
    Ask,
    Operations,
    Pause,
    Reply,
    Steps,
    Upload,
    Uploaded,
    Work,
    as_json,
)
from clasp_client.retries import Retries
from clasp_client.transfers import Recording, Source
from clasp_client.version import VERSION

P = ParamSpec("P")
T = TypeVar("T")
DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 10.0


def _like(operation: Callable[..., Any], method: Callable[..., Any]) -> None:
    """Give a client's method the operation's name, documentation and parameters, and the type it ends
    with."""
    functools.update_wrapper(method, operation)
    signature = inspect.signature(operation)
    result = get_args(signature.return_annotation)[-1]
    method.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
    method.__annotations__ = operation.__annotations__ | {"return": result}


def _now(
    operation: Callable[Concatenate[Operations, P], Steps[T]],
) -> Callable[Concatenate["Client", P], T]:
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(operation(self._operations, *args, **kwargs))

    _like(operation, method)
    return method


def _awaited(
    operation: Callable[Concatenate[Operations, P], Steps[T]],
) -> Callable[Concatenate["AsyncClient", P], Awaitable[T]]:
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(operation(self._operations, *args, **kwargs))

    _like(operation, method)
    return method


class _Settings:
    """What both have in common."""

    def __init__(
        self, base_url: str | None, api_key: str | None, timeout: float, retries: Retries | None
    ) -> None:
        self._base_url = (base_url or os.environ.get("CLASP_URL") or DEFAULT_URL).rstrip("/")
        self._operations = Operations(retries or Retries())
        key = api_key or os.environ.get("CLASP_API_KEY")
        self._options: dict[str, Any] = {
            "base_url": self._base_url,
            "timeout": httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_S)),
            "headers": {
                "User-Agent": f"clasp-search-client/{VERSION} httpx/{httpx.__version__}",
                "Accept": "application/json",
                **({"Authorization": f"Bearer {key}"} if key else {}),
            },
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({httpx.URL(self._base_url)!r})"

    def url(self, path: str) -> str:
        """The whole address of a path in an answer, such as `hit.links.content`."""
        return f"{self._base_url}{path}"

    @staticmethod
    def _request(ask: Ask) -> dict[str, Any]:
        """`httpx.Client.stream`'s arguments, but for a body that is streamed."""
        headers = dict(ask.headers)
        request: dict[str, Any] = {"method": ask.method, "url": ask.path, "headers": headers}
        request["params"] = {name: value for name, value in ask.params.items() if value is not None}
        if ask.sink is not None:
            headers |= ask.sink.headers()
        if ask.source is not None:
            headers["Content-Type"] = ask.source.content_type
            if ask.source.length is not None:
                headers["Content-Length"] = str(ask.source.length)
        elif ask.json is not None:
            headers.setdefault("Content-Type", "application/json")
            request["content"] = as_json(ask.json)
        return request


class Client(_Settings):
    """Speaks to a clasp-search service. Threads may share it; use it as a context manager, or `close` it.

        with Client("http://127.0.0.1:8000") as clasp:
            clasp.upload("bees.opus", lang="en", wait=60)
            for hit in clasp.search("زنبورها در زمستان").hits: ...

    Its methods raise `ClaspError`s (`clasp_client.errors` has the tree).
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: Retries | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`base_url` is by default `CLASP_URL` of the environment, or http://127.0.0.1:8000; `api_key` is
        `CLASP_API_KEY`, or none. `timeout` is how many seconds may pass without a byte, sent or received; how
        long an upload takes has no limit. `verify` and `transport` are httpx's."""
        super().__init__(base_url, api_key, timeout, retries)
        self._http = httpx.Client(**self._options, verify=verify, transport=transport)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    upload = _now(Operations.upload)
    upload_url = _now(Operations.upload_url)
    wait_until_ready = _now(Operations.wait_until_ready)
    get = _now(Operations.get)
    page = _now(Operations.page)
    update = _now(Operations.update)
    delete = _now(Operations.delete)
    delete_matching = _now(Operations.delete_matching)
    content = _now(Operations.content)
    waveform = _now(Operations.waveform)
    collections = _now(Operations.collections)
    search = _now(Operations.search)
    search_many = _now(Operations.search_many)
    search_audio = _now(Operations.search_audio)
    like = _now(Operations.like)
    health = _now(Operations.health)
    ready = _now(Operations.ready)

    def list(
        self,
        *,
        collection: str | None = None,
        status: str | None = None,
        filter: Mapping[str, Any] | None = None,
        page_size: int = 100,
    ) -> Iterator[Record]:
        """All records that match, newest first, fetched a page at a time."""
        cursor: str | None = None
        while True:
            page = self.page(
                collection=collection, status=status, filter=filter, limit=page_size, cursor=cursor
            )
            yield from page.items
            if (cursor := page.next_cursor) is None:
                return

    def upload_many(
        self, uploads: Iterable[Upload | Recording], *, at_once: int = 4, wait: float | None = None
    ) -> Iterator[Uploaded]:
        """Upload any number of recordings, `at_once` at a time; yields what became of each as soon as it is
        known, and goes on past failures. `uploads` is read as they are sent. `wait` as of `upload`."""
        waiting = map(_as_upload, uploads)
        with concurrent.futures.ThreadPoolExecutor(at_once, "clasp-upload") as threads:

            def begun(upload: Upload) -> concurrent.futures.Future[Uploaded]:
                return threads.submit(self._run, self._operations.upload_one_of_many(upload, wait))

            under_way = {begun(upload) for upload in itertools.islice(waiting, at_once)}
            try:
                while under_way:
                    done, under_way = concurrent.futures.wait(
                        under_way, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    under_way |= {begun(upload) for upload in itertools.islice(waiting, len(done))}
                    for future in done:
                        yield future.result()
            finally:
                for future in under_way:
                    future.cancel()

    # --- a step

    def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    reply = self._take(step)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(reply)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    def _take(self, step: Ask | Pause | Work) -> Reply | None:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
        elif isinstance(step, Work):
            step.do()
        else:
            return self._answer(step)
        return None

    def _answer(self, ask: Ask) -> Reply:
        request = self._request(ask)
        try:
            if ask.source is not None:
                request["content"] = _pieces(ask.source)
            with self._http.stream(**request) as response:
                status, headers = response.status_code, response.headers
                if ask.sink is None or not response.is_success:
                    return Reply(status, headers, response.read())
                ask.sink.begin(status, headers)
                # piece by piece as they come: what httpx collected would be lost when the connection breaks
                for piece in response.iter_raw():
                    ask.sink.write(piece)
                    ask.sink.passed()
                return Reply(status, headers)
        finally:
            if ask.source is not None:
                ask.source.close()


class AsyncClient(_Settings):
    """`Client` for asyncio: the same methods, awaited; `list` and `upload_many` are asynchronous iterators.

    async with AsyncClient() as clasp:
        answer = await clasp.search("bees in winter")
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: Retries | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """As `Client`'s."""
        super().__init__(base_url, api_key, timeout, retries)
        self._http = httpx.AsyncClient(**self._options, verify=verify, transport=transport)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    upload = _awaited(Operations.upload)
    upload_url = _awaited(Operations.upload_url)
    wait_until_ready = _awaited(Operations.wait_until_ready)
    get = _awaited(Operations.get)
    page = _awaited(Operations.page)
    update = _awaited(Operations.update)
    delete = _awaited(Operations.delete)
    delete_matching = _awaited(Operations.delete_matching)
    content = _awaited(Operations.content)
    waveform = _awaited(Operations.waveform)
    collections = _awaited(Operations.collections)
    search = _awaited(Operations.search)
    search_many = _awaited(Operations.search_many)
    search_audio = _awaited(Operations.search_audio)
    like = _awaited(Operations.like)
    health = _awaited(Operations.health)
    ready = _awaited(Operations.ready)

    async def list(
        self,
        *,
        collection: str | None = None,
        status: str | None = None,
        filter: Mapping[str, Any] | None = None,
        page_size: int = 100,
    ) -> AsyncIterator[Record]:
        """All records that match, newest first, fetched a page at a time."""
        cursor: str | None = None
        while True:
            page = await self.page(
                collection=collection, status=status, filter=filter, limit=page_size, cursor=cursor
            )
            for record in page.items:
                yield record
            if (cursor := page.next_cursor) is None:
                return

    async def upload_many(
        self, uploads: Iterable[Upload | Recording], *, at_once: int = 4, wait: float | None = None
    ) -> AsyncIterator[Uploaded]:
        """Upload any number of recordings, `at_once` at a time; yields what became of each as soon as it is
        known, and goes on past failures. `uploads` is read as they are sent. `wait` as of `upload`."""
        waiting = map(_as_upload, uploads)

        def begun(upload: Upload) -> asyncio.Task[Uploaded]:
            return asyncio.create_task(self._run(self._operations.upload_one_of_many(upload, wait)))

        under_way = {begun(upload) for upload in itertools.islice(waiting, at_once)}
        try:
            while under_way:
                done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                under_way |= {begun(upload) for upload in itertools.islice(waiting, len(done))}
                for task in done:
                    yield task.result()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    # --- a step

    async def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    reply = await self._take(step)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(reply)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    async def _take(self, step: Ask | Pause | Work) -> Reply | None:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
        elif isinstance(step, Work):
            await asyncio.to_thread(step.do)
        else:
            return await self._answer(step)
        return None

    async def _answer(self, ask: Ask) -> Reply:
        request = self._request(ask)
        try:
            if ask.source is not None:
                request["content"] = _pieces_later(ask.source)
            async with self._http.stream(**request) as response:
                status, headers = response.status_code, response.headers
                if ask.sink is None or not response.is_success:
                    return Reply(status, headers, await response.aread())
                ask.sink.begin(status, headers)
                async for piece in response.aiter_raw():
                    await asyncio.to_thread(ask.sink.write, piece)
                    ask.sink.passed()
                return Reply(status, headers)
        finally:
            if ask.source is not None:
                ask.source.close()


def _as_upload(given: Upload | Recording) -> Upload:
    return given if isinstance(given, Upload) else Upload(given)


def _pieces(source: Source) -> Iterator[bytes]:
    for piece in source.pieces():
        yield piece
        source.passed(piece)


async def _pieces_later(source: Source) -> AsyncIterator[bytes]:
    pieces = source.pieces()
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
        source.passed(piece)
