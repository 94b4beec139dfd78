"""From settings to an open model and library: the one place where the service and the verbs agree on how."""

from pathlib import Path

from app.settings import Settings
from clasp_core.catalog import Catalog
from clasp_core.library import Library, open_catalog
from clasp_core.models import AVAILABLE, Model, open_model, use_threads
from clasp_core.scaling import scaling_for


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
        scaling=scaling_for(
            settings.vector_store,
            settings.device,
            kind=settings.vector_index,
            half_mirror=settings.vector_store_half,
            floor=settings.recall_floor,
            flat_up_to=settings.flat_up_to,
            half_up_to=settings.half_up_to,
            mapped=settings.index_mmap,
        ),
        reindex=reindex,
        min_free_bytes=settings.min_free_bytes,
    )
    return model, library


def open_configured_catalog(settings: Settings) -> Catalog:
    """The catalogue alone, for what needs no model. Raises DataMismatch."""
    return open_catalog(settings.data_dir, settings.database_url)


def _lasting_name(name: str) -> str:
    """A model's name as another process, in another working directory, can open it."""
    return str(Path(name).resolve()) if name not in AVAILABLE and Path(name).is_dir() else name
