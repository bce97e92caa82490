"""Natural-gradient optimizers: `torch.optim.Optimizer` faces over the core and over `npg.curvature`.

`OnlineNGD` and `KLShampoo` take gradients from ``p.grad`` like any optimizer. `NGD` and `DiagonalNGD` need the model
and what its outputs mean, because the Fisher information is a property of the predictive distribution: ``step(inputs,
targets)``.
"""

from npg.optim.diagonal_ngd import DiagonalNGD
from npg.optim.kl_shampoo import KLShampoo
from npg.optim.ngd import NGD
from npg.optim.online_ngd import OnlineNGD

__all__ = ["NGD", "DiagonalNGD", "KLShampoo", "OnlineNGD"]
