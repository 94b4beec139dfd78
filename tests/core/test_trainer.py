"""The training loop: what it keeps, when it stops, and that a killed run ends as if nothing had happened."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clasp_core.errors import InvalidField, ProcessingFailed
from clasp_core.training.trainer import ScheduleConfig, fit
from tests.tiny_task import KILLED, TinyTask, loop, weights


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums over more threads may differ in their last bit from one machine's moment to the next."""
    torch.set_num_threads(1)


def trained(folder: Path, **sections: object) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """A tiny task's weights and history after a run of its own."""
    task = TinyTask()
    number = len(list(folder.iterdir()))
    history = fit(task, loop(**sections), folder / f"{number}.state")
    return weights(task), history


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Training takes hours on machines that are taken away: a resumed run must be the run, not its cousin."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.tiny_task", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, kills in json.loads(done.stdout).items():
        assert kills >= 3, f"{name} was hardly disturbed"
        (tmp_path / "calm").mkdir(exist_ok=True)
        expected, history = trained(tmp_path / "calm", **KILLED[name])
        assert_same(load_file(tmp_path / f"{name}.safetensors"), expected)
        killed = json.loads((tmp_path / f"{name}.json").read_text())
        for epochs in (killed, history):
            for epoch in epochs:
                epoch.pop("seconds")
        assert killed == history


def test_a_run_that_was_complete_is_over_at_once(tmp_path: Path) -> None:
    """A kill between the last epoch and the model folder must not cost the training."""
    sections = {"training": {"epochs": 4, "watch": "loss"}}
    first, again = TinyTask(), TinyTask()
    history = fit(first, loop(**sections), tmp_path / "state")
    again.batches = None  # type: ignore[assignment, method-assign]
    assert fit(again, loop(**sections), tmp_path / "state") == history
    assert_same(weights(first), weights(again))


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    """What is served is the epoch that was best on validation, not the one that happened to be last."""
    rate = {"optimizer": {"learning_rate": 0.01}}
    stopped, history = trained(tmp_path, **rate, training={"epochs": 60, "watch": "loss", "patience": 4})
    losses = [epoch["validation_loss"] for epoch in history]
    best = losses.index(min(losses))
    assert len(history) == best + 5 < 60, "it stops after four epochs without a better one"
    until_best, _ = trained(tmp_path, **rate, training={"epochs": best + 1})
    assert_same(stopped, until_best)

    chosen, history = trained(tmp_path, **rate, training={"epochs": 12, "watch": "hits@1"})
    hits = [epoch["validation_hits@1"] for epoch in history]
    assert hits.index(max(hits)) < 11
    until_best, _ = trained(tmp_path, **rate, training={"epochs": hits.index(max(hits)) + 1})
    assert_same(chosen, until_best)


def test_averages_are_the_means_they_are_called(tmp_path: Path) -> None:
    """Against runs that end where the average looks: the last epochs' mean, the moving one's recursion."""
    after = [trained(tmp_path, training={"epochs": epochs})[0] for epochs in (1, 2, 3)]
    mean, _ = trained(tmp_path, training={"epochs": 3, "average_last": 2})
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (after[1][name] + after[2][name]) / 2)
    assert int(mean["1.num_batches_tracked"]) == 30

    class OneStep(TinyTask):
        def batches(self, epoch: int) -> list[Tensor]:
            return [torch.arange(8) + 8 * epoch]

    points = [weights(OneStep())]
    for epochs in (1, 2):
        task = OneStep()
        fit(task, loop(training={"epochs": epochs}), tmp_path / f"plain-{epochs}")
        points.append(weights(task))
    averaged = OneStep()
    fit(averaged, loop(training={"epochs": 2, "ema": 0.75}), tmp_path / "moving")
    for name, tensor in weights(averaged).items():
        if tensor.is_floating_point():
            expected = 0.75 * (0.75 * points[0][name] + 0.25 * points[1][name]) + 0.25 * points[2][name]
            torch.testing.assert_close(tensor, expected)


def test_the_step_schedule_is_the_notebooks(tmp_path: Path) -> None:
    """StepLR(100, 0.4) of TE 16, by torch's own class; and a cosine that rises, and falls to nothing."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 5e-6)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, 100, 0.4)
    ours = ScheduleConfig("step")
    for epoch in range(250):
        assert 5e-6 * ours.factor(epoch * 10, epoch, 2500) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    cosine = ScheduleConfig("cosine", warmup_steps=4)
    factors = [cosine.factor(step, 0, 104) for step in range(104)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[54] == pytest.approx(0.5)
    assert factors[103] < 0.001


def test_a_schedule_may_reach_beyond_the_training(tmp_path: Path) -> None:
    """A mean of weights wants steps that are still large: the run is the first part of a longer one."""
    _, whole = trained(tmp_path, schedule={"name": "cosine"}, training={"epochs": 4})
    _, part = trained(tmp_path, schedule={"name": "cosine", "epochs": 4}, training={"epochs": 2})
    assert [(epoch["loss"], epoch["learning_rate"]) for epoch in part] == [
        (epoch["loss"], epoch["learning_rate"]) for epoch in whole[:2]
    ]
    _, history = trained(
        tmp_path, schedule={"name": "step", "step_epochs": 2, "gamma": 0.1}, training={"epochs": 4}
    )
    assert [epoch["learning_rate"] for epoch in history] == pytest.approx([5e-4, 5e-4, 5e-5, 5e-5])


def test_a_group_s_rate_and_the_gradients_norm_are_kept(tmp_path: Path) -> None:
    """An encoder that is adapted at the fusion's rate forgets; one bad batch must not undo an epoch."""
    task = TinyTask()
    before = weights(task)
    fit(
        task,
        loop(optimizer={"learning_rate": 1e-3, "clip_norm": 0.01}, training={"epochs": 1}),
        tmp_path / "state",
    )
    gradients = torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None])
    assert float(gradients.norm()) == pytest.approx(0.01, rel=1e-3)
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in weights(task).items()}
    assert 0 < moved["0.weight"] <= 10 * 0.5e-3 * 1.01, "ten of Adam's steps at half the rate"
    assert moved["4.weight"] > moved["0.weight"]


def test_bfloat16_learns_and_leaves_float32(tmp_path: Path) -> None:
    """Four times faster here, and of no use if weights lost their small steps in it."""
    half, history = trained(
        tmp_path, optimizer={"learning_rate": 0.01}, training={"epochs": 15, "dtype": "bfloat16"}
    )
    assert history[-1]["loss"] < history[0]["loss"] * 0.7
    assert all(t.dtype == torch.float32 for t in half.values() if t.is_floating_point())
    full, _ = trained(tmp_path, optimizer={"learning_rate": 0.01}, training={"epochs": 15})
    assert not torch.equal(half["4.weight"], full["4.weight"])


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    """A diverged run saved as a model would give vectors, and nobody would know."""
    task = TinyTask()
    task.points[:80] *= 1e38
    with pytest.raises(ProcessingFailed, match="step 0"):
        fit(task, loop(), tmp_path / "state")
    with pytest.raises(InvalidField, match=r"mrr.*loss, hits@1"):
        fit(TinyTask(), loop(training={"watch": "mrr"}), tmp_path / "other")


def test_curves_are_drawn_where_tensorboard_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Losses while it runs; without the extra, one line says so and training is the same."""
    pytest.importorskip("tensorboard", reason="the extra `train` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with_curves, without = TinyTask(), TinyTask()
    history = fit(with_curves, loop(training={"epochs": 2}), tmp_path / "a", curves=tmp_path / "curves")
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert len(events.Scalars("loss")) == 20
    drawn = [event.value for event in events.Scalars("epoch/loss")]
    assert drawn == pytest.approx([epoch["loss"] for epoch in history])
    assert len(events.Scalars("epoch/validation_hits@1")) == 2

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        fit(without, loop(training={"epochs": 2}), tmp_path / "b", curves=tmp_path / "none")
    (warning,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "clasp-search[train]" in warning
    assert_same(weights(with_curves), weights(without))
