"""The capacity model: its arithmetic by hand, and its figures' origin; test_docs compares the tables."""

import json
import math
import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest

from clasp_core.capacity import MEASURED, Demand, Figures, Machine, Plan, Prices, read_figures
from clasp_core.errors import InvalidInput
from tests.service import ROOT, clasp

DOC = (ROOT / "docs" / "capacity.md").read_text()
FIGURES = Figures(
    model="round",
    machine="of one's own",
    dim=100,
    segment_s=5,
    embed_cpu_s_per_hour=360,
    catalogue_bytes_per_segment=600,
    catalogue_recordings_per_s=100,
    read_back_vectors_per_s=50_000,
    search_cpu_s_per_million_numbers=1e-4,
    ivf_visited=0.01,
    question_cpu_s=0.02,
    api_bytes=1e9,
    worker_bytes=2e9,
)


def test_a_size_that_can_be_counted_by_hand() -> None:
    """720,000 segments of 5 s are 1,000 hours, ten of which a core embeds in an hour."""
    demand = Demand(
        segments=720_000, questions_per_s=60, hours_per_day=144, backlog_days=1, recording_s=3600, dim=100
    )
    plan = Plan(demand, FIGURES, Machine(16, 64e9, 4e12), Prices(10, 1, 0.1, 0.01, 500))
    assert (plan.hours, plan.recordings, plan.speed) == (1000, 1000, 10)
    assert plan.audio == 1000 * 3600 * 8000
    assert plan.catalogue == 720_000 * 1000
    assert plan.vectors("flat") == 720_000 * 416
    assert plan.vectors("sq8") == 720_000 * 116
    assert plan.search_cpu("flat") == pytest.approx(0.0072)
    assert plan.index == "ivf"  # 32 questions take 0.23 s exactly
    assert plan.steady_workers == 1  # six hours an hour: 0.6 of a core
    assert plan.backlog_workers == math.ceil(1000 / 240)
    searched = 1e-4 * (7200 + 4 * math.sqrt(720_000)) * 100 / 1e6
    assert plan.question_cores == pytest.approx(60 * (0.02 + searched))
    assert plan.profile == "scaled"  # more than one process answers
    assert plan.replicas == 3
    assert plan.replica_memory == 1e9 + 720_000 * 416
    assert plan.cores == 3 + 1 + 4
    assert plan.machines == 1
    memory = 3 * plan.replica_memory + 2e9 + 0.1 * plan.catalogue
    disk = plan.catalogue + 3 * 720_000 * 416
    assert plan.month == pytest.approx(80 + memory / 1e9 + disk / 1e10 + plan.audio / 1e11)
    assert plan.backlog_cost == pytest.approx(100 / 730 * 10)


def test_more_never_needs_less() -> None:
    """Neither at the places where another index or profile is taken, nor between."""
    sizes = [10**power * step for power in range(3, 11) for step in (1, 2, 5)]
    plans = [
        Plan(Demand(segments=size, questions_per_s=5, hours_per_day=size / 1e5), FIGURES) for size in sizes
    ]
    for smaller, larger in pairwise(plans):
        assert smaller.catalogue < larger.catalogue
        assert smaller.replicas <= larger.replicas
        assert smaller.machines <= larger.machines
        assert [smaller.profile, larger.profile] != ["scaled", "single"]
    assert [plan.index for plan in plans] == sorted(
        (plan.index for plan in plans), key=["flat", "ivf", "sq8"].index
    )


def test_a_gpu_is_a_worker_of_the_speed_that_was_measured() -> None:
    """It is paid as such, and the cores' figures do not count."""
    plan = Plan(Demand(segments=720_000, hours_per_day=2400, speed=100, backlog_days=10), FIGURES)
    assert plan.steady_workers == 2
    assert plan.backlog_workers == 1
    other = Plan(replace(plan.demand), FIGURES, prices=Prices(gpu=2000))
    assert other.month - plan.month == pytest.approx(2000)


def test_figures_are_those_that_were_measured(tmp_path: Path) -> None:
    """The shipped ones stand in the docs; a file that is something else is refused."""
    shown = re.search(r"```json\n(.*?)```", DOC, re.DOTALL)
    assert shown
    assert json.loads(shown[1]) == json.loads(MEASURED.read_text()) == asdict(read_figures())
    other = tmp_path / "bench.json"
    other.write_text("[]")
    with pytest.raises(InvalidInput, match=r"bench\.json has no measured figures"):
        read_figures(other)


def test_the_command_line(tmp_path: Path) -> None:
    """JSON has all that the table has, figures of one's own count, and what nobody measured is asked for."""
    bench = tmp_path / "capacity.json"
    bench.write_text(json.dumps(asdict(FIGURES)))
    done = clasp("capacity", "--hours", 1000, "--model", "round", "--bench", bench, "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["demand"]["segments"] == 720_000
    assert told["figures"] == asdict(FIGURES)
    assert told["plan"]["hours"] == 1000
    assert [limit["share"] for limit in told["limits"]] == sorted(
        (limit["share"] for limit in told["limits"]), reverse=True
    )
    unknown = clasp("capacity", "--hours", 1000, "--model", "paper", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "--speed" in unknown.stderr
