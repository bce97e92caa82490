"""What tests of the optimizers of `p.grad` train: a small classifier, or parameters along gradients that are given."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer


class Training:
    """A small convolutional classifier, and the optimizer that ``make`` makes for it."""

    def __init__(self, make: Callable[[nn.Sequential], Optimizer], dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        # Kernels of two: after a few steps no factor of KLShampoo lacks rank, so that its basis is the only one.
        self.model = nn.Sequential(
            nn.Conv2d(3, 6, 2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        ).to(dtype)
        self.optimizer = make(self.model)

    @staticmethod
    def batches(steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(1)
        return [
            (torch.randn(16, 3, 8, 8, generator=g).to(dtype), torch.randint(4, (16,), generator=g))
            for _ in range(steps)
        ]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(x), y)

    def backward(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(x, y).backward()

    def go(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        for x, y in batches:
            self.backward(x, y)
            self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def everything(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        return self.weights() + [value.clone() for i in sorted(state) for _, value in sorted(state[i].items())]


@pytest.fixture(scope="session")
def training() -> type[Training]:
    """``training(lambda model: optimizer)``: one to be trained; two of them begin alike."""
    return Training


@pytest.fixture(scope="session")
def walk() -> Callable[..., Iterator[list[Tensor]]]:
    """``walk(params, optimizer, steps)``: where the parameters are after each step along the gradients given for it."""

    def along(
        params: Sequence[Tensor], optimizer: Optimizer, steps: Iterable[Sequence[Tensor]]
    ) -> Iterator[list[Tensor]]:
        for gradients in steps:
            for p, g in zip(params, gradients, strict=True):
                p.grad = g
            optimizer.step()
            yield [p.detach().clone() for p in params]

    return along
