"""What a training run is made of, and the presets that fill it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from math import inf, isfinite
from typing import Any

from npg.checks import require
from npg.runs.presets import check_kinds, check_names, mapping, preset_file, read_yaml
from npg.vision.optimizers import OPTIMIZERS, check_optimizer, takes_batches

__all__ = ["PRESETS", "Config", "load_config"]

PRESETS = ("report", "tuned", "small")


@dataclass(frozen=True)
class Config:
    """A training run. Fractions are of the whole run, so that a shorter run has the same schedule.

    Attributes:
        model: a name that `npg.vision.model_from_name` knows.
        optimizer: a name out of `npg.vision.optimizers.OPTIMIZERS`.
        optimizer_options: its constructor's options, lr among them.
        data: a path that `npg.vision.data.load` reads; None is CIFAR-10, downloaded.
        epochs: passes over the training part.
        batch_size: of all processes together.
        schedule: of the learning rate: ``constant``, ``step`` (times `gamma` at each milestone) or ``cosine`` (to 0).
        milestones: of the schedule ``step``, fractions of the run; the others have none, and pass over them.
        gamma: the factor at a milestone.
        warmup: the fraction of the run over which the learning rate grows linearly to its value.
        label_smoothing: the share of the target that is spread over all classes.
        ema: the decay per step of an average of the weights, which is then what is evaluated; 0 for none.
        decay_all: let weight decay reach biases and BatchNorm too, in PyTorch's optimizers.
        dropout: the models' dropout probability.
        augment: crop and mirror training images at random.
        mean: of the pixels in [0, 1], per channel, for the normalisation.
        std: likewise.
        validation_size: training images held out, chosen by a fixed seed.
        eval_on: ``validation`` evaluates the held-out images after each epoch and the test set once, at the end;
            ``test`` holds nothing out and evaluates the test set after each epoch, as the report did.
        limit_train: train on that many images only.
        stop_above: end the run after the first epoch whose accuracy, in percent, is above this.
        seed: of the initialisation, the order and the augmentation.
        device: ``cpu``, ``cuda``, …; None is CUDA where there is one.
        amp: forward pass in bfloat16 where it is safe (autocast).
        channels_last: NHWC memory layout.
        compile: compile the model.
        threads: of PyTorch on the CPU; None leaves its default.
        deterministic: deterministic algorithms only.
        sync_bn: BatchNorm statistics over all processes' batches (CUDA).
        average_every: instead of averaging gradients at every step, let each process train alone and average the
            parameters every that many steps; 0 is never.
        keep_checkpoints: how many of the newest checkpoints stay; 0 is all.

    Raises:
        ValueError: a value is out of its range, or an optimizer's option does not exist.
    """

    model: str
    optimizer: str
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    epochs: int = 50
    batch_size: int = 128
    schedule: str = "constant"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    decay_all: bool = False
    dropout: float = 0.0
    augment: bool = True
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    validation_size: int = 5000
    eval_on: str = "validation"
    limit_train: int | None = None
    stop_above: float | None = None
    seed: int = 0
    device: str | None = None
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    threads: int | None = None
    deterministic: bool = False
    sync_bn: bool = False
    average_every: int = 0
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("milestones", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("epochs", "batch_size", "validation_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("average_every", "keep_checkpoints", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("label_smoothing", "ema", "warmup", "dropout"):
            require(0.0 <= getattr(self, name) < 1.0, name, getattr(self, name), "in [0, 1)")
        require(
            all(0.0 < m < 1.0 for m in self.milestones),
            "milestones",
            self.milestones,
            "fractions of the run, between 0 and 1",
        )
        require(0.0 < self.gamma < inf, "gamma", self.gamma, "a finite number above 0")
        require(
            len(self.mean) == len(self.std) == 3
            and all(map(isfinite, self.mean))
            and all(0.0 < s < inf for s in self.std),
            "mean and std",
            (self.mean, self.std),
            "three finite numbers each, those of std above 0",
        )
        for name in ("limit_train", "threads"):
            number = getattr(self, name)
            require(number is None or number >= 1, name, number, "at least 1")
        stop = self.stop_above
        require(stop is None or 0.0 <= stop < 100.0, "stop_above", stop, "a percentage in [0, 100)")
        require(self.schedule in ("constant", "step", "cosine"), "schedule", self.schedule, "constant, step or cosine")
        require(self.eval_on in ("validation", "test"), "eval_on", self.eval_on, "validation or test")
        check_optimizer(self.optimizer, self.optimizer_options)
        if takes_batches(self.optimizer):
            why = f"with {self.optimizer}, which differentiates the model's log-likelihood itself"
            require(not self.label_smoothing, "label_smoothing", self.label_smoothing, f"0 {why}")
            require(not self.compile, "compile", self.compile, f"off {why}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings, which YAML and checkpoints hold."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def load_config(
    model: str,
    optimizer: str,
    preset: str,
    overrides: Mapping[str, Any] | None = None,
    optimizer_overrides: Mapping[str, Any] | None = None,
) -> Config:
    """A preset's configuration for an optimizer, with what the caller says put over it.

    A preset is a YAML file of the fields of `Config`, with the options of each optimizer under ``optimizers``. The
    ``config.yaml`` of a run is one too, for its own optimizer.

    Args:
        model: the model's name.
        optimizer: the optimizer's name.
        preset: ``report``, ``tuned`` or the path of a YAML file.
        overrides: fields of `Config`.
        optimizer_overrides: options of the optimizer.

    Raises:
        ValueError: no such preset, or it has a key that means nothing; the schedule is ``step`` without milestones, or
            there are milestones or a gamma for another one. Those of a preset may stay where the caller takes another
            schedule.
    """
    path = None if preset in PRESETS else preset_file(preset)
    if path is None:
        check_names("preset", [preset], PRESETS, remedy="Or give a YAML file.")
        values = read_yaml(resources.files("npg.vision") / "presets" / f"{preset}.yaml")
    else:
        values = read_yaml(path)
    each = mapping(f"optimizers of preset {preset}", values.pop("optimizers", None))
    check_names("optimizer", each, OPTIMIZERS, f"under optimizers of preset {preset}")
    options = mapping(f"the options of {optimizer} in preset {preset}", each.get(optimizer))
    own = mapping(f"optimizer_options of preset {preset}", values.pop("optimizer_options", None))
    if own and values.get("optimizer", optimizer) != optimizer:
        raise ValueError(
            f"the optimizer_options of preset {preset} are of {values['optimizer']}, and the optimizer is {optimizer}: "
            f"take {values['optimizer']}, or write them under optimizers: {{{values['optimizer']}: …}} in the preset"
        )
    options |= own
    given = dict(overrides or {})
    merged = values | given
    check_names("key", merged, [f.name for f in fields(Config)], f"of preset {preset}")
    merged["optimizer_options"] = options | dict(optimizer_overrides or {})
    config = Config(**(merged | {"model": model, "optimizer": optimizer}))
    # A preset's milestones are no mistake where the caller takes another schedule; nor is what a run wrote, all fields.
    _check_schedule(config, given if "schedule" in given or "model" in values else merged)
    return config


def _check_schedule(config: Config, given: Mapping[str, Any]) -> None:
    """Refuse what was given for the learning rate and would change nothing."""
    if config.schedule != "step":
        wanted = f"left out with schedule {config.schedule}, or given with schedule step"
        for name in ("milestones", "gamma"):
            require(not given.get(name), name, given.get(name), wanted)
    elif "schedule" in given or "milestones" in given:
        wanted = "given with schedule step, as fractions of the run such as 0.74; or take schedule constant"
        require(bool(config.milestones), "milestones", list(config.milestones), wanted)
