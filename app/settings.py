"""Every setting of the service, read once from the environment or a `.env` file. Nothing else reads them."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_AUDIO_STORE = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((/[A-Za-z0-9._-]+)*)/?")
_ENDPOINT = re.compile(r"https?://[^/@?#\s]+/?")
_URL_HOST = re.compile(r"(\*|(\*\.)?([a-z0-9-]+\.)*[a-z][a-z0-9-]*)(:[0-9]{1,5})?")


class Settings(BaseSettings):
    """Names in the environment carry the prefix `CLASP_`, e.g. `CLASP_DATA_DIR`."""

    model_config = SettingsConfigDict(
        env_prefix="CLASP_",
        env_file=".env",
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
        validate_by_name=True,
    )

    model: str = "mini"
    """`mini`, the embedded default; `hybrid`, which reads transcripts too; or a model folder."""
    models_dir: Path | None = None
    """Folder looked at first for pretrained weights."""
    hub_endpoint: Annotated[
        str, Field(validation_alias=AliasChoices("CLASP_HUB_ENDPOINT", "HF_ENDPOINT"))
    ] = "https://huggingface.co"
    """Where `clasp models fetch` finds the Hugging Face hub, or a mirror; else HF_ENDPOINT says."""
    data_dir: Path = Path("index_data")
    """Everything the service stores."""
    database_url: Annotated[str | None, Field(repr=False)] = None
    """The catalogue: `postgresql://USER:PASSWORD@HOST/DATABASE`; by default SQLite in the data directory."""
    audio_store: str | None = None
    """`s3://BUCKET` or `s3://BUCKET/PREFIX`, of this library alone; by default the recordings are in the data
    directory. Credentials are AWS's own variables and files."""
    s3_endpoint: str | None = None
    """Address of an S3-compatible store, as `https://host:port`; by default AWS's own variables say."""
    vector_store: Annotated[str, Field(repr=False)] = "faiss"
    """What searches vectors: on the device `faiss` (on a GPU with faiss-gpu only) or `torch`; or elsewhere
    `milvus:http://HOST:19530`, or `milvus:PATH.db` for a milvus-lite file."""
    vector_store_token: Annotated[str, Field(repr=False)] = ""
    """Milvus's token, or `user:password`, which may stand in its URI as well."""
    vector_store_half: bool = False
    """Whether FAISS's copy of the vectors on a GPU has 16 bits a number; results stay the same."""
    vector_index: Literal["auto", "flat", "half", "ivf"] = "auto"
    """How the index keeps vectors: float32, float16, or float16 in lists of which some are searched; `auto`
    goes by their number. In Milvus `ivf` is IVF_FLAT, and all else FLAT."""
    flat_up_to: Annotated[int, Field(ge=0)] = 200_000
    """Vectors up to which `auto` is flat; a filter that leaves so many is searched exactly in any case."""
    half_up_to: Annotated[int, Field(ge=0)] = 400_000
    """Vectors up to which `auto` is half; beyond, ivf."""
    recall_floor: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Least share of the ten best recordings that ivf finds; so many lists are searched as that takes."""
    index_mmap: bool = False
    """Whether the index's snapshot is mapped and not read: processes on one machine then share its memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run and vectors are searched; `auto` takes a GPU where there is one."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of each model process; 0 means half of the cores, at least one."""
    workers: Annotated[int, Field(ge=0, le=64)] = 1
    """Ingest workers that `clasp serve` starts."""
    host: str = "127.0.0.1"
    """Address that `clasp serve` binds to."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port that `clasp serve` binds to."""
    api_keys: Annotated[tuple[str, ...], NoDecode, Field(repr=False)] = ()
    """Accepted keys with all scopes, comma-separated, beside those that `clasp keys create` makes."""
    allow_anonymous: bool = False
    """Whether to serve other machines without any key: something in front of the service checks."""
    max_upload_bytes: Annotated[int, Field(gt=0)] = 1 << 30
    """Largest accepted upload."""
    max_duration_s: Annotated[float, Field(gt=0)] = 6 * 3600.0
    """Longest accepted recording, in seconds of decoded sound."""
    url_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Hosts that recordings are fetched from by URL, comma-separated: `example.org`, `*.example.org` for
    what is below it, `*` for any public host; `:PORT` behind it if not 443. Without any, none is fetched."""
    url_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest that fetching one recording may take, in seconds."""
    max_pending: Annotated[int, Field(ge=0)] = 10_000
    """Recordings that may wait to be embedded before no more are taken; 0 means any number."""
    min_free_bytes: Annotated[int, Field(ge=0)] = 512 << 20
    """Room on the disk that arriving recordings leave to the catalogue; 0 means none."""
    max_connections: Annotated[int, Field(gt=0)] = 1000
    """Connections that are served at once; who comes beyond is refused."""
    request_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    """Longest time, in seconds, to answer a search or to read what is stored; uploads may take longer."""
    upload_idle_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    """Longest time, in seconds, that a client may send or take nothing in the middle of a request."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged."""
    log_questions: bool = False
    """Whether questions are logged, too: people's words, which then lie wherever logs go."""
    drain_s: Annotated[float, Field(ge=0, le=600)] = 0.0
    """Seconds between SIGTERM, when `/readyz` turns 503, and the last new connection."""

    @field_validator("api_keys", "url_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(item.strip() for item in value.split(",") if item.strip())
        return value

    @field_validator("vector_store")
    @classmethod
    def _store(cls, store: str) -> str:
        if store not in ("faiss", "torch") and not re.fullmatch(r"milvus:(https?://.+|.+\.db)", store):
            raise ValueError("it is faiss, torch, milvus:http://HOST:PORT or milvus:PATH.db")
        return store

    @field_validator("url_hosts")
    @classmethod
    def _listed(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _URL_HOST.fullmatch(host.lower()):
                raise ValueError(f"{host!r} is no host name, such as example.org, *.example.org or *")
        return tuple(host.lower() for host in hosts)

    @field_validator("audio_store", "s3_endpoint")
    @classmethod
    def _addressed(cls, given: str | None, info: ValidationInfo) -> str | None:
        if given is not None:
            form, example = (
                (_AUDIO_STORE, "s3://bucket/prefix")
                if info.field_name == "audio_store"
                else (_ENDPOINT, "https://host:9000")
            )
            if not form.fullmatch(given):  # not repeated: there may be credentials in it
                raise ValueError(f"it is not of the form {example}")
        return given

    @property
    def bucket_and_prefix(self) -> tuple[str, str] | None:
        """Of the audio store in S3; None where the data directory holds the recordings."""
        found = _AUDIO_STORE.fullmatch(self.audio_store or "")
        return None if found is None else (found[1], found[2].strip("/"))

    @classmethod
    def described(cls) -> str:
        """One line per setting, for `clasp serve --help`."""
        return "\n\n".join(
            f"CLASP_{name.upper()}  {field.description} (default: {field.get_default()!r})"
            for name, field in cls.model_fields.items()
        )

    def as_environment(self) -> dict[str, str]:
        """These settings as another process would read them."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            f"CLASP_{name.upper()}": ",".join(value) if isinstance(value, tuple) else str(value)
            for name, value in values.items()
            if value is not None
        }
