"""`clasp capacity`: what a library of some size needs."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.common import AsJson, print_json, size, verbs

cli = verbs()

_INDEXES = "auto, flat, half, ivf, sq8"
_POSITIVE: dict[str, Any] = {"min": 1e-9}


@cli.command(help="How much memory, disk, processors and money a library needs, and what gives way first.")
def capacity(
    segments: Annotated[float | None, typer.Option(help="Segments in the library.", **_POSITIVE)] = None,
    hours: Annotated[float | None, typer.Option(help="Or hours of sound.", **_POSITIVE)] = None,
    recordings: Annotated[float | None, typer.Option(help="Or recordings.", **_POSITIVE)] = None,
    questions_per_s: Annotated[float, typer.Option(help="Questions a second.", **_POSITIVE)] = 1.0,
    hours_per_day: Annotated[float, typer.Option(help="New sound.", min=0)] = 0.0,
    backlog_days: Annotated[float, typer.Option(help="Days to embed what there is.", **_POSITIVE)] = 30.0,
    recording_minutes: Annotated[float, typer.Option(help="Length of a recording.", **_POSITIVE)] = 10.0,
    kbit_per_s: Annotated[float, typer.Option(help="Of the recordings' files.", **_POSITIVE)] = 64.0,
    model: Annotated[str, typer.Option(help="Its vectors and speed: mini, hybrid, paper, ...")] = "mini",
    dim: Annotated[int | None, typer.Option(help="Numbers of a vector, of another model.", min=1)] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            help="Hours of sound that a worker embeds in an hour: measured on your GPU.", **_POSITIVE
        ),
    ] = None,
    index: Annotated[str, typer.Option(help=f"One of {_INDEXES}.")] = "auto",
    machine_cores: Annotated[int, typer.Option(help="Of each machine.", min=1)] = 16,
    machine_memory_gb: Annotated[float, typer.Option(help="Of each machine.", **_POSITIVE)] = 64.0,
    machine_disk_tb: Annotated[float, typer.Option(help="Of each machine.", **_POSITIVE)] = 4.0,
    price_core: Annotated[
        float, typer.Option(help="A month of one; an example, as all prices.", min=0)
    ] = 20.0,
    price_memory_gb: Annotated[float, typer.Option(help="A month of it.", min=0)] = 3.0,
    price_disk_gb: Annotated[float, typer.Option(help="A month of it.", min=0)] = 0.10,
    price_object_gb: Annotated[float, typer.Option(help="A month of it, in an S3 store.", min=0)] = 0.02,
    price_gpu: Annotated[float, typer.Option(help="A month of one.", min=0)] = 1000.0,
    bench: Annotated[
        Path | None, typer.Option(help="Figures of your machine (make bench: bench-results/capacity.json).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    from clasp_core.capacity import (
        BYTES_OF_A_NUMBER,
        DIMS,
        MEASURED,
        Demand,
        Machine,
        Plan,
        Prices,
        read_figures,
    )

    figures = read_figures(bench or MEASURED)
    if sum(size is not None for size in (segments, hours, recordings)) != 1:
        raise typer.BadParameter("say how large it is by one of --segments, --hours and --recordings")
    if index != "auto" and index not in BYTES_OF_A_NUMBER:
        raise typer.BadParameter(f"--index is one of {_INDEXES}")
    if model != figures.model and speed is None:
        raise typer.BadParameter(
            f"--speed is needed with {model}: what was measured is {figures.model} on a CPU, and no GPU"
            " (python -m tests.bench.paper --device cuda tells yours)"
        )
    if dim is None and model not in (*DIMS, figures.model):
        raise typer.BadParameter(f"--dim is needed with {model}")
    if recordings is not None:
        hours = recordings * recording_minutes / 60
    if hours is not None:
        segments = hours * 3600 / figures.segment_s
    assert segments is not None
    plan = Plan(
        Demand(
            segments=segments,
            questions_per_s=questions_per_s,
            hours_per_day=hours_per_day,
            backlog_days=backlog_days,
            recording_s=60 * recording_minutes,
            kbit_per_s=kbit_per_s,
            dim=dim or DIMS.get(model, figures.dim),
            speed=speed,
            index=index,
        ),
        figures,
        Machine(machine_cores, 1e9 * machine_memory_gb, 1e12 * machine_disk_tb),
        Prices(price_core, price_memory_gb, price_disk_gb, price_object_gb, price_gpu),
    )
    if as_json:
        print_json(
            {
                "demand": asdict(plan.demand),
                "figures": asdict(figures),
                "machine": asdict(plan.machine),
                "prices": asdict(plan.prices),
                "plan": {name: getattr(plan, name) for name in _PLANNED}
                | {"vectors": {kind: plan.vectors(kind) for kind in BYTES_OF_A_NUMBER}},
                "limits": [asdict(limit) | {"share": limit.share} for limit in plan.limits],
            }
        )
        return
    unit = "GPUs" if speed is not None else "cores"
    memory = f"{plan.replicas} x {size(plan.replica_memory)}"
    rows = {
        "segments": f"{segments:,.0f}, {plan.hours:,.0f} h, {plan.recordings:,.0f} recordings",
        "profile": plan.profile,
        "vectors": ", ".join(f"{kind} {size(plan.vectors(kind))}" for kind in BYTES_OF_A_NUMBER),
        "index": f"{plan.index}, {'in each API replica' if plan.local else 'in Milvus'}",
        "catalogue": size(plan.catalogue),
        "recordings' files": size(plan.audio),
        "API replicas, memory": memory,
        "a question, of a core": f"{1000 * plan.figures.question_cpu_s:.0f} ms,"
        f" and {1000 * plan.search_cpu(plan.index):,.1f} ms to search",
        "Milvus query nodes": f"{plan.engine_nodes}, {size(plan.engine_memory)}"
        if not plan.local
        else "none",
        "workers, every day": f"{plan.steady_workers} {unit}",
        f"workers for {backlog_days:g} days at first": f"{plan.backlog_workers} {unit}",
        "database at most": f"{plan.transactions_per_s:,.1f} transactions/s,"
        f" {size(plan.database_bytes_per_s)}/s",
        "cores, memory, disk": f"{plan.cores:,.0f}, {size(plan.memory)}, {size(plan.disk)}",
        "machines": f"{plan.machines:,}",
        "cost a month, and once": f"{plan.month:,.0f}, {plan.backlog_cost:,.0f}",
    }
    width = max(map(len, rows))
    sys.stdout.write("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))
    sys.stdout.write("\n\nwhat gives way, first to last, and the way out\n")
    width = max(len(limit.what) for limit in plan.limits)
    for limit in plan.limits:
        of = f"{limit.used:,.4g} of {limit.allowed:,.4g} {limit.unit}"
        mark = "over " if limit.share > 1 else "     "
        sys.stdout.write(f"{mark} {limit.what:{width}}  {of:28}  {limit.way_out}\n")


_PLANNED = (
    *("profile", "hours", "recordings", "audio", "catalogue", "index", "replicas", "replica_memory"),
    *("engine_nodes", "engine_memory", "steady_workers", "backlog_workers", "transactions_per_s"),
    *("database_bytes_per_s", "cores", "memory", "disk", "machines", "month", "backlog_cost"),
)
