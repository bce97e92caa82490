"""What to write instead of what is taken for a family: a loss, a name, a class, a distribution of PyTorch."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from npg.families.base import Family

__all__ = ["ANY_FAMILY", "family_of", "is_mistaken", "meant"]

_INDICES, _GAUSSIAN = "families.Categorical()", "families.Gaussian()"
_BITS, _SPREAD = "families.Bernoulli()", "families.DiagonalGaussian(), for outputs [mean, log std]"
#: By the name of a family, a distribution or a loss, in lower case, without "_" and without "loss".
_MEANT = {
    "categorical": _INDICES,
    **dict.fromkeys(("crossentropy", "nll"), f"{_INDICES}, which has no weights, smoothing or index to ignore"),
    "bernoulli": _BITS,
    **dict.fromkeys(("bcewithlogits", "binarycrossentropywithlogits"), f"{_BITS}, which has no weights"),
    **dict.fromkeys(("bce", "binarycrossentropy"), f"{_BITS}, for a model that returns logits, without a sigmoid"),
    "gaussian": _GAUSSIAN,
    "mse": f"{_GAUSSIAN}, whose log-likelihood is half the squared error, summed over components",
    **dict.fromkeys(("diagonalgaussian", "gaussiannll"), _SPREAD),
    "normal": f"{_GAUSSIAN} for a known spread, or {_SPREAD}",
    "multicategorical": "families.MultiCategorical(sizes)",
    "product": "families.Product(parts, sizes)",
    "poissonnll": "families.from_torch(lambda o: Independent(Poisson(o.exp()), 1)), for outputs log rate",
}
ANY_FAMILY = (
    "families.Categorical() for class indices, families.Bernoulli() for bits, families.Gaussian() for a regression, or "
    "families.from_torch(lambda outputs: …) for a distribution of PyTorch"
)


def is_mistaken(given: Any) -> bool:
    """Whether this is a function by its form, but certainly neither a family nor a metric: a loss, or any class."""
    functional = inspect.isroutine(given) and getattr(nn.functional, getattr(given, "__name__", ""), None) is given
    return isinstance(given, type | nn.modules.loss._Loss) or functional


def meant(given: Any) -> str:
    """What to write instead, and what it was that was given."""
    kind = given if isinstance(given, type) else type(given)
    named = isinstance(given, str | type) or is_mistaken(given)
    name = given if isinstance(given, str) else getattr(given if named else kind, "__name__", kind.__name__)
    known = _MEANT.get(name.lower().replace("_", "").removesuffix("loss"))
    if known is None and issubclass(kind, Distribution):
        known = f"families.from_torch(lambda outputs: {kind.__name__}(…))"
    if known is None and issubclass(kind, Family):
        known = f"an object, {kind.__name__}(…)"
    shown = f"a {kind.__name__}" if isinstance(given, Tensor | Distribution | nn.Module) else repr(given)
    return f"got {shown}: write {known or ANY_FAMILY}"


def family_of(given: Any) -> Family:
    """A family; raises TypeError for what is none, and says what to write."""
    if not isinstance(given, Family):
        raise TypeError(f"family must be a family of npg.families, {meant(given)}")
    return given
