"""Recordings that a client names by URL, fetched without lending it our place in the network.

Nothing is fetched unless the operator lists hosts. Every hop, the first and each redirect, must be https, of
a listed host and port, and resolve to public addresses only. The name is resolved once, and the connection
goes to what was checked: a second answer of the name server cannot lead it elsewhere. TLS still asks for the
name. docs/security.md has the threats.

httpcore and not httpx: it follows no redirects, keeps no cookies, reads no environment and no netrc, decodes
nothing, and lets us say where a connection goes.
"""

import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from socket import SOCK_STREAM

import anyio
import httpcore
import httpx
import structlog

from app.errors import HttpError
from clasp_core.errors import InvalidField
from clasp_core.types import Seconds

AT_ONCE = 8
"""Downloads that run at the same time; whoever wants one more is told to come again."""
MAX_REDIRECTS = 3
IDLE_S: Seconds = 10.0
"""How long the far side may take to accept a connection, and between two pieces of its answer."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_ASKED = [("Accept", "*/*"), ("Accept-Encoding", "identity"), ("User-Agent", "clasp-search")]
# A last label that begins with a digit makes the whole an IPv4 address to some resolvers (`2130706433`,
# `0x7f.1`); no top-level domain does. IPv6 addresses have colons.
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z)({_LABEL}\.)*(?![0-9]){_LABEL}")

# Public in the registries, or called so by Python before 3.13, and yet not the internet:
_NOT_PUBLIC_V4 = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments: anycast addresses that the next router answers
    IPv4Network("192.88.99.0/24"),  # relays into 6to4
    IPv4Network("168.63.129.16/32"),  # Azure's host, to its guests
)
_GLOBAL_V6 = IPv6Network("2000::/3")
"""All that was ever given out as global unicast; what wraps IPv4 addresses lies outside, or stands below."""
_NOT_PUBLIC_V6 = (
    IPv6Network("2001::/23"),  # protocol assignments, Teredo among them
    IPv6Network("2001:db8::/32"),  # documentation
    IPv6Network("2002::/16"),  # 6to4
    IPv6Network("3fff::/20"),  # documentation
)
_NAT64 = IPv6Network("64:ff9b::/96")

_log = structlog.get_logger()


def is_public(address: str) -> bool:
    """Whether an address, as text, is a host's on the internet: not ours, our network's or nobody's."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv4Address):
        return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_PUBLIC_V4)
    if ip in _NAT64:  # what a resolver of an IPv6-only network makes of every IPv4 address
        return is_public(str(IPv4Address(int(ip) & 0xFFFFFFFF)))
    return (
        ip.scope_id is None
        and ip.is_global
        and ip in _GLOBAL_V6
        and not any(ip in network for network in _NOT_PUBLIC_V6)
    )


async def resolve(name: str) -> list[str]:
    """The addresses that the system's resolver knows for a name; OSError where it knows none."""
    found = await anyio.getaddrinfo(name, None, type=SOCK_STREAM)
    return list(dict.fromkeys(address[0] for *_, address in found))


class Fetcher:
    """Fetches from listed hosts. One for a service, which it keeps from doing too much of it at once."""

    def __init__(
        self,
        hosts: Iterable[str],
        timeout_s: Seconds,
        *,
        resolve: Callable[[str], Awaitable[Sequence[str]]] = resolve,
        is_allowed: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
        idle_s: Seconds = IDLE_S,
    ) -> None:
        """`hosts` as in the setting `url_hosts`; `timeout_s` is for all from the name to the last byte.
        The rest is for tests, whose servers are on no public address; no setting leads to it."""
        self._hosts = [(name, int(port or 443)) for name, _, port in (host.partition(":") for host in hosts)]
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._is_allowed = is_allowed
        self._tls = tls
        self._timeouts = dict.fromkeys(("connect", "read", "write", "pool"), idle_s)
        self._active = 0

    def require_on(self) -> None:
        """HttpError `url_not_allowed` where no host is listed, whatever is asked for."""
        if not self._hosts:
            raise HttpError("url_not_allowed", "This service fetches no URLs; send the recording itself.")

    @asynccontextmanager
    async def fetch(self, url: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes that the URL answers, as they come; the connection ends with the block.

        Raises HttpError: `url_not_allowed`, `url_failed`, `url_timeout`, `not_ready`; InvalidField for what
        is no URL. They tell of the far side its status and no more; of names and addresses, nothing.
        """
        self.require_on()
        if self._active >= AT_ONCE:
            raise HttpError("not_ready", f"{AT_ONCE} URLs are being fetched already; try again in a moment.")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            raise InvalidField("url is not a URL.") from None
        self._active += 1
        try:
            with anyio.fail_after(self._timeout_s):
                async with self._answer(parsed) as response:
                    yield response.aiter_stream()
        except (TimeoutError, httpcore.TimeoutException):
            raise HttpError("url_timeout", "The URL's host took too long.") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError) as error:
            _log.info("a URL could not be fetched", host=parsed.raw_host.decode("ascii"), reason=str(error))
            raise HttpError(
                "url_failed",
                "The URL's host could not be reached, has no valid certificate, or broke off.",
            ) from None
        finally:
            self._active -= 1

    @asynccontextmanager
    async def _answer(self, url: httpx.URL) -> AsyncIterator[httpcore.Response]:
        if self._tls is None:
            self._tls = httpx.create_ssl_context(trust_env=False)
        for hop in range(MAX_REDIRECTS + 1):
            addresses = await self._checked(url, "A redirect of the URL" if hop else "The URL")
            to = httpcore.URL(scheme=b"https", host=url.raw_host, port=url.port or 443, target=url.raw_path)
            async with (
                httpcore.AsyncConnectionPool(self._tls, network_backend=_Pinned(addresses)) as connection,
                connection.stream(
                    "GET", to, headers=_ASKED, extensions={"timeout": self._timeouts}
                ) as response,
            ):
                if response.status not in _REDIRECTS:
                    _require_whole_recording(response)
                    yield response
                    return
                url = _target(url, response)
        raise HttpError("url_failed", f"The URL redirects more than {MAX_REDIRECTS} times.")

    async def _checked(self, url: httpx.URL, what: str) -> list[str]:
        """The addresses to connect to, if the URL may be fetched; else HttpError `url_not_allowed`."""
        host, port = url.raw_host.decode("ascii"), url.port or 443
        if url.scheme != "https":
            raise HttpError("url_not_allowed", f"{what} is not https.")
        if url.userinfo:
            raise HttpError("url_not_allowed", f"{what} names a user.")
        if not _NAME.fullmatch(host) or not self._is_listed(host, port):
            raise HttpError("url_not_allowed", f"{what} is of a host or port that is not allowed here.")
        try:
            addresses = list(await self._resolve(host))
        except (OSError, UnicodeError):
            addresses = []
        # One answer for both: a name of our own network is not told from one that does not exist.
        if not addresses or not all(map(self._is_allowed, addresses)):
            _log.info("a URL was refused", host=host, addresses=addresses)
            raise HttpError("url_not_allowed", f"{what} is of a host that has no public address.")
        return addresses

    def _is_listed(self, host: str, port: int) -> bool:
        return any(
            port == listed_port
            and (name in ("*", host) or (name.startswith("*.") and host.endswith(name.removeprefix("*"))))
            for name, listed_port in self._hosts
        )


def _target(url: httpx.URL, response: httpcore.Response) -> httpx.URL:
    try:
        return url.join(_headers(response)["location"])
    except (KeyError, ValueError, httpx.InvalidURL):  # ValueError: the standard library joins the two
        raise _answered(response) from None


def _require_whole_recording(response: httpcore.Response) -> None:
    """HttpError `url_failed` for what is no recording, or may end early without our noticing."""
    headers = _headers(response)
    if response.status != 200:
        raise _answered(response)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(
            "url_failed", "The URL's host sends the recording in an encoding that was not asked for."
        )
    if not {"content-length", "transfer-encoding"} & headers.keys():
        raise HttpError("url_failed", "The URL's host does not say where the recording ends.")


def _answered(response: httpcore.Response) -> HttpError:
    return HttpError("url_failed", f"The URL's host answered {response.status}.")


def _headers(response: httpcore.Response) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to the addresses that were checked, whatever the name says by now."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        *others, last = self._addresses
        for address in others:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                pass
        return await self._network.connect_tcp(last, port, timeout, local_address, socket_options)
