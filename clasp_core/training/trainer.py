"""The training loop: one for everything that is trained here.

A `Task` says what is learnt; the loop owns optimiser, schedule, averaging, early stopping and the state
on disk. That state is complete: a run that is killed at any moment and started again ends with the very
weights, bit for bit, of a run that was left alone (on the CPU of one machine, with the same number of
threads; on a GPU sums may take another order).
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clasp_core.durability import place
from clasp_core.errors import InvalidField, ProcessingFailed
from clasp_core.models import resolve_device
from clasp_core.training.config import require

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """[optimizer]"""

    name: Literal["adam", "adamw"] = "adamw"
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    """Largest norm of all gradients together; 0: as they are."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optimizer.learning_rate must be above 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay may not be negative")
        require(self.clip_norm >= 0, "optimizer.clip_norm may not be negative")


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """[schedule]: what the learning rate is multiplied with. All begin with `warmup_steps` of a linear rise.

    `step` is torch's StepLR, as in the notebooks (TE 16: 100 epochs, 0.4); `cosine` falls to 0 over `epochs`
    (0: those of the training). Means of weights, such as `average_last`, want rates that have not fallen yet.
    """

    name: Literal["constant", "step", "cosine"] = "constant"
    warmup_steps: int = 0
    epochs: int = 0
    step_epochs: int = 100
    gamma: float = 0.4

    def __post_init__(self) -> None:
        require(self.step_epochs > 0, "schedule.step_epochs must be above 0")
        require(min(self.warmup_steps, self.epochs) >= 0, "no number in schedule may be negative")

    def factor(self, step: int, epoch: int, steps: int) -> float:
        """At a step (from 0, over all epochs) of about `steps` that the schedule is for."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "step":
            return self.gamma ** (epoch // self.step_epochs)
        if self.name == "cosine":
            passed = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, passed)))
        return 1.0


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """[training]: the loop itself."""

    epochs: int = 30
    batch_size: int = 64
    seed: int = 0
    average_last: int = 0
    """The weights that are kept are the mean of those at the ends of the last so many epochs; 0: no mean."""
    ema: float = 0.0
    """Or the exponential moving average over steps with this decay; 0: none. Batch statistics too."""
    watch: Literal["loss", "hits@1", "mrr"] | None = None
    """The figure on the validation split whose best epoch is kept; None keeps the last."""
    patience: int = 0
    """Stop after so many epochs without a better figure; 0: never."""
    checkpoint_steps: int = 0
    """Also save the state every so many steps of an epoch; it is saved at the end of each anyway."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrix products by autocast; weights, losses and averages stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """0 leaves torch's own choice."""
    tensorboard: Path | None = None
    """Folder for TensorBoard's curves, one run by each output's name; needs the extra `train`."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, "training.epochs must be above 0")
        require(self.batch_size > 1, "training.batch_size must be above 1")
        require(0 <= self.ema < 1, "training.ema must be within 0 and 1")
        require(
            not (self.ema and self.average_last), "training.ema and training.average_last exclude each other"
        )
        require(not self.patience or self.watch is not None, "training.patience needs training.watch")
        require(
            min(self.seed, self.average_last, self.patience, self.checkpoint_steps, self.threads) >= 0,
            "no number in training may be negative",
        )


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """What the loop needs to know."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


class ParameterGroup(NamedTuple):
    """Parameters with a learning rate of their own, as a multiple of the optimiser's."""

    parameters: Sequence[nn.Parameter]
    rate: float = 1.0
    decays: bool = True


class Task(Protocol):
    """What is learnt."""

    @property
    def module(self) -> nn.Module:
        """All that is trained, and all that it is trained through; what is frozen requires no gradients."""
        ...

    def groups(self) -> Sequence[ParameterGroup]:
        """The trained parameters, each once, always in the same order."""
        ...

    def batches(self, epoch: int) -> Sequence[Any]:
        """What `loss` takes, one after the other: a pure function of the task's seed and the epoch (from 0).

        Cheap to make and to skip over; what a batch stands for is read when its loss is asked for.
        """
        ...

    def loss(self, batch: Any) -> Tensor:  # noqa: ANN401 - the task's own
        """A scalar with gradients; what it draws at random comes from torch's global generators."""
        ...

    def validate(self) -> Mapping[str, float]:
        """Figures of the module as it is, in eval mode, without gradients; none where nothing validates."""
        ...


Progress: TypeAlias = Callable[[str, int, int, str], None]
"""Told how far a stage is: its name, what is done, of how much, and a word on how it goes."""


def draw(weights: NDArray[np.float64], random: np.random.Generator) -> list[int]:
    """Places of examples in random order, each about as often as its weight says."""
    times = np.floor(weights + random.random(len(weights))).astype(int)
    drawn: list[int] = random.permutation(np.repeat(np.arange(len(times)), times)).tolist()
    return drawn


def silent(stage: str, done: int, total: int, note: str) -> None:
    """Tells nobody."""


Weights: TypeAlias = dict[str, Tensor]


@dataclass(slots=True)
class _State:
    """Where a run is; with weights, optimiser and generators, all that its future depends on."""

    epoch: int = 0
    batch: int = 0
    """Batches of `epoch` that are done."""
    step: int = 0
    loss: float = 0.0
    """Sum over those batches."""
    seconds: float = 0.0
    done: bool = False
    best: float | None = None
    since_best: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


_LOWER_IS_BETTER = ("loss",)


def fit(
    task: Task,
    config: LoopConfig,
    checkpoint: Path,
    *,
    stage: str = "training",
    curves: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """Train a task's module in place: it ends with the weights to keep, in eval mode, on its device.

    checkpoint: the state's file. Where it exists, the run goes on from it, or is over at once if it was
        complete; it stays behind, and is the caller's to remove once the result is safe. Its folder must
        not be that of a run with another configuration or other data.
    curves: TensorBoard's folder.

    Returns each epoch's `epoch`, `loss`, `learning_rate`, `seconds`, and what `validate` gave, as
    `validation_...`. Raises ProcessingFailed where a loss is not finite, InvalidField where the task does
    not have the figure that is watched, ModelUnavailable for a device that is not there.
    """
    device = resolve_device(config.training.device)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(config.training.seed)
        run = _Run(task, config, device, checkpoint, stage)
        with _curves(curves, run.state.step) as draw:
            while not run.state.done:
                for note in run.epoch(draw):
                    progress(stage, run.state.step, run.steps, note)
    task.module.eval()
    return run.state.history


class _Run:
    """One task being trained."""

    def __init__(
        self, task: Task, config: LoopConfig, device: torch.device, checkpoint: Path, stage: str
    ) -> None:
        self.state = _State()
        self.steps = 0
        self._scheduled = 0
        self._task = task
        self._config = config
        self._device = device
        self._path = checkpoint
        self._stage = stage
        self._module = task.module.to(device)
        self._best: Weights = {}
        self._recent: list[Weights] = []
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer.name]
        groups = task.groups()
        self._rates = [config.optimizer.learning_rate * group.rate for group in groups]
        self._optimizer: torch.optim.Optimizer = kind(
            [
                {
                    "params": list(group.parameters),
                    "weight_decay": config.optimizer.weight_decay if group.decays else 0.0,
                }
                for group in groups
            ],
            config.optimizer.learning_rate,
        )
        self._average = _copied(_trained(self._module)) if config.training.ema else {}
        if checkpoint.exists():
            self._restore()
        if not self.state.done:
            batches = len(task.batches(0))
            self.steps = config.training.epochs * batches
            self._scheduled = (config.schedule.epochs or config.training.epochs) * batches
            require(self.steps > 0, "there is too little to learn from to fill one batch")

    def epoch(self, draw: "_Draw") -> Iterator[str]:
        """Go on to the end of the current epoch, yielding a word after each step."""
        state, training = self.state, self._config.training
        batches = self._task.batches(state.epoch)
        self._module.train()
        begun = time.monotonic() - state.seconds
        while state.batch < len(batches):
            loss = self._step(batches[state.batch])
            draw("loss", loss, state.step)
            state.loss += loss
            state.batch += 1
            state.step += 1
            state.seconds = time.monotonic() - begun
            if training.checkpoint_steps and state.batch % training.checkpoint_steps == 0:
                self._save()
            yield f"epoch {state.epoch + 1} of {training.epochs}, loss {state.loss / state.batch:.3f}"
        self._close_epoch(begun)
        for name, value in state.history[-1].items():
            if name not in ("epoch", "seconds"):
                draw(f"epoch/{name}", value, state.step)

    def _step(self, batch: object) -> float:
        state, config = self.state, self._config
        factor = config.schedule.factor(state.step, state.epoch, self._scheduled)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        half = config.training.dtype == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            loss = self._task.loss(batch)
        value = loss.item()
        if not math.isfinite(value):
            raise ProcessingFailed(
                f"The loss is {value} at step {state.step}, in epoch {state.epoch + 1}:"
                " try a lower learning rate."
            )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if config.optimizer.clip_norm:
            trained = [p for group in self._optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm)
        self._optimizer.step()
        if self._average:
            _blend(self._average, _trained(self._module), config.training.ema)
        return value

    def _close_epoch(self, begun: float) -> None:
        """Validate, keep what is best, and decide whether this was the last epoch."""
        state, training = self.state, self._config.training
        if training.average_last and (
            training.watch or state.epoch >= training.epochs - training.average_last
        ):
            self._recent = [*self._recent, _copied(_trained(self._module))][-training.average_last :]
        kept = self._average or (_mean(self._recent) if self._recent else None)
        self._module.eval()
        with torch.no_grad(), _exchanged(self._module, kept):
            figures = self._task.validate()
            self._compare(figures)
        state.seconds = time.monotonic() - begun
        factor = self._config.schedule.factor(state.step - 1, state.epoch, self._scheduled)
        state.history.append(
            {
                "epoch": state.epoch,
                "loss": state.loss / max(1, state.batch),
                "learning_rate": self._config.optimizer.learning_rate * factor,
                "seconds": round(state.seconds, 3),
                **{f"validation_{name}": value for name, value in figures.items()},
            }
        )
        told = ", ".join(
            f"{name} {value:.5g}" for name, value in state.history[-1].items() if name != "epoch"
        )
        _log.info("%s, epoch %d of %d: %s", self._stage, state.epoch + 1, training.epochs, told)
        state.epoch, state.batch, state.loss, state.seconds = state.epoch + 1, 0, 0.0, 0.0
        state.done = state.epoch == training.epochs or 0 < training.patience <= state.since_best
        if state.done:
            final = self._best or kept
            if final is not None:
                _fill(self._module, final)
        self._save()

    def _compare(self, figures: Mapping[str, float]) -> None:
        """Note the module's weights, as they are now, if the watched figure was never better."""
        state, watch = self.state, self._config.training.watch
        if watch is None:
            return
        if watch not in figures:
            raise InvalidField(
                f"training.watch is {watch!r}, which this task does not have;"
                f" it has: {', '.join(figures) or 'none'}."
            )
        figure = figures[watch] if watch not in _LOWER_IS_BETTER else -figures[watch]
        if state.best is None or figure > state.best:
            state.best, state.since_best = figure, 0
            self._best = _copied(_trained(self._module))
        else:
            state.since_best += 1

    # --- the state on disk

    def _save(self) -> None:
        """Put the state in place of the last one, whole: safetensors, its numbers as JSON in the header."""
        tensors = {f"weights.{name}": tensor for name, tensor in _trained(self._module).items()}
        if not self.state.done:
            tensors |= self._what_goes_on()
        temporary = self._path.with_suffix(".tmp")
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            {"format": "clasp-checkpoint/1", "state": json.dumps(self.state.as_json())},
        )
        place(temporary, self._path)

    def _what_goes_on(self) -> Weights:
        named = {f"average.{name}": tensor for name, tensor in self._average.items()}
        named |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for number, weights in enumerate(self._recent):
            named |= {f"recent.{number}.{name}": tensor for name, tensor in weights.items()}
        for number, values in self._optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
        named["random.cpu"] = torch.get_rng_state()
        if self._device.type == "cuda":
            named["random.cuda"] = torch.cuda.get_rng_state(self._device)
        return named

    def _restore(self) -> None:
        try:
            with safe_open(self._path, "pt") as file:
                self.state = _State(**json.loads(file.metadata()["state"]))
                # copies, in memory aligned as torch aligns its own: sums over it then take the same order
                stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, TypeError) as error:
            raise ProcessingFailed(
                f"The state of this training cannot be read; remove {self._path} to begin anew: {error}."
            ) from error
        _fill(self._module, _below(stored, "weights."))
        if self.state.done:
            return
        self._average = {name: value.to(self._device) for name, value in _below(stored, "average.").items()}
        self._best = {name: value.to(self._device) for name, value in _below(stored, "best.").items()}
        recent: dict[int, Weights] = {}
        for name, tensor in _below(stored, "recent.").items():
            number, _, rest = name.partition(".")
            recent.setdefault(int(number), {})[rest] = tensor.to(self._device)
        self._recent = [recent[number] for number in sorted(recent)]
        moments: dict[int, Weights] = {}
        for name, tensor in _below(stored, "optimizer.").items():
            number, _, rest = name.partition(".")
            moments.setdefault(int(number), {})[rest] = tensor
        self._optimizer.load_state_dict(
            {"state": moments, "param_groups": self._optimizer.state_dict()["param_groups"]}
        )
        torch.set_rng_state(stored["random.cpu"])
        if "random.cuda" in stored and self._device.type == "cuda":
            torch.cuda.set_rng_state(stored["random.cuda"], self._device)
        _log.info("going on at step %d, in epoch %d", self.state.step, self.state.epoch + 1)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _trained(module: nn.Module) -> Weights:
    """What training changes: parameters that require gradients, and buffers."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def _copied(weights: Weights) -> Weights:
    return {name: value.clone() for name, value in weights.items()}


@torch.no_grad()
def _fill(module: nn.Module, weights: Weights) -> None:
    trained = _trained(module)
    assert trained.keys() == weights.keys(), "a checkpoint of another task"
    for name, tensor in trained.items():  # views of the module's own
        tensor.copy_(weights[name])


def _mean(all_weights: Sequence[Weights]) -> Weights:
    """The mean of floating-point entries, the last of others (BatchNorm's counts of batches)."""
    return {
        name: torch.stack([weights[name] for weights in all_weights]).mean(0)
        if last.is_floating_point()
        else last
        for name, last in all_weights[-1].items()
    }


def _blend(average: Weights, weights: Weights, decay: float) -> None:
    for name, value in weights.items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


@contextmanager
def _exchanged(module: nn.Module, weights: Weights | None) -> Iterator[None]:
    """The module with other weights while the block runs."""
    if weights is None:
        yield
        return
    own = _copied(_trained(module))
    _fill(module, weights)
    try:
        yield
    finally:
        _fill(module, own)


class _Draw(Protocol):
    def __call__(self, name: str, value: float, step: int) -> None: ...


@contextmanager
def _curves(folder: Path | None, step: int) -> Iterator[_Draw]:
    """What draws a point of TensorBoard's curves; points from `step` on, of a run that was killed, go."""

    def nothing(name: str, value: float, step: int) -> None:
        """Training does without."""

    writer: Any = None
    if folder is not None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder), purge_step=step)
        except ImportError:
            _log.warning(
                "TensorBoard is not installed (pip install 'clasp-search[train]'): no curves;"
                " every epoch's figures will be in training.json all the same."
            )
    if writer is None:
        yield nothing
        return
    try:
        yield writer.add_scalar
    finally:
        writer.close()
