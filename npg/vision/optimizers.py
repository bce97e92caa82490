"""The optimizers of the command line, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from npg import optim
from npg.checks import number
from npg.families import Categorical
from npg.runs.presets import check_names
from npg.trust_region import LevenbergMarquardt
from npg.vision import rivals

__all__ = ["OPTIMIZERS", "check_optimizer", "make_optimizer", "takes_batches"]

#: Optimizers of parameters and their gradients: ``step()`` after a backward pass.
_OF_GRADIENTS: Mapping[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "muon": rivals.Muon,
    "soap": rivals.soap,
    "shampoo": rivals.shampoo,
    "online-ngd": optim.OnlineNGD,
    "kl-shampoo": optim.KLShampoo,
}
#: Those of them that say themselves what weight decay reaches.
_DECAY_THEMSELVES = (optim.OnlineNGD, optim.KLShampoo, rivals.Muon)
#: Optimizers of a model and its predictive distribution: ``step(inputs, targets)`` does the whole step.
_OF_BATCHES: Mapping[str, Callable[..., Optimizer]] = {
    "diagonal-ngd": optim.DiagonalNGD,
    "kfac": partial(optim.NGD, solver="kfac"),
    "ngd": optim.NGD,
}
OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {**_OF_GRADIENTS, **_OF_BATCHES}

_GIVEN_BY_THE_TRAINER = ("params", "model", "family", "process_group", "generator")


def takes_batches(name: str) -> bool:
    """Whether the optimizer's ``step`` takes (inputs, targets) and makes its own gradients."""
    return name in _OF_BATCHES


def make_optimizer(
    name: str,
    model: nn.Module,
    options: Mapping[str, Any],
    *,
    decay_all: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Optimizer:
    """The optimizer that a name says, over `model`, with its constructor's own options.

    PyTorch's optimizers, SOAP and Shampoo decay weights with two axes or more, and biases and BatchNorm's parameters
    only with `decay_all`; those of `npg.optim`, and Muon, say themselves what they decay.

    Args:
        name: out of `OPTIMIZERS`.
        model: a classifier that returns logits.
        options: of the constructor, by its names, and as plain values: ngd's ``damping_control`` is a mapping of the
            arguments of `LevenbergMarquardt`, which may be empty.
        decay_all: see above.
        process_group: what an optimizer that makes its own gradients averages them over.

    Raises:
        ValueError: no such optimizer or no such option, with those that there are; a value out of its range; or a
            package that it needs is not installed.
    """
    check_optimizer(name, options)
    build = OPTIMIZERS[name]
    try:
        if takes_batches(name):
            if (control := options.get("damping_control")) is not None:
                options = {**options, "damping_control": LevenbergMarquardt(**control)}
            return build(model, Categorical(), **options, process_group=process_group)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if decay_all or build in _DECAY_THEMSELVES:
            return build(parameters, **options)
        weights = {"params": [p for p in parameters if p.ndim > 1]}
        others = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
        return build([group for group in (weights, others) if group["params"]], **options)
    except TypeError as error:
        raise ValueError(f"the options of {name} do not fit: {error}") from error


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an optimizer that is unknown or not installed, an option that it does not have, or one that is lacking.

    Raises:
        ValueError: with the names that there are.
    """
    check_names("optimizer", [name], OPTIMIZERS)
    rivals.check_installed(name)
    signature = inspect.signature(OPTIMIZERS[name]).parameters
    check_names("option", options, [o for o in signature if o not in _GIVEN_BY_THE_TRAINER], f"of {name}")
    if (control := options.get("damping_control")) is not None:
        _check_damping_control(control)
    for key in ("lr", "momentum", "weight_decay"):  # PyTorch's own take NaN, and name no option
        if isinstance(value := options.get(key), int | float) and not isinstance(value, bool):
            number(key, value, 0)
    if "lr" not in options and signature["lr"].default is inspect.Parameter.empty:
        raise ValueError(f"{name} needs a learning rate, lr")


def _check_damping_control(control: object) -> None:
    wanted = list(inspect.signature(LevenbergMarquardt).parameters)
    if not isinstance(control, Mapping) or not set(control) <= set(wanted):
        raise ValueError(
            f"damping_control must be a mapping of {', '.join(wanted)}, such as {{factor: 1.5}}, or {{}} for their "
            f"defaults; got {control!r}"
        )
    try:
        LevenbergMarquardt(**control)
    except TypeError as error:
        raise ValueError(f"damping_control has a value that is not a number: {control!r}") from error
