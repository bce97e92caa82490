"""The supervised training loop: one process or many, first-order and natural-gradient optimizers alike."""

from __future__ import annotations

import inspect
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from npg.parallel import World
from npg.runs.jobs import SAY
from npg.runs.signals import StopRequest
from npg.step import StepReport
from npg.vision.checkpoint import labels_of, load_matching, restore, state_of
from npg.vision.config import Config
from npg.vision.data import ImageData, Labelled
from npg.vision.evaluation import evaluate, hits
from npg.vision.loader import Normalization, TrainLoader, split_validation
from npg.vision.models import model_from_name
from npg.vision.optimizers import make_optimizer, takes_batches
from npg.vision.run_folder import RunFolder, summarize
from npg.vision.timing import Mark, Stopwatch, peak_memory

__all__ = ["Trainer", "TrainingStopped", "learning_rate_factor"]

#: Steps between the looks that the host takes at an accelerator; on the CPU, where looking is free, it is every step.
LOOK_EVERY = 50
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
        state = None if checkpoint is None else load_matching(checkpoint, config, world)
        self.config, self.world, self.classes, self.labels = config, world, data.classes, labels_of(data)
        device = world.device
        if config.sync_bn and device.type != "cuda":
            raise ValueError("sync_bn must be off on a CPU: PyTorch synchronises BatchNorm on CUDA only")
        _set_backends(config, device)
        torch.manual_seed(config.seed)
        if model is None:
            model = model_from_name(config.model, len(data.classes), dropout=config.dropout)
        if config.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device)
        self.model = self.model.to(memory_format=layout)  # type: ignore[call-overload]
        dtype = next(self.model.parameters()).dtype
        self.normalize = Normalization(config.mean, config.std, device, dtype, layout)
        self._prepare_data(data)
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
        torch.manual_seed(world.own_seed(config.seed))  # dropout and sampled labels differ from process to process

        self.epoch, self.seconds, self._stop = 0, 0.0, StopRequest(world)
        self.accuracy = -math.inf  # after the last epoch, in percent
        if state is not None:
            restore(self, state)
        self.folder: RunFolder | None = world.main_first(
            lambda: RunFolder(run_dir, config, checkpoint, self.epoch) if world.is_main else None
        )

    # --- setting up

    def _prepare_data(self, data: ImageData) -> None:
        config, device = self.config, self.world.device
        train, evaluated, test = _parts(config, data)
        self.evaluation, self.test = _on(device, evaluated), None if test is None else _on(device, test)
        self.loader = TrainLoader(
            *train,
            config.batch_size,
            self.normalize,
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
        self._said = time.perf_counter()
        try:
            with bar, self._stop:
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
        look_every = 1 if device.type == "cpu" else LOOK_EVERY
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        reports: dict[str, list[float]] = {}
        self.model.train()
        begun = self.stopwatch.mark()
        for step, (inputs, targets) in enumerate(self.loader):
            factor = learning_rate_factor(self.config, self.epoch * steps + step, self.total_steps)
            for group, rate in zip(self.optimizer.param_groups, self._base_rates):
                group["lr"] = rate * factor
            losses[step], logits = self.take_step(inputs, targets, reports)
            if logits is not None:
                correct += hits(logits, targets)
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            if (step + 1) % look_every == 0 or step + 1 == steps:
                first = step - step % look_every
                self._look(losses, first, step)
                bar.update(step + 1 - first)
                now = f"epoch {self.epoch + 1}, loss {float(losses[step]):.3f}"
                bar.set_postfix_str(now, refresh=False)
                if bar.disable and self.world.is_main and time.perf_counter() - self._said > SAY:
                    self._said = time.perf_counter()
                    print(f"{now}, step {step + 1} of {steps}", file=sys.stderr, flush=True)
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
            "memory_peak_bytes": peak_memory(device),
        }

    def take_step(
        self, inputs: Tensor, targets: Tensor, reports: dict[str, list[float]]
    ) -> tuple[Tensor | float, Tensor | None]:
        """One step of the optimizer, on this process's part of a batch.

        Args:
            inputs: images (N, 3, 32, 32).
            targets: their classes, (N,).
            reports: by name, what optimizers that make their own gradients say of each step; it is added to.

        Returns:
            The loss before the step, and the logits (N, C); None in their place with such an optimizer.
        """
        if takes_batches(self.config.optimizer):
            return self._natural_step(inputs, targets, reports), None
        return self._gradient_step(inputs, targets)

    def _gradient_step(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
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
        status = self.world.min_(torch.stack((bad, torch.tensor(-self._stop.number, device=device))))
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
            return "No epoch was finished, so there is no checkpoint: start again"
        return f"The checkpoint of epoch {self.epoch} is kept: go on from it with --resume"

    # --- evaluation

    def evaluate(self, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
        """`npg.vision.evaluation.evaluate` of the model, or of the average of its weights."""
        model = self.model if self.ema is None else self.ema
        return evaluate(model, self.normalize, images, labels, self.world, amp=self.config.amp)

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
        state = state_of(self)
        if self.folder is None:
            return
        self.folder.write_epoch(row)
        self.folder.write_checkpoint(self.epoch, state)
        _print_epoch(self.config, row)

    def _summary(self) -> dict[str, Any]:
        """What summary.json says; every process evaluates."""
        test = None if self.test is None else self.evaluate(*self.test)
        if self.folder is None:
            return {}
        curve = summarize(self.folder.rows, self.config.eval_on)
        summary = {
            "model": self.config.model,
            "optimizer": self.config.optimizer,
            "seed": self.config.seed,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **curve,
            "test_top1": curve["final_top1"] if test is None else test[1],
            "train_seconds": self.seconds,
        }
        self.folder.write_summary(summary)
        return summary


def _set_backends(config: Config, device: torch.device) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True


def _parts(config: Config, data: ImageData) -> tuple[Labelled, Labelled, Labelled | None]:
    """The images to train on, to evaluate after each epoch, and the test set where it is apart from those."""
    images, labels = data.train_images, data.train_labels
    test: Labelled | None = (data.test_images, data.test_labels)
    if config.eval_on == "test":
        some = config.limit_train is not None and config.limit_train < len(images)
        train = split_validation(len(images), 1)[0] if some else slice(None)
        evaluated, test = (data.test_images, data.test_labels), None
    else:
        train, held_out = split_validation(len(images), config.validation_size)
        evaluated = (images[held_out], labels[held_out])
    images, labels = images[train], labels[train]
    if config.limit_train and config.limit_train > len(images):
        raise ValueError(f"limit_train must be at most {len(images)} here; got {config.limit_train}")
    return (images[: config.limit_train], labels[: config.limit_train]), evaluated, test


def _on(device: torch.device, part: Labelled) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part[0]).to(device), torch.from_numpy(part[1]).to(device)


def _print_epoch(config: Config, row: dict[str, float]) -> None:
    name = config.eval_on
    train_top1 = f" top-1 {row['train_top1']:.2f}" if "train_top1" in row else ""
    tqdm.write(
        f"epoch {row['epoch']:3d}/{config.epochs}  train loss {row['train_loss']:.4f}{train_top1}  "
        f"{name} loss {row[f'{name}_loss']:.4f} top-1 {row[f'{name}_top1']:.2f}  "
        f"lr {row['lr']:.2e}  {row['seconds_step']:.4f} s/step",
        file=sys.stdout,
    )
    sys.stdout.flush()


def _finite_mean(values: list[float]) -> float:
    """The mean of the values that were measured, NaN where none was."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
