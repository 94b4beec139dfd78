"""A task for the trainer that takes a second, with all that makes resuming hard: dropout, batch statistics,
orders drawn anew, a validation set that is soon learnt by heart.

    python -m tests.tiny_task FOLDER      train in FOLDER, killed again and again at random moments
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clasp_core.training.config import parse
from clasp_core.training.trainer import LoopConfig, ParameterGroup, fit

KILLED = {
    "mean": {
        "optimizer": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.05, "clip_norm": 1.0},
        "schedule": {"name": "cosine", "warmup_steps": 10},
        "training": {"epochs": 8, "average_last": 3, "watch": "loss", "patience": 7, "checkpoint_steps": 2},
    },
    "moving": {
        "optimizer": {"name": "adam", "learning_rate": 3e-3},
        "schedule": {"name": "step", "step_epochs": 3},
        "training": {"epochs": 8, "ema": 0.9, "checkpoint_steps": 3, "dtype": "bfloat16"},
    },
}


class TinyTask:
    """Which of four classes a noisy point is of."""

    def __init__(self, seed: int = 0, noise: float = 3.0, dropout: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(4, 16, generator=generator)
        self.labels = torch.arange(120) % 4
        self.points = centres[self.labels] + noise * torch.randn(120, 16, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module: nn.Module = nn.Sequential(
                nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 4)
            )
        self._seed = seed

    def groups(self) -> Sequence[ParameterGroup]:
        first, *others = self.module.parameters()
        return [ParameterGroup([first], rate=0.5, decays=False), ParameterGroup(others)]

    def batches(self, epoch: int) -> Sequence[Tensor]:
        order = np.random.default_rng([self._seed, epoch]).permutation(80)
        return list(torch.from_numpy(order).split(8))

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.module(self.points[batch]).float(), self.labels[batch])

    def validate(self) -> Mapping[str, float]:
        scores, labels = self.module(self.points[80:]), self.labels[80:]
        right = (scores.argmax(1) == labels).float().mean()
        return {"loss": float(F.cross_entropy(scores, labels)), "hits@1": float(right)}


def weights(task: TinyTask) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.module.state_dict().items()}


def loop(**sections: object) -> LoopConfig:
    return parse(LoopConfig, sections, Path())


def _killed(folder: Path) -> None:
    """Fork, train, kill after a while, until a child lives to the end; then the next configuration."""
    torch.set_num_threads(1)
    fit(TinyTask(), loop(training={"epochs": 1}), folder / "warm.state")  # torch loads much at the first step
    delays = random.Random(folder.name)
    kills = {}
    for name, sections in KILLED.items():
        for attempt in range(200):
            if (child := os.fork()) == 0:
                task = TinyTask()
                history = fit(task, loop(**sections), folder / f"{name}.state")
                save_file(weights(task), folder / f"{name}.safetensors")
                (folder / f"{name}.json").write_text(json.dumps(history))
                os._exit(0)
            time.sleep(delays.uniform(0.0, 0.02 + attempt / 50))
            os.kill(child, signal.SIGKILL)  # a child that has ended is not reaped yet: it hears nothing
            _, status = os.waitpid(child, 0)
            if status == 0:
                break
            assert os.WIFSIGNALED(status), "training failed by itself"
        kills[name] = attempt
    print(json.dumps(kills))


if __name__ == "__main__":
    _killed(Path(sys.argv[1]))
