"""How much of what a library of some size needs: arithmetic on measured figures, and no more."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    model: str
    machine: str
    dim: int
    segment_s: float
    embed_cpu_s_per_hour: float
    catalogue_bytes_per_segment: float
    catalogue_recordings_per_s: float
    read_back_vectors_per_s: float
    search_cpu_s_per_million_numbers: float
    ivf_visited: float
    question_cpu_s: float
    api_bytes: float
    worker_bytes: float
