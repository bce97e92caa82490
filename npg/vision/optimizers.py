"""The optimizers of the command line, by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from npg import optim

__all__ = ["OPTIMIZERS", "make_optimizer"]

OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "online-ngd": optim.OnlineNGD,
}


def make_optimizer(name: str, model: nn.Module, options: Mapping[str, Any], *, decay_all: bool = False) -> Optimizer:
    """The optimizer that a name says, over `model`, with its constructor's own options.

    PyTorch's optimizers decay weights with two axes or more, and biases and BatchNorm's parameters only with
    `decay_all`; those of `npg.optim` say themselves what they decay.

    Raises:
        ValueError: no such optimizer or no such option, with those that there are; or a value out of its range.
    """
    check_optimizer(name, options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    build = OPTIMIZERS[name]
    groups: list[Any] = parameters
    if options.get("weight_decay") and not decay_all and not name.endswith("ngd"):
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    try:
        return build(groups, **options)
    except TypeError as error:
        raise ValueError(f"the options of {name} do not fit: {error}") from error


def check_optimizer(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown optimizer, or an option that its constructor does not have."""
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=3, cutoff=0.4)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"no optimizer is called {name!r}{hint}. There are {', '.join(OPTIMIZERS)}")
    accepted = [p for p in inspect.signature(OPTIMIZERS[name]).parameters if p not in ("params", "model", "family")]
    for option in options:
        if option not in accepted:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(accepted)}")
