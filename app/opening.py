"""From settings to an open model and library: the one place where the service and the verbs agree on how."""

from app.settings import Settings
from clasp_core.library import Library
from clasp_core.models import Model, open_model, use_threads
from clasp_core.vectors import store_for


def open_configured_model(settings: Settings, name: str | None = None) -> Model:
    """The model of the settings (or the one named), with this process's threads bounded."""
    use_threads(settings.threads)
    return open_model(name or settings.model, models_dir=settings.models_dir, device=settings.device)


def open_configured_library(settings: Settings, *, embed_anew: bool = False) -> tuple[Model, Library]:
    """The library in the data directory, and the model it is searched with. Raises as both do."""
    model = open_configured_model(settings)
    library = Library(
        settings.data_dir,
        model=model.fingerprint,
        dim=model.dim,
        database_url=settings.database_url,
        embed_anew=embed_anew,
        new_store=store_for(settings.vector_store, settings.device, half=settings.vector_store_half),
    )
    return model, library
