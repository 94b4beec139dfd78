"""The uploaded bytes as objects of an S3-compatible store: `<prefix>/ab/cdef...` by sha256.

Uploads arrive in a local file; `prepare` sends them to their final key before the catalogue's lock is taken,
and `place`, under the lock, only makes sure that they are still there. So no writer waits for a transfer, and
what a crash leaves is bytes of no recording, which every start sweeps: docs/decisions.md has the argument.

Credentials are found by boto3's own chain (environment, profile, instance) and never pass through here.
"""

import base64
import hashlib
import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

try:
    from boto3.exceptions import Boto3Error
    from boto3.s3.transfer import TransferConfig
    from boto3.session import Session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
except ModuleNotFoundError as missing:
    from clasp_core.errors import ExtraMissing

    raise ExtraMissing(
        f"An audio store in S3 needs the package {missing.name}, which is not installed:"
        " pip install 'clasp-search[s3]'."
    ) from missing

from clasp_core.durability import needing_room
from clasp_core.errors import DiskFull, StoreUnavailable
from clasp_core.faults import fault
from clasp_core.store import Displaced, Stored, Upload, damaged, discard_older, receive, stored_as
from clasp_core.types import Seconds

_log = logging.getLogger(__name__)

_PATIENT = Config(
    connect_timeout=5,
    read_timeout=20,
    retries={"mode": "standard", "total_max_attempts": 3},
    max_pool_connections=32,
    # stores that are not Amazon's may not know the checksums that are new; ours are asked for by name
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)
_QUICK = _PATIENT.merge(
    Config(connect_timeout=2, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 2})
)
"""For what is asked under the catalogue's lock, or once a second."""
_PARTS = TransferConfig(multipart_threshold=16 << 20, multipart_chunksize=8 << 20, max_concurrency=4)
_COPY_BYTES = 1 << 20
_FIRST_WINDOW, _LARGEST_WINDOW = 256 << 10, 64 << 20
_READ_TRIES = 3
_PAGE = 1000
_LISTED_AT_ONCE = 16
_REMOVED_AT_ONCE = 1000
"""What one request may name."""
_PARTS_KEPT_S: Seconds = 24 * 3600.0
"""After which an upload in parts that did not end is taken for abandoned. No client's clock is asked."""


class S3Store:
    """See `AudioStore`. Objects under the prefix that are not named like ours are never looked at."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        spool: Path,
        *,
        endpoint: str | None = None,
        min_free_bytes: int = 0,
    ) -> None:
        """`spool` is a folder of this machine for what is on its way, in which `min_free_bytes` are left by
        arrivals. Without an `endpoint`, AWS's own variables and files say where. Asks nobody yet."""
        for name in ("boto3", "botocore", "s3transfer", "urllib3"):  # they write signed requests at debug
            logging.getLogger(name).setLevel(logging.WARNING)
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._spool = spool
        self._min_free_bytes = min_free_bytes
        try:
            session = Session()
            self._client = session.client("s3", endpoint_url=endpoint, config=_PATIENT)
            self._quick = session.client("s3", endpoint_url=endpoint, config=_QUICK)
        except (
            BotoCoreError,
            ValueError,
        ) as error:  # a profile that does not exist, an endpoint that is none
            raise StoreUnavailable(f"The audio store cannot be used: {_reason(error)}.") from None

    # --- arriving

    def receive(self, *, to_keep: bool = True) -> Upload:
        with needing_room():
            self._spool.mkdir(parents=True, exist_ok=True)
        return receive(self._spool, self._min_free_bytes if to_keep else 0)

    def prepare(self, upload: Upload) -> None:
        """Send the bytes to their final key. The store checks what it receives by SHA-256: small ones by the
        one that was made when they arrived, others part by part."""
        named = {"Bucket": self._bucket, "Key": self._key(upload.sha256)}
        upload.named = True
        with _asking("put"):
            if upload.size_bytes < _PARTS.multipart_threshold:
                digest = base64.b64encode(bytes.fromhex(upload.sha256)).decode()
                with upload.path.open("rb") as file:
                    self._client.put_object(**named, Body=file, ChecksumSHA256=digest)
            else:
                self._client.upload_file(
                    str(upload.path),
                    *named.values(),
                    ExtraArgs={"ChecksumAlgorithm": "SHA256"},
                    Config=_PARTS,
                    Callback=lambda sent: fault("s3.sending"),
                )
        fault("s3.sent")

    def place(self, upload: Upload) -> None:
        try:
            found = self.find(upload.sha256)
        except FileNotFoundError as error:
            raise Displaced from error
        if found.size_bytes != upload.size_bytes:
            raise Displaced
        fault("s3.placed")

    # --- reading

    def find(self, sha256: str) -> Stored:
        key = self._key(sha256)
        try:
            with _asking("head"):
                head = self._quick.head_object(Bucket=self._bucket, Key=key)
        except FileNotFoundError:
            if (
                trouble := self.trouble()
            ) is not None:  # no bucket, say, which the answer to HEAD does not tell
                raise StoreUnavailable(trouble) from None
            raise
        size: int = head["ContentLength"]
        return Stored(size, head["LastModified"].timestamp(), lambda: self._reader(key, size))

    def open(self, sha256: str) -> BinaryIO:
        return self.find(sha256).open()

    @contextmanager
    def verified(self, sha256: str) -> Iterator[Path]:
        """A copy on this machine, under no name in any folder, so that a killed process leaves nothing. Also
        StoreUnavailable where there is no room for it."""
        with self._copy(sha256) as file:
            # each opening of this path has a position of its own, which a duplicated descriptor has not
            yield Path(f"/proc/self/fd/{file.fileno()}")

    def _copy(self, sha256: str) -> BinaryIO:
        with self.open(sha256) as stored, ExitStack() as undo:
            try:
                content = hashlib.sha256()
                with needing_room():
                    self._spool.mkdir(parents=True, exist_ok=True)
                    file = undo.enter_context(tempfile.TemporaryFile(dir=self._spool))
                while data := stored.read(_COPY_BYTES):
                    content.update(data)
                    with needing_room():
                        file.write(data)
                        file.flush()
                    fault("s3.fetching")
            except DiskFull as error:
                raise StoreUnavailable("This machine's disk has no room for a copy of it.") from error
            if content.hexdigest() != sha256:
                raise damaged()
            undo.pop_all()
            return file

    def where(self, sha256: str) -> str:
        return f"s3://{self._bucket}/{self._key(sha256)}"

    def _reader(self, key: str, size: int) -> BinaryIO:
        def get(start: int, end: int) -> Any:  # noqa: ANN401 - botocore has no types
            return self._client.get_object(Bucket=self._bucket, Key=key, Range=f"bytes={start}-{end - 1}")[
                "Body"
            ]

        return cast(BinaryIO, io.BufferedReader(_Object(get, size), 128 << 10))

    # --- keeping order

    def remove(self, *sha256s: str) -> None:
        names = iter(sha256s)
        while some := [{"Key": self._key(sha256)} for sha256 in islice(names, _REMOVED_AT_ONCE)]:
            with suppress(FileNotFoundError), _asking("delete"):
                if len(some) == 1:
                    self._quick.delete_object(Bucket=self._bucket, Key=some[0]["Key"])
                else:
                    wanted = {"Objects": some, "Quiet": True}
                    answer = self._quick.delete_objects(Bucket=self._bucket, Delete=wanted)
                    if errors := answer.get("Errors"):
                        raise ClientError({"Error": errors[0]}, "DeleteObjects")
            fault("s3.removed")

    def stored(self) -> Iterator[str]:
        """One request where there are up to a thousand; else many of them at a time, by what names begin
        with. What is listed is not all held at once."""
        client, last = self._client, ""
        with _asking("list"):
            page = client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=_PAGE)
        for item in page.get("Contents", ()):
            last = item["Key"]
            if (sha256 := self._sha256(last)) is not None:
                yield sha256
        if not page["IsTruncated"]:
            return

        def below(start: str) -> list[str]:
            found = []
            with _asking("list"):
                pages = client.get_paginator("list_objects_v2").paginate(
                    Bucket=self._bucket, Prefix=f"{self._prefix}{start}/", StartAfter=last
                )
                for page in pages:
                    found += [self._sha256(item["Key"]) for item in page.get("Contents", ())]
            return [sha256 for sha256 in found if sha256 is not None]

        starts = (
            start
            for start in map("{:02x}".format, range(256))
            if (first := f"{self._prefix}{start}/") > last or last.startswith(first)
        )
        with ThreadPoolExecutor(_LISTED_AT_ONCE, "list") as pool:
            while some := list(islice(starts, _LISTED_AT_ONCE)):
                for found in pool.map(below, some):
                    yield from found

    def discard_abandoned(self, older_than_s: Seconds = 3600.0) -> None:
        """Also the parts of uploads that a killed process had begun to send, after a day: until then it may
        be another one's that goes on. A store that does not let us is left to its own rules."""
        if self._spool.is_dir():
            discard_older(self._spool, older_than_s)
        try:
            with _asking("list parts"):
                pages = self._client.get_paginator("list_multipart_uploads").paginate(
                    Bucket=self._bucket, Prefix=self._prefix
                )
                for begun in (item for page in pages for item in page.get("Uploads", ())):
                    if time.time() - begun["Initiated"].timestamp() > max(older_than_s, _PARTS_KEPT_S):
                        self._client.abort_multipart_upload(
                            Bucket=self._bucket, Key=begun["Key"], UploadId=begun["UploadId"]
                        )
        except (StoreUnavailable, FileNotFoundError):
            _log.warning("parts of abandoned uploads stay in the audio store; let a lifecycle rule end them")

    def trouble(self) -> str | None:
        try:
            self._quick.head_bucket(Bucket=self._bucket)
        except (BotoCoreError, ClientError) as error:
            return f"The audio store cannot be reached, or refuses ({_reason(error)})."
        return None

    def _key(self, sha256: str) -> str:
        return self._prefix + stored_as(sha256)

    def _sha256(self, key: str) -> str | None:
        """Of an object by its key; None where it is none of ours."""
        start, _, rest = key.removeprefix(self._prefix).partition("/")
        ours = (len(start), len(rest)) == (2, 62) and not set(start + rest) - set("0123456789abcdef")
        return start + rest if ours else None


class _Object(io.RawIOBase):
    """An object as a file that can be read from any position, of which no more is asked for than is needed.

    It is fetched in ranges that grow while reading goes on, so that a short stretch costs little and a long
    one few requests; nobody who reads slowly holds one answer open for hours. What breaks off is taken up
    again.
    """

    def __init__(self, get: Callable[[int, int], Any], size: int) -> None:
        """`get` gives the body of the bytes from a position up to (not including) another."""
        super().__init__()
        self._get = get
        self._size = size
        self._at = 0
        self._body: Any = None
        self._until = 0
        self._window = _FIRST_WINDOW

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        if at != self._at:
            self._drop()
            self._at, self._window = at, _FIRST_WINDOW
        return at

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer, which has no type in 3.11
        if self._at >= self._size:
            return 0
        for left in reversed(range(_READ_TRIES)):
            try:
                with _asking("get"):
                    if self._body is None:
                        until = min(self._size, self._at + self._window)
                        self._body, self._until = self._get(self._at, until), until
                        self._window = min(4 * self._window, _LARGEST_WINDOW)
                    data: bytes = self._body.read(min(len(buffer), self._until - self._at))
                if data:
                    break
            except StoreUnavailable:
                if not left:
                    raise
            self._drop()
        else:
            raise _unavailable("cut short")
        buffer[: len(data)] = data
        self._at += len(data)
        if self._at == self._until:
            self._drop()
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            if self._at == self._until:
                with suppress(BotoCoreError):
                    body.read()  # to its end, which is here: so the connection serves the next request
            body.close()


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Raises FileNotFoundError where there is no such object, and StoreUnavailable for all other trouble."""
    try:
        yield
    except (BotoCoreError, Boto3Error, ClientError) as error:
        if (reason := _reason(error)) in ("NoSuchKey", "404", "NotFound"):
            raise FileNotFoundError("The audio store has no such object.") from None
        raise _unavailable(reason, what) from None


def _reason(error: Exception) -> str:
    """In one word. Messages have addresses in them, and more."""
    for cause in (error, error.__context__):  # boto3 wraps what it raises about an upload
        if isinstance(cause, ClientError):
            return str(cause.response.get("Error", {}).get("Code") or "refused")
    return type(error).__name__


def _unavailable(reason: str, what: str = "get") -> StoreUnavailable:
    _log.warning("the audio store failed", extra={"reason": reason, "asked": what})
    return StoreUnavailable("The audio store cannot be reached, or refuses; the same call may succeed later.")
