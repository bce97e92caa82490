"""The supervised training loop: one process or many, first-order and natural-gradient optimizers alike."""

from __future__ import annotations

import inspect
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from npg.parallel import World
from npg.step import StepReport
from npg.vision.config import Config
from npg.vision.data import ImageData
from npg.vision.loader import Normalization, TrainLoader, split_validation
from npg.vision.models import model_from_name
from npg.vision.optimizers import make_optimizer, takes_batches
from npg.vision.run_folder import CheckpointError, RunFolder, load_checkpoint
from npg.vision.timing import Mark, Stopwatch

__all__ = ["EVALUATION_BATCH", "THRESHOLDS", "Trainer", "TrainingStopped", "hits", "learning_rate_factor"]

#: Accuracies, in percent, to which epochs and seconds are counted in a run's summary.
THRESHOLDS = (60, 70, 75, 80, 85, 90, 92, 94)
#: Steps between the looks that the host takes at a CUDA device; on the CPU, where looking is free, it is every step.
LOOK_EVERY = 50
EVALUATION_BATCH = 500
#: DistributedDataParallel's option for copying the main process's buffers at every step, as this PyTorch calls it.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
#: What a natural step's report adds to the metrics, as means over an epoch's steps.
REPORTED = (
    "accepted",
    "predicted_gain",
    "actual_gain",
    "predicted_kl",
    "kl",
    "iterations",
    "residual",
    "backtracks",
    "damping",
    "step_norm",
)


class TrainingStopped(RuntimeError):
    """Training ended before its last epoch, on all processes alike; the checkpoints are of whole, finite epochs."""


def learning_rate_factor(config: Config, step: int, total: int) -> float:
    """What the learning rate of step `step` out of `total` is multiplied by.

    Linear warm-up, (t + 1) / T_w over the first T_w steps; then γ^(milestones passed), ½(1 + cos πt/T), or 1.
    """
    warmup = round(config.warmup * total)
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    progress = step / total
    if config.schedule == "step":
        return float(factor * config.gamma ** sum(progress >= m for m in config.milestones))
    if config.schedule == "cosine":
        return factor * 0.5 * (1.0 + math.cos(math.pi * progress))
    return factor


class Trainer:
    """Trains a model as a `Config` says, epoch by epoch, and evaluates it after each.

    Under several processes each holds the whole model and 1/N of every batch. Gradients are averaged by
    DistributedDataParallel, or with ``average_every`` the parameters are, every that many steps; BatchNorm's running
    statistics are averaged at the end of each epoch, before the evaluation.

    Args:
        config: the run.
        data: the images.
        run_dir: the run's folder, which must not exist, except to go on with a checkpoint.
        world: this process among its peers.
        checkpoint: a file to go on from.
        model: the model, where it is not the one that ``config.model`` names.

    Raises:
        ValueError: the configuration does not fit the data, the processes or the model; nothing is written yet.
        CheckpointError: the checkpoint is damaged, or of another run.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        run_dir: Path,
        world: World,
        *,
        checkpoint: Path | None = None,
        model: nn.Module | None = None,
    ) -> None:
        state = None if checkpoint is None else self._matching_checkpoint(checkpoint, config, world)
        self.config, self.world = config, world
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = world.device
        if config.sync_bn and device.type != "cuda":
            raise ValueError("sync_bn must be off on a CPU: PyTorch synchronises BatchNorm on CUDA only")
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        elif device.type == "cuda":
            torch.backends.cudnn.benchmark = True

        torch.manual_seed(config.seed)
        if model is None:
            model = model_from_name(config.model, len(data.classes), dropout=config.dropout)
        if config.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device)
        self.model = self.model.to(memory_format=layout)  # type: ignore[call-overload]
        dtype = next(self.model.parameters()).dtype
        self._prepare_data(data, Normalization(config.mean, config.std, device, dtype, layout))
        self.total_steps = config.epochs * len(self.loader)
        self.stopwatch = Stopwatch(device)
        self.optimizer = make_optimizer(
            config.optimizer,
            self.model,
            config.optimizer_options,
            decay_all=config.decay_all,
            process_group=None if config.average_every else world.group,
        )
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.averager: PeriodicModelAverager | None = None
        self.forward = self._distributed_forward()
        self.ema: AveragedModel | None = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        torch.manual_seed(config.seed + world.rank)  # dropout and sampled labels differ from process to process

        self.epoch, self.seconds, self._stop_signal = 0, 0.0, 0
        self.accuracy = -math.inf  # after the last epoch, in percent
        if state is not None:
            self._restore(state)
        self.folder: RunFolder | None = world.main_first(lambda: self._open_folder(run_dir, checkpoint))

    # --- setting up

    def _prepare_data(self, data: ImageData, normalize: Normalization) -> None:
        config, device = self.config, self.world.device
        images, labels = data.train_images, data.train_labels
        test = (torch.from_numpy(data.test_images).to(device), torch.from_numpy(data.test_labels).to(device))
        if config.eval_on == "test":
            train = split_validation(len(images), 1)[0] if config.limit_train else slice(None)
            self.evaluation, self.test = test, None
        else:
            train, held_out = split_validation(len(images), config.validation_size)
            self.evaluation = (
                torch.from_numpy(images[held_out]).to(device),
                torch.from_numpy(labels[held_out]).to(device),
            )
            self.test = test
        images, labels = images[train], labels[train]
        if config.limit_train and config.limit_train > len(images):
            raise ValueError(f"limit_train must be at most {len(images)} here; got {config.limit_train}")
        self.normalize = normalize
        self.loader = TrainLoader(
            images[: config.limit_train],
            labels[: config.limit_train],
            config.batch_size,
            normalize,
            seed=config.seed,
            augment=config.augment,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def _distributed_forward(self) -> Callable[[Tensor], Tensor]:
        """What is called to train: the model, in DistributedDataParallel where there are peers, compiled if asked."""
        config, world = self.config, self.world
        forward: nn.Module = self.model
        if world.group is not None and config.average_every:
            # The averager counts from 0: with this warm-up it first averages after step K, then after 2K, 3K, …
            self.averager = PeriodicModelAverager(
                config.average_every, warmup_steps=config.average_every - 1, process_group=world.group
            )
        elif world.group is not None and not takes_batches(config.optimizer):
            own_buffers: dict[str, Any] = {_SYNC_BUFFERS: False}  # they are averaged at the end of an epoch
            forward = DistributedDataParallel(
                self.model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                process_group=world.group,
                gradient_as_bucket_view=True,
                **own_buffers,
            )
            forward.register_comm_hook(world.group, self.stopwatch.all_reduce_hook)
        return torch.compile(forward) if config.compile else forward

    def _open_folder(self, run_dir: Path, checkpoint: Path | None) -> RunFolder | None:
        return RunFolder(run_dir, self.config, checkpoint, self.epoch) if self.world.is_main else None

    # --- training

    def run(self) -> dict[str, Any]:
        """Train to the last epoch; returns the run's summary, in the main process (elsewhere it is empty).

        Raises:
            TrainingStopped: a loss is not finite, or SIGINT or SIGTERM came; the last checkpoint stays.
        """
        bar = tqdm(
            total=self.total_steps,
            initial=self.epoch * len(self.loader),
            unit=" steps",
            dynamic_ncols=True,
            disable=True if not self.world.is_main else None,
        )
        try:
            with bar, self._catching_signals():
                stop = math.inf if self.config.stop_above is None else self.config.stop_above
                while self.epoch < self.config.epochs and self.accuracy <= stop:
                    row = self._train_epoch(bar)
                    row |= self._evaluate_epoch()
                    self.epoch += 1
                    self.accuracy = row[f"{self.config.eval_on}_top1"]
                    self._write_epoch(row)
            return self._summary()
        finally:
            if self.folder is not None:
                self.folder.close()

    def _train_epoch(self, bar: tqdm[Any]) -> dict[str, float]:
        """One pass over the training part; returns its metrics."""
        device, steps = self.world.device, len(self.loader)
        losses = torch.zeros(steps, device=device, dtype=torch.float64)
        correct = torch.zeros(2, device=device, dtype=torch.float64)
        look_every = LOOK_EVERY if device.type == "cuda" else 1
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        reports: dict[str, list[float]] = {}
        self.model.train()
        begun = self.stopwatch.mark()
        for step, (inputs, targets) in enumerate(self.loader):
            factor = learning_rate_factor(self.config, self.epoch * steps + step, self.total_steps)
            for group, rate in zip(self.optimizer.param_groups, self._base_rates):
                group["lr"] = rate * factor
            if takes_batches(self.config.optimizer):
                losses[step] = self._natural_step(inputs, targets, reports)
            else:
                losses[step], logits = self._train_step(inputs, targets)
                correct += hits(logits, targets)
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            if (step + 1) % look_every == 0 or step + 1 == steps:
                first = step - step % look_every
                self._look(losses, first, step)
                bar.update(step + 1 - first)
                bar.set_postfix_str(f"epoch {self.epoch + 1}, loss {float(losses[step]):.3f}", refresh=False)
        averaged = [self.model] if self.ema is None else [self.model, self.ema]
        for model in averaged:  # BatchNorm's running statistics, of which each process has seen its own batches
            self.world.average_(model.buffers())
            if self.averager is not None:
                self.world.average_(p.data for p in model.parameters())
        self.stopwatch.lap("epoch", begun)
        seconds = self.stopwatch.read()
        self.seconds += seconds["epoch"]
        counts = self.world.sum_(torch.cat((losses.sum().reshape(1), correct))).tolist()
        images = steps * self.config.batch_size
        accuracy = {"train_top1": 100.0 * counts[1] / images, "train_top5": 100.0 * counts[2] / images}
        return {
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * steps,
            "seconds": self.seconds,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": counts[0] / (steps * self.world.size),
            **({} if takes_batches(self.config.optimizer) else accuracy),
            **{f"natural_{name}": _finite_mean(values) for name, values in reports.items()},
            **{
                f"seconds_{name}": seconds.get(name, 0.0) / steps
                for name in ("forward_backward", "optimizer", "communication")
            },
            "seconds_step": seconds["epoch"] / steps,
            "memory_peak_bytes": _peak_memory(device),
        }

    def _train_step(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; returns the loss and the logits of this process's part of the batch."""
        now = self.stopwatch.mark()
        with self._autocast():
            logits = self.forward(inputs)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        loss.backward()
        now = self.stopwatch.lap("forward_backward", now)
        self.optimizer.step()
        self._average_parameters(self.stopwatch.lap("optimizer", now))
        self.optimizer.zero_grad()
        return loss.detach(), logits.detach()

    def _natural_step(self, inputs: Tensor, targets: Tensor, reports: dict[str, list[float]]) -> Tensor | float:
        """One step of an optimizer that makes its own gradients; returns the loss, and adds to `reports`."""
        now = self.stopwatch.mark()
        with self._autocast():
            result = self.optimizer.step(inputs, targets)  # type: ignore[call-overload]
        self._average_parameters(self.stopwatch.lap("optimizer", now))
        if not isinstance(result, StepReport):
            loss: Tensor = result
            return loss
        for name in REPORTED:
            reports.setdefault(name, []).append(float(getattr(result, name)))
        return -result.objective

    def _average_parameters(self, now: Mark) -> None:
        if self.averager is not None:
            # The averager passes over parameters without a gradient, which those of a natural step have not.
            for p in self.model.parameters():
                if p.grad is None and p.requires_grad:
                    p.grad = torch.zeros_like(p)
            self.averager.average_parameters(self.model.parameters())
            self.stopwatch.lap("communication", now)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.amp)

    def _look(self, losses: Tensor, first: int, last: int) -> None:
        """Stop all processes if one of them was signalled, or met a loss that is not finite in steps first…last."""
        steps, device = len(self.loader), losses.device
        finite = torch.isfinite(losses[first : last + 1])
        places = torch.arange(first, last + 1, device=device)
        bad = torch.where(finite, steps, places).min()
        status = self.world.min_(torch.stack((bad, torch.tensor(-self._stop_signal, device=device))))
        bad_step, signalled = status.tolist()
        where = f"in epoch {self.epoch + 1}"
        if bad_step < steps:
            raise TrainingStopped(
                f"the loss of step {self.epoch * steps + bad_step + 1} (number {bad_step + 1} of {steps} {where}) is "
                f"not finite. {self._what_is_left()}, with a smaller learning rate or more damping"
            )
        if signalled:
            name = signal.Signals(-signalled).name
            raise TrainingStopped(
                f"stopped by {name} after step {self.epoch * steps + last + 1}, {where}. {self._what_is_left()}"
            )

    def _what_is_left(self) -> str:
        if self.epoch == 0:
            return "No epoch was whole, so there is no checkpoint: start anew"
        return f"The checkpoint of epoch {self.epoch} is kept: go on from it with --resume"

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM, for all processes to stop at the same step; a second one interrupts at once."""

        def note(number: int, frame: FrameType | None) -> None:
            self._stop_signal = number
            signal.signal(number, previous[number])

        previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in previous:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # --- evaluation

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
        """Mean loss, top-1 and top-5 in percent; each process takes every N-th batch and none is padded."""
        model = self.model if self.ema is None else self.ema
        model.eval()
        totals = torch.zeros(3, device=images.device, dtype=torch.float64)
        batches = zip(torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH))
        for number, (pixels, targets) in enumerate(batches):
            if number % self.world.size == self.world.rank:
                with self._autocast():
                    logits = model(self.normalize(pixels))
                totals[0] += F.cross_entropy(logits.double(), targets, reduction="sum")
                totals[1:] += hits(logits, targets)
        loss, top1, top5 = (self.world.sum_(totals) / len(labels)).tolist()
        return loss, 100.0 * top1, 100.0 * top5

    def _evaluate_epoch(self) -> dict[str, float]:
        loss, top1, top5 = self.evaluate(*self.evaluation)
        if not math.isfinite(loss):
            raise TrainingStopped(
                f"the {self.config.eval_on} loss after step {(self.epoch + 1) * len(self.loader)}, at the end of epoch "
                f"{self.epoch + 1}, is not finite. {self._what_is_left()}, with a smaller learning rate or more damping"
            )
        name = self.config.eval_on
        return {f"{name}_loss": loss, f"{name}_top1": top1, f"{name}_top5": top5}

    def _write_epoch(self, row: dict[str, float]) -> None:
        state = self._state()
        if self.folder is None:
            return
        self.folder.write_epoch(row)
        self.folder.write_checkpoint(self.epoch, state)
        name = self.config.eval_on
        train_top1 = f" top-1 {row['train_top1']:.2f}" if "train_top1" in row else ""
        tqdm.write(
            f"epoch {self.epoch:3d}/{self.config.epochs}  train loss {row['train_loss']:.4f}{train_top1}  "
            f"{name} loss {row[f'{name}_loss']:.4f} top-1 {row[f'{name}_top1']:.2f}  "
            f"lr {row['lr']:.2e}  {row['seconds_step']:.4f} s/step",
            file=sys.stdout,
        )
        sys.stdout.flush()

    def _summary(self) -> dict[str, Any]:
        """Best, last and mean of the last five accuracies, and when each threshold was first passed."""
        test = None if self.test is None else self.evaluate(*self.test)
        if self.folder is None:
            return {}
        name = self.config.eval_on
        curve = [(int(row["epoch"]), float(row["seconds"]), float(row[f"{name}_top1"])) for row in self.folder.rows]
        accuracies = [accuracy for _, _, accuracy in curve]
        reached: dict[str, Any] = {}
        for threshold in THRESHOLDS:
            first = next(((e, s) for e, s, accuracy in curve if accuracy > threshold), None)
            reached[str(threshold)] = first and {"epoch": first[0], "seconds": first[1]}
        summary = {
            "model": self.config.model,
            "optimizer": self.config.optimizer,
            "seed": self.config.seed,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "evaluated_on": name,
            "best_top1": max(accuracies),
            "final_top1": accuracies[-1],
            "last_five_top1": sum(accuracies[-5:]) / len(accuracies[-5:]),
            "test_top1": accuracies[-1] if test is None else test[1],
            "train_seconds": self.seconds,
            "first_above": reached,
        }
        self.folder.write_summary(summary)
        return summary

    # --- checkpoints

    def _state(self) -> dict[str, Any]:
        """All that an exact resume needs; in the main process."""
        device = self.world.device
        own = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            # Processes that train alone have momenta and curvature of their own.
            "optimizer": self.optimizer.state_dict() if self.averager or self.world.is_main else None,
        }
        return {
            "config": self.config.to_dict(),
            "world_size": self.world.size,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "accuracy": self.accuracy,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "data_generator": self.loader.generator.get_state(),
            "averager_step": 0 if self.averager is None else self.averager.step,
            "processes": self.world.gather(own),
        }

    @staticmethod
    def _matching_checkpoint(path: Path, config: Config, world: World) -> dict[str, Any]:
        state = load_checkpoint(path)
        saved = state["config"]
        for name in ("model", "optimizer"):
            if saved[name] != getattr(config, name):
                raise CheckpointError(
                    f"the checkpoint {path} is of {name} {saved[name]}, not of {getattr(config, name)}; "
                    f"resume with {saved['model']} {saved['optimizer']}, or start a new run"
                )
        if state["world_size"] != world.size:
            raise CheckpointError(
                f"the checkpoint {path} is of {state['world_size']} processes, and here are {world.size}; "
                f"resume with torchrun --nproc_per_node={state['world_size']}"
            )
        if state["epoch"] > config.epochs:
            raise CheckpointError(
                f"the checkpoint {path} is of epoch {state['epoch']}, beyond the {config.epochs} epochs asked for"
            )
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        own = state["processes"][self.world.rank]
        optimizer = own["optimizer"] or state["processes"][0]["optimizer"]
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(optimizer)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint does not fit {self.config.model}: {error}") from error
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.averager is not None:
            self.averager.step = state["averager_step"]
        self.loader.generator.set_state(state["data_generator"])
        torch.set_rng_state(own["torch"])
        if own["cuda"] is not None:
            torch.cuda.set_rng_state(own["cuda"], self.world.device)
        self.epoch, self.seconds, self.accuracy = state["epoch"], state["seconds"], state["accuracy"]


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """How many targets are the largest, and among the five largest, of their logits, (2,)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    return torch.stack((ranked[:, 0].sum(), ranked.sum())).double()


def _finite_mean(values: list[float]) -> float:
    """The mean of the values that were measured, NaN where none was."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the CUDA device in the epoch, or the largest resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
