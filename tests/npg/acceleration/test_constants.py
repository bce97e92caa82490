"""What a trace takes for constant: each way of changing it by a little is seen, and gives right products."""

import numpy as np
import pytest
import torch
from torch import nn

from npg import Fisher, acceleration, families

OF_THE_FILE = 1.0
BY = 1.00002


def scaled_by(factor):
    def scaled(x):
        return x * factor

    def change():
        nonlocal factor
        factor *= BY

    scaled.change = change
    return scaled


class Net(nn.Module):
    of_the_class = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.norm = nn.Linear(5, 32), nn.Linear(32, 4), nn.LayerNorm(32, eps=1e-2)
        self.temperature, self.factors, self.mask = 1.0, [1.0, {"a": 1.0}], torch.ones(4)
        self.scaled, self.numbers, self.calls = scaled_by(1.0), np.ones(1), 0

    def forward(self, x):
        h = self.scaled(self.norm(self.body(x)).tanh()) * self.factors[1]["a"] * float(self.numbers[0])
        return self.rest(self.head(h)) * self.mask

    def rest(self, outputs):
        self.calls += 1
        return outputs * self.of_the_class * OF_THE_FILE / self.temperature


CHANGES = {
    "attribute": lambda patch, model: setattr(model, "temperature", BY),
    "element": lambda patch, model: model.factors[1].update(a=BY),
    "class attribute": lambda patch, model: patch.setattr(Net, "of_the_class", BY),
    "global": lambda patch, model: patch.setitem(globals(), "OF_THE_FILE", BY),
    "closure": lambda patch, model: model.scaled.change(),
    "array": lambda patch, model: model.numbers.__imul__(BY),
    "tensor": lambda patch, model: setattr(model, "mask", BY * model.mask),
    "option of a layer": lambda patch, model: setattr(model.norm, "eps", 1.01e-2),
    "hook": lambda patch, model: model.head.register_forward_hook(lambda module, args, out: BY * out),
    "method": lambda patch, model: setattr(model, "rest", lambda outputs: BY * outputs),
}


def product(model, autocast=False):
    """F v, and the same without a program."""
    x, v = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 388)
    results = []
    for mode in ("auto", "off"):
        with acceleration.mode(mode), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(Fisher(model, x, families.DiagonalGaussian()) @ v)
    return results


@pytest.mark.parametrize("change", CHANGES)
def test_a_small_change_is_seen(change, monkeypatch, accelerated):
    model = Net()
    product(model)
    (kept,) = acceleration._programs.kept(model)
    product(model)
    assert acceleration._programs.kept(model) == [kept]
    CHANGES[change](monkeypatch, model)
    mine, theirs = product(model)
    assert kept not in acceleration._programs.kept(model)
    assert (mine - theirs).norm() < 2e-6 * theirs.norm()


@pytest.mark.parametrize("rate", [1.00001, 1.0001, 1.001])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.slow
def test_a_temperature_that_is_annealed(autocast, rate, accelerated):
    model = Net()
    for _ in range(20):
        model.temperature *= rate
        mine, theirs = product(model, autocast)
        assert (mine - theirs).norm() < (8e-3 if autocast else 8e-6) * theirs.norm()


def test_more_rounding_than_before_is_found_to_be_rounding(accelerated):
    """The program is traced anew at once, and what it differed by is allowed from then on."""
    model = Net()
    product(model)
    for _ in range(5):  # not once is there a wait without a program
        (kept,) = acceleration._programs.kept(model)
        kept.rounding = -1.0
        product(model)
        (new,) = acceleration._programs.kept(model)
        assert new is not kept
        assert new.confirms(kept)
        product(model)
        assert acceleration._programs.kept(model) == [new]
    new.rounding = 1e-3
    model.temperature = 1.0002
    mine, theirs = product(model)  # less than that: it is taken for rounding
    assert acceleration._programs.kept(model) == [new]
    assert 1e-4 < (mine - theirs).norm() / theirs.norm() < 1e-3


def test_another_function_confirms_nothing(accelerated):
    models = Net(), Net(), Net()
    models[1].temperature = 1.5
    for model in models:
        product(model)
    one, other, same = (acceleration._programs.kept(model)[0] for model in models)
    one.rounding = 0.1
    assert not other.confirms(one)
    assert other.rounding < 1e-5
    assert same.confirms(one)
    assert same.rounding == 0.1
