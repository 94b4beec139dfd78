"""From settings to an open model and library: the one place where the service and the verbs agree on how."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from app.settings import Settings
from clasp_core.catalog import Catalog
from clasp_core.errors import DataMismatch, ExtraMissing
from clasp_core.library import AUDIO_FOLDER, CATALOG_FILE, Library, open_catalog
from clasp_core.models import AVAILABLE, Model, open_model, use_threads
from clasp_core.scaling import Scaling, scaling_for
from clasp_core.store import INCOMING, AudioStore


def open_configured_model(settings: Settings, name: str | None = None) -> Model:
    """The model of the settings (or the one named), with this process's threads bounded."""
    use_threads(settings.threads)
    return open_model(name or settings.model, models_dir=settings.models_dir, device=settings.device)


def open_configured_library(
    settings: Settings, name: str | None = None, *, reindex: bool = False
) -> tuple[Model, Library]:
    """The library in the data directory, opened with the model of the settings (or the one named).

    To search it, or to `reindex` it to that model. Raises as both do.
    """
    model = open_configured_model(settings, name)
    library = Library(
        settings.data_dir,
        model=model.fingerprint,
        dim=model.dim,
        name=_lasting_name(model.name),
        database_url=settings.database_url,
        **_index(settings),
        reindex=reindex,
        min_free_bytes=settings.min_free_bytes,
        store=open_configured_store(settings),
    )
    return model, library


def _index(settings: Settings) -> dict[str, Any]:
    """Where vectors are searched, as `Library` wants to be told."""
    name, _, uri = settings.vector_store.partition(":")
    if name != "milvus":
        scaling = scaling_for(
            name,
            settings.device,
            kind=settings.vector_index,
            half_mirror=settings.vector_store_half,
            floor=settings.recall_floor,
            flat_up_to=settings.flat_up_to,
            half_up_to=settings.half_up_to,
            mapped=settings.index_mmap,
        )
        return {"scaling": scaling}
    try:
        from clasp_core.milvus import milvus_at
    except ModuleNotFoundError as error:
        raise ExtraMissing(
            "CLASP_VECTOR_STORE=milvus:... needs Milvus's client: pip install 'clasp-search[milvus]'."
        ) from error
    kind: Literal["flat", "ivf"] = "ivf" if settings.vector_index == "ivf" else "flat"
    return {
        "scaling": Scaling(kind=kind, floor=settings.recall_floor),
        "shared_index": milvus_at(
            uri, settings.vector_store_token, kind=kind, exhaustive_up_to=settings.flat_up_to
        ),
    }


def open_configured_catalog(settings: Settings) -> Catalog:
    """The catalogue alone, for what needs no model. Raises DataMismatch."""
    return open_catalog(settings.data_dir, settings.database_url, open_configured_store(settings))


@contextmanager
def read_configured_catalog(settings: Settings) -> Iterator[Catalog]:
    """The catalogue as it is, to look at: neither made nor upgraded. Raises DataMismatch where there is none,
    or one of another version, and as Catalog does."""
    url = settings.database_url
    if url is None:
        file = settings.data_dir / CATALOG_FILE
        if not file.is_file():
            raise DataMismatch(f"There is no library in {settings.data_dir} yet; `clasp index` makes one.")
        url = f"sqlite:///{file}"
    with closing(Catalog(url, upgrade=False)) as catalog:
        if not catalog.database.is_current():
            raise DataMismatch(
                "The catalogue was written by another version of this program; starting the service, or"
                " `clasp index`, of the newer one brings it up to date."
            )
        yield catalog


def open_configured_store(settings: Settings) -> AudioStore | None:
    """Where recordings' bytes are, if not in the data directory. Raises ExtraMissing and StoreUnavailable."""
    if settings.bucket_and_prefix is None:
        return None
    from clasp_core.s3 import S3Store

    return S3Store(
        *settings.bucket_and_prefix,
        settings.data_dir / AUDIO_FOLDER / INCOMING,
        endpoint=settings.s3_endpoint,
        min_free_bytes=settings.min_free_bytes,
    )


def _lasting_name(name: str) -> str:
    """A model's name as another process, in another working directory, can open it."""
    return str(Path(name).resolve()) if name not in AVAILABLE and Path(name).is_dir() else name
