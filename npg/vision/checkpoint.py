"""The checkpoints of a training run of images: what is in one, and how it is found, checked and gone on from."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from npg.parallel import World
from npg.runs.checkpoints import CheckpointError, Checkpoints
from npg.vision.config import Config
from npg.vision.data import ImageData
from npg.vision.models import model_from_name

if TYPE_CHECKING:
    from npg.vision.training import Trainer

__all__ = [
    "check_classes",
    "check_data",
    "checkpoints_in",
    "config_of",
    "find_checkpoint",
    "labels_of",
    "load_checkpoint",
    "load_matching",
    "load_model",
    "model_in",
    "restore",
    "state_of",
]

#: What a checkpoint must have to go on from, beside its configuration.
_PARTS = frozenset(
    {"world_size", "epoch", "seconds", "accuracy", "model", "ema", "data_generator", "averager_step", "processes"}
)


def checkpoints_in(run: Path) -> Checkpoints:
    """The checkpoints of a run folder, by their epochs."""
    return _epochs(run / "checkpoints")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: the file itself, or the newest whole one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return path
    if found := checkpoints_in(path).newest():
        return found
    raise CheckpointError(f"there is no checkpoint at {path}: give a run folder, or a file of its checkpoints/")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing but tensors and plain values is unpickled.

    Raises:
        CheckpointError: the file is truncated or no checkpoint.
    """
    return _epochs(path.parent).read(path)


def load_matching(path: Path, config: Config, world: World) -> dict[str, Any]:
    """Read the checkpoint of a run that goes on as `config` says.

    Raises:
        CheckpointError: it is damaged, of another model, optimizer or number of processes, or of a later epoch.
    """
    state = load_checkpoint(path)
    saved = config_of(path, state).to_dict()
    if missing := sorted(_PARTS - state.keys()):
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: it is not as this version writes checkpoints")
    for name in ("model", "optimizer"):
        if saved[name] != getattr(config, name):
            raise CheckpointError(
                f"the checkpoint {path} is of {name} {saved[name]}, not of {getattr(config, name)}; "
                f"resume with {saved['model']} {saved['optimizer']}, or start a new run"
            )
    if state["world_size"] != world.size:
        raise CheckpointError(
            f"the checkpoint {path} is of {state['world_size']} processes, and {world.size} run here; "
            f"resume with torchrun --nproc_per_node={state['world_size']}"
        )
    if state["epoch"] > config.epochs:
        raise CheckpointError(
            f"the checkpoint {path} is of epoch {state['epoch']}, beyond the {config.epochs} epochs asked for"
        )
    return state


def config_of(path: Path, state: Mapping[str, Any]) -> Config:
    """The configuration of the run that a checkpoint is of.

    Raises:
        CheckpointError: it has fields that this version of the package does not know, or lacks some.
    """
    with _expected(path):
        return Config(**state["config"])


def labels_of(data: ImageData) -> dict[str, tuple[int, int]]:
    """How many images there are to train and to test on, and a checksum of their labels in order."""
    parts = {"train": data.train_labels, "test": data.test_labels}
    return {name: (len(x), zlib.crc32(np.asarray(x, dtype=np.int64).tobytes())) for name, x in parts.items()}


def check_data(state: Mapping[str, Any], labels: Mapping[str, tuple[int, int]]) -> None:
    """Check that a run goes on with the images that it began with: others would move what is held out among them.

    Raises:
        CheckpointError: there are other ones; those of before know of none.
    """
    for part, (n, checksum) in state.get("labels", labels).items():
        if (n, checksum) != tuple(labels[part]):
            other = f"{labels[part][0]:,} images" if n != labels[part][0] else "other labels, or in another order"
            raise CheckpointError(
                f"the checkpoint was trained with {n:,} images in the part {part!r}, and the data have {other}: give "
                "--data as it was, or start a new run"
            )


def check_classes(state: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Check that a checkpoint is of images with these classes, in this order; those of before know of none.

    Raises:
        CheckpointError: it is of others.
    """
    saved = state.get("classes", classes)
    for i, (theirs, ours) in enumerate(zip(saved, classes)):
        if theirs != ours:
            raise CheckpointError(
                f"the checkpoint has {theirs!r} for class {i}, and the images have {ours!r}: give the data that it was "
                "trained on, or name the classes' folders as they were"
            )


@contextmanager
def _expected(path: Path) -> Iterator[None]:
    """Say of a checkpoint that is whole, and not as this version writes it, what is missing or unknown."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is not as this version of npg-toolkit writes checkpoints: {what}") from error


def load_model(path: Path | str) -> tuple[nn.Module, Config]:
    """The model of a run, on the CPU and in evaluation mode, with the weights that the run evaluates; and its `Config`.

    Args:
        path: the run's folder, whose newest checkpoint it is, or a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    found = find_checkpoint(Path(path))
    return model_in(found, load_checkpoint(found))


def model_in(path: Path, state: Mapping[str, Any]) -> tuple[nn.Module, Config]:
    """The model of a checkpoint that was read, as `load_model` gives it.

    Raises:
        CheckpointError: it is not as this version writes checkpoints.
    """
    config = config_of(path, state)
    with _expected(path):
        weights = state["model"]
        if state["ema"] is not None:
            weights = {name.removeprefix("module."): w for name, w in state["ema"].items() if name != "n_averaged"}
        model = model_from_name(config.model, len(weights["classifier.bias"]), dropout=config.dropout)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {path} do not fit {config.model}: {error}") from error
    return model.eval(), config


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that an exact resume needs; whole in the main process, and every process must ask."""
    world = trainer.world
    own = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None,
        # Processes that train alone have momenta and curvature of their own.
        "optimizer": trainer.optimizer.state_dict() if trainer.averager or world.is_main else None,
    }
    return {
        "config": trainer.config.to_dict(),
        "classes": list(trainer.classes),
        "labels": trainer.labels,
        "world_size": world.size,
        "epoch": trainer.epoch,
        "seconds": trainer.seconds,
        "accuracy": trainer.accuracy,
        "model": trainer.model.state_dict(),
        "ema": None if trainer.ema is None else trainer.ema.state_dict(),
        "data_generator": trainer.loader.generator.get_state(),
        "averager_step": 0 if trainer.averager is None else trainer.averager.step,
        "processes": world.gather(own),
    }


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put a trainer where `state_of` found it.

    Raises:
        CheckpointError: the state does not fit the model, the optimizer or the data.
    """
    check_classes(state, trainer.classes)
    check_data(state, trainer.labels)
    own = state["processes"][trainer.world.rank]
    optimizer = own["optimizer"] or state["processes"][0]["optimizer"]
    try:
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint does not fit {trainer.config.model}: {error}") from error
    if trainer.ema is not None:
        trainer.ema.load_state_dict(state["ema"])
    if trainer.averager is not None:
        trainer.averager.step = state["averager_step"]
    trainer.loader.generator.set_state(state["data_generator"])
    torch.set_rng_state(own["torch"])
    if own["cuda"] is not None:
        torch.cuda.set_rng_state(own["cuda"], trainer.world.device)
    trainer.epoch, trainer.seconds, trainer.accuracy = state["epoch"], state["seconds"], state["accuracy"]


def _epochs(folder: Path) -> Checkpoints:
    return Checkpoints(folder, "epoch_", ".pt", digits=4)
