"""Every error the core raises on purpose, as one tree.

    ClaspError
    ├── InvalidInput
    │   ├── EmptyQuery
    │   ├── InvalidLanguage
    │   ├── InvalidField
    │   ├── InvalidManifest
    │   ├── InvalidBackup
    │   └── InvalidAudio
    │       ├── UndecodableAudio
    │       ├── EmptyAudio
    │       ├── SilentAudio
    │       ├── NonFiniteAudio
    │       └── AudioTooLong
    ├── RecordingNotFound
    ├── RecordingNotReady
    ├── NoWaveform
    ├── IdConflict
    ├── AmbiguousId
    ├── IdempotencyMismatch
    ├── NotCalibrated
    ├── ExtraMissing
    ├── ModelUnavailable
    │   ├── WeightsMismatch
    │   └── InvalidCheckpoint
    │       └── UnsafeCheckpoint
    ├── DataMismatch
    ├── DataDamaged
    ├── IndexUnavailable
    ├── VoiceUnavailable
    ├── BackupFailed
    ├── ProcessingFailed
    ├── QuotaExceeded
    ├── QueueFull
    ├── DiskFull
    └── NotReady
        ├── DatabaseUnavailable
        └── StoreUnavailable

Each class has a stable `code`; it is what records and HTTP answers carry, and `app.errors` alone
decides which status a code becomes. Anything else that escapes the core is a bug.
"""

from typing import ClassVar


class ClaspError(Exception):
    """Base of all expected errors. `str(error)` is one sentence a user can act on."""

    code: ClassVar[str] = "error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class InvalidInput(ClaspError):
    """What the caller gave cannot be used; trying again unchanged will fail again."""

    code = "invalid_input"


class EmptyQuery(InvalidInput):
    """A query with no characters left after normalisation."""

    code = "empty_query"


class InvalidLanguage(InvalidInput):
    """Not a well-formed BCP 47 language tag (RFC 5646)."""

    code = "invalid_language"


class InvalidField(InvalidInput):
    """An id, collection name, metadata object, cursor, number or deletion outside its stated form."""

    code = "invalid_field"


class InvalidManifest(InvalidInput):
    """An evaluation or training manifest that cannot be read; names the line."""

    code = "invalid_manifest"


class InvalidBackup(InvalidInput):
    """A folder that is not a backup, or one of which files are missing or damaged; names them."""

    code = "invalid_backup"


class InvalidAudio(InvalidInput):
    """Bytes that are not a usable recording of sound."""

    code = "invalid_audio"


class UndecodableAudio(InvalidAudio):
    """No decoder understands the bytes, or decoding broke its limits."""

    code = "undecodable_audio"


class EmptyAudio(InvalidAudio):
    """The file decodes to too few samples to embed."""

    code = "empty_audio"


class SilentAudio(InvalidAudio):
    """Nothing can be heard: every sample is (all but) zero."""

    code = "silent_audio"


class NonFiniteAudio(InvalidAudio):
    """The samples contain NaN or infinity."""

    code = "non_finite_audio"


class AudioTooLong(InvalidAudio):
    """The recording lasts longer than the configured limit."""

    code = "audio_too_long"


class RecordingNotFound(ClaspError):
    """No recording has this id."""

    code = "recording_not_found"


class RecordingNotReady(ClaspError):
    """A recording that cannot be searched by, since it has no vectors (yet)."""

    code = "recording_not_ready"


class NoWaveform(ClaspError):
    """A recording without a waveform: not embedded yet, or not since there are such."""

    code = "no_waveform"


class IdConflict(ClaspError):
    """The id belongs to a recording with other bytes."""

    code = "id_conflict"


class AmbiguousId(ClaspError):
    """Several collections have a recording with this id; the caller, who may see them all, names one."""

    code = "ambiguous_id"


class IdempotencyMismatch(ClaspError):
    """A request has the name of another that was done already, and says something else."""

    code = "idempotency_mismatch"


class NotCalibrated(ClaspError):
    """What scores mean was asked of a model of which nobody measured it, or of which another version was."""

    code = "not_calibrated"


class ExtraMissing(ClaspError):
    """A package of an optional extra is not installed; says which."""

    code = "extra_missing"


class ModelUnavailable(ClaspError):
    """The model's weights are not on this machine, or its name is unknown."""

    code = "model_unavailable"


class WeightsMismatch(ModelUnavailable):
    """A weights file exists but its sha256 is not the pinned one."""

    code = "weights_mismatch"


class InvalidCheckpoint(ModelUnavailable):
    """A torch checkpoint that is damaged, of a kind that is not converted, or holds NaN."""

    code = "invalid_checkpoint"


class UnsafeCheckpoint(InvalidCheckpoint):
    """A torch checkpoint that imports something else than tensors and known layers: it could run it."""

    code = "unsafe_checkpoint"


class DataMismatch(ClaspError):
    """The data directory was written by another model or a newer version."""

    code = "data_mismatch"


class DataDamaged(ClaspError):
    """The data directory is not as this program left it: the catalogue, or a recording's bytes."""

    code = "data_damaged"


class IndexUnavailable(ClaspError):
    """The vector store that was configured cannot run here as it is installed, or does not answer."""

    code = "index_unavailable"


class VoiceUnavailable(ClaspError):
    """A synthesiser or a voice that is not on this machine; says what to install."""

    code = "voice_unavailable"


class BackupFailed(ClaspError):
    """A backup could not be made, or not be put back, where or as things are; earlier ones still stand."""

    code = "backup_failed"


class ProcessingFailed(ClaspError):
    """Processing failed for a reason on our side; sending the same bytes again tries anew."""

    code = "processing_failed"


class QuotaExceeded(ClaspError):
    """The key's uploads hold as much as they may; deleting some makes room."""

    code = "quota_exceeded"


class QueueFull(ClaspError):
    """So many recordings wait to be embedded that no more are taken; the same call may succeed later."""

    code = "queue_full"


class DiskFull(ClaspError):
    """There is no room for what was to be written; nothing of it was kept."""

    code = "disk_full"


class NotReady(ClaspError):
    """The service is starting, stopping or overloaded; the same call may succeed later."""

    code = "not_ready"


class StoreUnavailable(NotReady):
    """The store of the recordings' bytes cannot be reached, or refuses; the same call may succeed later."""

    code = "store_unavailable"


class DatabaseUnavailable(NotReady):
    """The catalogue's database cannot be reached, or is too busy; the same call may succeed later."""

    code = "database_unavailable"
