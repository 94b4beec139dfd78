"""The pretrained parts of the published models: where they are, and fetching them into the models folder.

    models_dir/<owner>/<repository>/<file>     from the Hugging Face hub
    models_dir/torchvision/<file>              from PyTorch's own server
    models_dir/fetched.json                    what each file was when it was first seen here

A file is trusted by its sha256: the one published below where one is known, else the one recorded on first
use, together with the commit that answered; later files of that repository come from the same commit.
Pickles are converted as soon as they are here (`clasp_core.checkpoints`); the service reads safetensors only.
A folder that somebody filled by hand is as good as one that was fetched.

Speaks the hub's file interface itself: its client library begins a file anew after a kill, reports usage, and
reads the environment.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx

from clasp_core.checkpoints import convert, readable, temporary_for
from clasp_core.durability import locked, place
from clasp_core.encoders.weights import sha256_of
from clasp_core.errors import ModelUnavailable, WeightsMismatch
from clasp_core.systems import SYSTEMS

HUB = "https://huggingface.co"
RECORD = "fetched.json"

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name below the models folder, the bytes there, and all of them where that is known."""

_FORMAT = "clasp-fetched/1"
_PICKLES = (".bin", ".pt", ".pth")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATIENCE = 5
_PAUSE_S = 1.0
_TIMEOUT = httpx.Timeout(30.0)


@dataclass(frozen=True, slots=True)
class PublishedFile:
    name: str
    """Its path in the repository, and below the part's folder."""
    sha256: str | None = None
    """Or the beginning of it, where no more is published."""
    size: int | None = None


@dataclass(frozen=True, slots=True)
class _Published:
    """What can be said of a part without asking the network."""

    title: str
    licence: str
    folder: str
    """`owner/repository`, and the part's place below the models folder."""
    revision: str
    """A commit; or a branch, where none was seen. Then the commit that answers first is the one."""
    files: tuple[PublishedFile, ...]
    megabytes: int
    """What is to be fetched, as the published pages round it."""

    def location(self, models_dir: Path) -> Path:
        """Where encoders read it: a part of one file is that file, in safetensors; else its folder."""
        folder = models_dir / self.folder
        return readable(folder / self.files[0].name) if len(self.files) == 1 else folder

    def found(self, models_dir: Path) -> Path | None:
        """That place, if the part's weights are there, in safetensors."""
        weights = [
            readable(models_dir / self.folder / file.name)
            for file in self.files
            if file.name.endswith((".safetensors", *_PICKLES))
        ]
        return self.location(models_dir) if all(path.is_file() for path in weights) else None


@dataclass(frozen=True, slots=True)
class Repository(_Published):
    """Files of one commit of a repository on the Hugging Face hub."""

    @property
    def source(self) -> str:
        return f"{HUB}/{self.folder}@{self.revision}"

    def url(self, file: PublishedFile, revision: str, endpoint: str) -> str:
        return f"{endpoint}/{self.folder}/resolve/{quote(revision, safe='')}/{quote(file.name)}"


@dataclass(frozen=True, slots=True)
class WebFile(_Published):
    """A file that has an address and no versions: its revision is the empty text."""

    address: str

    @property
    def source(self) -> str:
        return self.address

    def url(self, file: PublishedFile, revision: str, endpoint: str) -> str:
        return self.address


def _clasp(title: str, name: str, megabytes: int) -> Repository:
    # Seen: the tree of main at 79624ff (no full hash), four .pt files, 125 MB together, licence MIT:
    # huggingface.co/llm-lab/CLASP/tree/main
    return Repository(title, "MIT", "llm-lab/CLASP", "main", (PublishedFile(name),), megabytes)


PUBLISHED: dict[str, Repository | WebFile] = {
    "hubert-large": Repository(
        "HuBERT large, LS-960 fine-tuned",
        "Apache-2.0",
        "facebook/hubert-large-ls960-ft",
        # The newest commit of main that was seen; it has no safetensors (a pull request, ba42e7f, does):
        # huggingface.co/facebook/hubert-large-ls960-ft/tree/ece5fabbf034c1073acae96d5401b25be96709d8
        "ece5fabbf034c1073acae96d5401b25be96709d8",
        (
            PublishedFile("config.json"),
            PublishedFile("preprocessor_config.json"),
            PublishedFile("special_tokens_map.json"),
            PublishedFile("tokenizer_config.json"),
            PublishedFile("vocab.json"),
            # This hash stands in two unrelated public projects that load this very file.
            PublishedFile(
                "pytorch_model.bin", "9cf43abec3f0410ad6854afa4d376c69ccb364b48ddddfd25c4c5aa16398eab0"
            ),
        ),
        1262,
    ),
    "wav2vec2-base": Repository(
        "wav2vec 2.0 base, 960 h",
        "Apache-2.0",
        "facebook/wav2vec2-base-960h",
        # Commit, sizes and hashes agree in a dozen public projects that pin this model.
        "22aad52d435eb6dbaf354bdad9b0da84ce7d6156",
        (
            PublishedFile(
                "config.json", "d3ec255c063d9f95057b553b19c20135b259875834a4fe9deb218a6be25b4cf3", 1596
            ),
            PublishedFile(
                "preprocessor_config.json",
                "b225d617c025463b9e157e06afea8b90dc7078fc70b013c533328423e0486b4a",
                159,
            ),
            PublishedFile(
                "special_tokens_map.json",
                "bb7068de1150661a10b55f9e4b12a0e77af8bf91f5e45e1b58afaf1d0e17f675",
                85,
            ),
            PublishedFile(
                "tokenizer_config.json",
                "dc790594f5bc351a4311c6624f40acd95850d4aaf2a5cb3c656c9b610720b608",
                163,
            ),
            PublishedFile(
                "vocab.json", "19727f8944fe6459fc3f240ae2c198395b740f6a029bd23e06656266b83bcf64", 291
            ),
            PublishedFile(
                "model.safetensors",
                "8aa76ab2243c81747a1f832954586bc566090c83a0ac167df6f31f0fa917d74a",
                377_607_901,
            ),
        ),
        378,
    ),
    "labse": Repository(
        "LaBSE",
        "Apache-2.0",
        "sentence-transformers/LaBSE",
        # The newest commit of main that was seen. Safetensors were added (50fe094), reverted, and added
        # again; it has both files: huggingface.co/sentence-transformers/LaBSE/tree/main (at 836121a) and
        # .../tree/main/2_Dense. The full hash stands in many public projects.
        "836121a0533e5664b21c7aacc5d22951f2b8b25b",
        (
            PublishedFile("config.json"),
            PublishedFile("config_sentence_transformers.json"),
            PublishedFile("modules.json"),
            PublishedFile("sentence_bert_config.json"),
            PublishedFile("special_tokens_map.json"),
            PublishedFile("tokenizer.json"),
            PublishedFile("tokenizer_config.json"),
            PublishedFile("vocab.txt"),
            PublishedFile("1_Pooling/config.json"),
            PublishedFile("2_Dense/config.json"),
            # huggingface.co/sentence-transformers/LaBSE/commit/ac91d6745aefb758c373ef4d37a13ff5e04ad876
            PublishedFile(
                "2_Dense/model.safetensors",
                "f866c945fa2147ce4940c8ead0b4b20af4217e0f4664bd35f41c2a0967c4fe77",
                2_362_528,
            ),
            PublishedFile("model.safetensors"),
        ),
        1884,
    ),
    "xlm-r": Repository(
        "XLM-R, multilingual paraphrases",
        "Apache-2.0",
        "sentence-transformers/paraphrase-xlm-r-multilingual-v1",
        # huggingface.co/sentence-transformers/paraphrase-xlm-r-multilingual-v1/tree/8a52c6f12a14d75a83ff...
        "8a52c6f12a14d75a83ffb2124ebabe33e2e35754",
        (
            PublishedFile("config.json"),
            PublishedFile("config_sentence_transformers.json"),
            PublishedFile("modules.json"),
            PublishedFile("sentence_bert_config.json"),
            PublishedFile("sentencepiece.bpe.model"),
            PublishedFile("special_tokens_map.json"),
            PublishedFile("tokenizer.json"),
            PublishedFile("tokenizer_config.json"),
            PublishedFile("1_Pooling/config.json"),
            PublishedFile("model.safetensors"),
        ),
        1112,
    ),
    "efficientnet-b7": WebFile(
        "EfficientNet-B7, ImageNet-1k, of torchvision",
        "Apache-2.0",
        "torchvision",
        "",
        # PyTorch's server publishes the hash as the last eight digits of the name.
        (PublishedFile("efficientnet_b7_lukemelas-c5b4e57e.pth", "c5b4e57e"),),
        267,
        "https://download.pytorch.org/models/efficientnet_b7_lukemelas-c5b4e57e.pth",
    ),
    "clasp-concat": _clasp("CLASP fusion, concatenation", "CLASP_Concat_Final_Fusion_Encoder.pt", 25),
    "clasp-gating": _clasp("CLASP fusion, gating", "CLASP_Gating.pt", 37),
    "lasp-concat": _clasp("LASP fusion, concatenation", "LASP_Concat.pt", 25),
    "lasp-gating": _clasp("LASP fusion, gating", "LASP_Gating.pt", 37),
}

GROUPS: dict[str, tuple[str, ...]] = {
    name: (*system.pretrained.values(), *([system.weights] if system.weights else []))
    for name, system in SYSTEMS.items()
}
"""Parts that are of use together: what is published of each system."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """One file of a part, as `fetch` leaves it: there and right."""

    part: str
    path: Path
    sha256: str
    size: int
    commit: str | None
    """Of the repository; None where there is none, or where the file was put there by hand."""
    how: Literal["fetched", "converted", "present"]


def parts_named(names: Iterable[str]) -> list[str]:
    """The parts of these names and groups, each once. Raises ModelUnavailable for an unknown name."""
    parts = dict.fromkeys(part for name in names for part in GROUPS.get(name, (name,)))
    for part in parts:
        if part not in PUBLISHED:
            known = ", ".join([*PUBLISHED, *GROUPS])
            raise ModelUnavailable(f"There is no part {part!r}; there are {known}.")
    return list(parts)


def fetch(
    names: Iterable[str],
    models_dir: Path,
    *,
    revisions: Mapping[str, str] | None = None,
    endpoint: str | None = None,
    progress: Progress = lambda file, done, total: None,
) -> list[Fetched]:
    """Bring these parts or groups into the models folder. One Fetched per file, also for what was converted.

    What is there is hashed and compared; where all is there and right, nothing is asked of the network. What
    was interrupted goes on where it stopped.

    revisions: other commits or branches than the published ones, by part; published hashes do not hold there.
    endpoint: another address of the hub, such as a mirror.

    Raises WeightsMismatch where a file is not the published or the recorded one (one that was just fetched is
    removed, one that was there stays), ModelUnavailable where it cannot be had, and what `convert` raises.
    """
    parts = parts_named(names)
    revisions = revisions or {}
    if stray := sorted(set(revisions) - set(parts)):
        raise ModelUnavailable(f"A revision is given for {', '.join(stray)}, which is not among the parts.")
    if fixed := [part for part in revisions if isinstance(PUBLISHED[part], WebFile)]:
        raise ModelUnavailable(f"{', '.join(fixed)} has no revisions.")
    models_dir.mkdir(parents=True, exist_ok=True)
    taken = ModelUnavailable(f"Another process is fetching weights into {models_dir}; wait for it.")
    with (
        locked(models_dir, taken),
        httpx.Client(timeout=_TIMEOUT, headers={"Accept-Encoding": "identity"}) as client,
    ):
        fetching = _Fetching(models_dir, (endpoint or HUB).rstrip("/"), client, progress)
        return [
            file
            for part in parts
            for file in fetching.part(part, PUBLISHED[part], revisions.get(part, PUBLISHED[part].revision))
        ]


class _Records:
    """`fetched.json`: each file's source, revision, commit, sha256 and size. On disk after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                content = json.loads(path.read_text())
                if content["format"] != _FORMAT:
                    raise ValueError(content["format"])
                self._files = dict(content["files"])
            except (ValueError, KeyError, TypeError) as error:
                raise WeightsMismatch(
                    f"{path} cannot be read: restore it, or remove it and so trust the files as they are."
                ) from error

    def of(self, file: str) -> dict[str, Any] | None:
        return self._files.get(file)

    def commit_of(self, source: str, revision: str) -> str | None:
        """The commit that answered for this revision before."""
        commits = (
            record["commit"]
            for record in self._files.values()
            if (record["source"], record["revision"]) == (source, revision)
        )
        return next((commit for commit in commits if commit), None)

    def add(
        self, file: str, *, source: str, revision: str, commit: str | None, sha256: str, size: int
    ) -> None:
        record = {"source": source, "revision": revision, "commit": commit, "sha256": sha256, "size": size}
        if self._files.get(file) == record:
            return
        self._files[file] = record
        content = {"format": _FORMAT, "files": dict(sorted(self._files.items()))}
        with temporary_for(self._path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            place(temporary, self._path)


@dataclass(frozen=True, slots=True)
class _Remote:
    """What a server says of a file before sending it."""

    commit: str | None
    etag: str
    size: int | None


class _Cut(Exception):
    """The connection ended before the file did."""


class _Fetching:
    def __init__(self, models_dir: Path, endpoint: str, client: httpx.Client, progress: Progress) -> None:
        self._models_dir = models_dir
        self._endpoint = endpoint
        self._client = client
        self._progress = progress
        self._records = _Records(models_dir / RECORD)

    def part(self, name: str, part: Repository | WebFile, revision: str) -> Iterator[Fetched]:
        self._require_one_revision(name, part, revision)
        for file in part.files:
            relative = f"{part.folder}/{file.name}"
            pinned = file.sha256 if revision == part.revision else None
            if not file.name.endswith(_PICKLES):
                yield self._file(name, part, file, relative, revision, pinned)
                continue
            converted = str(readable(Path(relative)))
            made = self._as_recorded(name, converted)
            # Once it is converted, the pickle itself is of no more use and may be removed.
            if made is None or (self._models_dir / relative).exists() or not self._records.of(relative):
                yield self._file(name, part, file, relative, revision, pinned)
            yield made or self._converted(name, relative, converted, revision)

    def _require_one_revision(self, name: str, part: Repository | WebFile, revision: str) -> None:
        for file in part.files:
            for there in {file.name, str(Path(file.name).with_suffix(".safetensors"))}:
                record = self._records.of(f"{part.folder}/{there}")
                path = self._models_dir / part.folder / there
                if record and path.exists() and revision not in (record["revision"], record["commit"]):
                    held = record["commit"] or record["revision"]
                    raise WeightsMismatch(
                        f"{path} is of revision {held}, but {revision} is asked for. Ask for {name}={held},"
                        f" or remove {path.parent} and fetch anew."
                    )

    def _file(
        self,
        name: str,
        part: Repository | WebFile,
        file: PublishedFile,
        relative: str,
        revision: str,
        pinned: str | None,
    ) -> Fetched:
        path = self._models_dir / relative
        record = self._records.of(relative)
        recorded = record["sha256"] if record and record["revision"] == revision else None
        if path.is_file():
            sha256, size = sha256_of(path), path.stat().st_size
            _require(path, sha256, pinned, record["sha256"] if record else None)
            if record is None:
                self._records.add(
                    relative, source=part.folder, revision=revision, commit=None, sha256=sha256, size=size
                )
            self._progress(relative, size, size)
            return Fetched(name, path, sha256, size, record["commit"] if record else None, "present")
        commit = self._records.commit_of(part.folder, revision)
        temporary, sha256, answered = self._download(part, file, commit or revision, path)
        try:
            _require(path, sha256, pinned, recorded)
            if commit and answered != commit:
                raise WeightsMismatch(f"{path} should be of commit {commit}, but the hub sent {answered}.")
        except WeightsMismatch:
            temporary.unlink()
            raise
        size = temporary.stat().st_size
        # The record goes first: a kill between the two leaves a hash that the next download must have.
        self._records.add(
            relative, source=part.folder, revision=revision, commit=answered, sha256=sha256, size=size
        )
        place(temporary, path)
        for stale in path.parent.glob(f".{path.name}.*.part"):
            stale.unlink()
        return Fetched(name, path, sha256, size, answered, "fetched")

    def _converted(self, name: str, pickle: str, converted: str, revision: str) -> Fetched:
        path = self._models_dir / converted
        convert(self._models_dir / pickle, path)
        sha256, size = sha256_of(path), path.stat().st_size
        of_pickle = self._records.of(pickle)
        commit = of_pickle["commit"] if of_pickle else None
        self._records.add(
            converted, source=pickle, revision=revision, commit=commit, sha256=sha256, size=size
        )
        return Fetched(name, path, sha256, size, commit, "converted")

    def _as_recorded(self, name: str, file: str) -> Fetched | None:
        """A file that is there as it was recorded; None for one that is not there or was never recorded."""
        path = self._models_dir / file
        record = self._records.of(file)
        if record is None or not path.is_file():
            return None
        _require(path, sha256_of(path), None, record["sha256"])
        self._progress(file, record["size"], record["size"])
        return Fetched(name, path, record["sha256"], record["size"], record["commit"], "present")

    # --- over the network

    def _download(
        self, part: Repository | WebFile, file: PublishedFile, revision: str, path: Path
    ) -> tuple[Path, str, str | None]:
        """A complete temporary file beside `path`, its sha256, and the commit it is of."""
        url = part.url(file, revision, self._endpoint)
        try:
            remote = self._describe(url)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Named by the version, so that two halves of different files are never put together.
            version = re.sub(r"\W", "", remote.etag)[:16]
            partial = path.with_name(f".{path.name}.{version or 'unknown'}.part")
            if not version:
                partial.unlink(missing_ok=True)
            self._require_space(path, remote.size, partial)
            failures = 0
            while True:
                before = _size(partial)
                try:
                    self._transfer(url, partial, remote, f"{part.folder}/{file.name}")
                    break
                except (httpx.TransportError, _Cut) as error:
                    failures = 0 if _size(partial) > before else failures + 1
                    if failures == _PATIENCE:
                        raise ModelUnavailable(
                            f"{url} broke off again and again ({_line(error)}); the same command goes on."
                        ) from error
                    time.sleep(_PAUSE_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ModelUnavailable(
                f"{url} cannot be had ({_line(error)}). Where there is no network, put the file at {path}."
            ) from error
        sha256 = sha256_of(partial)
        if _SHA256.fullmatch(remote.etag) and sha256 != remote.etag:
            partial.unlink()
            raise WeightsMismatch(
                f"{url} did not arrive as the hub has it; nothing was kept. Fetch it again."
            )
        return partial, sha256, remote.commit

    def _describe(self, url: str) -> _Remote:
        answer = self._client.head(url)
        commit = answer.headers.get("x-repo-commit")
        for _ in range(_PATIENCE):  # the hub's redirects within itself: renamed repositories, cached files
            if not (answer.is_redirect and answer.headers.get("location", "").startswith("/")):
                break
            answer = self._client.head(answer.url.join(answer.headers["location"]))
            commit = answer.headers.get("x-repo-commit", commit)
        # The hub sends large files from elsewhere, and says what they are before it sends one there.
        if answer.is_redirect and (etag := answer.headers.get("x-linked-etag")):
            size = answer.headers.get("x-linked-size")
        else:
            if answer.is_redirect:
                answer = self._client.head(url, follow_redirects=True)
            answer.raise_for_status()
            etag, size = answer.headers.get("etag", ""), answer.headers.get("content-length")
        return _Remote(commit, etag.removeprefix("W/").strip('"'), int(size) if size else None)

    def _transfer(self, url: str, partial: Path, remote: _Remote, name: str) -> None:
        """Append what is missing. Raises _Cut where that is not all."""
        done = _size(partial)
        if done and done == remote.size:
            return
        wanted = {"Range": f"bytes={done}-"} if done else {}
        with self._client.stream("GET", url, headers=wanted, follow_redirects=True) as answer:
            if answer.status_code == 416:
                partial.unlink()
                raise _Cut("the part here is not of the file there")
            answer.raise_for_status()
            if answer.status_code != 206 or not answer.headers.get("content-range", "").startswith(
                f"bytes {done}-"
            ):
                done = 0
            with partial.open("ab" if done else "wb") as file:
                for chunk in answer.iter_raw():
                    file.write(chunk)
                    done += len(chunk)
                    self._progress(name, done, remote.size)
        if remote.size is not None and done < remote.size:
            raise _Cut(f"after {done} of {remote.size} bytes")
        if remote.size is not None and done > remote.size:
            partial.unlink()
            raise _Cut("more came than there is")

    def _require_space(self, path: Path, size: int | None, partial: Path) -> None:
        if size is None:
            return
        needed = size * (2 if path.name.endswith(_PICKLES) else 1) - _size(partial)
        free = shutil.disk_usage(self._models_dir).free
        if needed > free:
            raise ModelUnavailable(
                f"{path} needs {needed / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free on that disk."
            )


def _line(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"the server answers {error.response.status_code}"
    return next(iter(str(error).splitlines()), type(error).__name__)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _require(path: Path, sha256: str, pinned: str | None, recorded: str | None) -> None:
    """Raises WeightsMismatch unless a file's hash begins as published, and is the recorded one."""
    if pinned is not None and not sha256.startswith(pinned):
        raise WeightsMismatch(
            f"{path} has sha256 {sha256}, but {pinned} is published: it was replaced or damaged."
        )
    if recorded is not None and sha256 != recorded:
        raise WeightsMismatch(
            f"{path} has sha256 {sha256}, but {recorded} was recorded when it was first used: it was replaced"
            " or damaged. Remove it to fetch it again."
        )
