"""What a trace takes for constant: each way of changing it by a little is seen, and gives right products."""

import gc
import weakref

import pytest
import torch
from torch import nn

from npg import Fisher, acceleration, families
from npg.acceleration.surroundings import Surroundings

OF_THE_FILE = 1.0


class Settings:
    of_the_class = 1.0

    def __init__(self) -> None:
        self.beta, self.table = 1.0, {"a": [1.0, 2.0]}


SETTINGS = Settings()
GAUSSIAN = families.DiagonalGaussian()


def helper(x):
    return x * OF_THE_FILE * SETTINGS.beta * Settings.of_the_class


def scaled_by(factor):
    def scaled(x):
        return x * factor

    def change():
        nonlocal factor
        factor *= 1.0002

    scaled.change = change
    return scaled


class Net(nn.Module):
    constant = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(5, 32), nn.Linear(32, 4)
        self.drop = nn.Dropout(0.5)
        self.temperature, self.factors, self.mask = 1.0, [1.0, {"a": 1.0}], torch.ones(4)
        self.tensors, self.scaled, self.settings = [torch.ones(4), nn.Tanh()], scaled_by(1.0), Settings()
        self.calls = 0

    def forward(self, x):
        h = self.scaled(self.drop(self.tensors[1](self.body(x))))
        h = helper(h) * self.factors[1]["a"] * self.settings.table["a"][0]
        return self.rest(self.head(h)) * self.mask * self.tensors[0]

    def rest(self, outputs):
        self.calls += 1
        return outputs * self.constant / self.temperature


def multiply(owner, name):
    def change(monkeypatch, model):
        target = owner if owner is not None else model
        monkeypatch.setattr(target, name, 1.0002 * getattr(target, name))

    return change


def entry(get, key):
    def change(monkeypatch, model):
        get(model)[key] = 1.0002 * get(model)[key]

    return change


CHANGES = {
    "attribute": multiply(None, "temperature"),
    "element": lambda _, m: m.factors[1].update(a=1.0002),
    "class attribute": multiply(Net, "constant"),
    "global": lambda monkeypatch, m: monkeypatch.setitem(globals(), "OF_THE_FILE", 1.0002),
    "attribute of a global": multiply(SETTINGS, "beta"),
    "class attribute of a global": multiply(Settings, "of_the_class"),
    "closure": lambda _, m: m.scaled.change(),
    "held by an object": lambda _, m: m.settings.table["a"].__setitem__(0, 1.0002),
    "tensor": lambda _, m: setattr(m, "mask", 1.0002 * m.mask),
    "tensor in place": lambda _, m: m.mask.mul_(1.0002),
    "tensor in a list": lambda _, m: m.tensors.__setitem__(0, 1.0002 * m.tensors[0]),
    "module in a list": lambda _, m: m.tensors.__setitem__(1, nn.Hardtanh()),
    "option of a layer": lambda _, m: setattr(m.drop, "p", 0.5001),
    "hook": lambda _, m: m.head.register_forward_hook(lambda module, args, out: 1.0002 * out),
    "forward": lambda _, m: setattr(m, "rest", lambda outputs: 1.0002 * outputs),
}


@pytest.fixture
def product(accelerated):
    """``product(model)``: F v, and the same without a program."""
    x, v = torch.randn(64, 5), torch.randn(324, generator=torch.Generator().manual_seed(0))

    def run(model, autocast=False, family=GAUSSIAN):
        results = []
        for mode in ("auto", "off"):
            torch.manual_seed(0)
            with acceleration.mode(mode), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results.append(Fisher(model, x, family) @ v)
        return results

    return run


@pytest.mark.parametrize("change", CHANGES)
def test_a_small_change_is_seen(change, monkeypatch, product):
    model = Net()
    product(model)
    product(model)  # it counts its calls, which is found to have no part
    (kept,) = acceleration._programs.kept(model)
    product(model)
    assert acceleration._programs.kept(model) == [kept]
    CHANGES[change](monkeypatch, model)
    mine, theirs = product(model)
    assert kept not in acceleration._programs.kept(model)
    assert (mine - theirs).norm() < 2e-6 * theirs.norm()


def test_what_stays_the_same_is_no_change(monkeypatch):
    model = Net()
    before = Surroundings(model)
    model.temperature, model.factors, model.settings.table = float("1"), [1.0, {"a": 1.0}], {"a": [1.0, 2.0]}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert not before.changes()
    model.temperature, model.calls = 2.0, 7
    assert before.changes() == {"Net.temperature", "Net.calls"}
    assert Surroundings(Net(), frozenset({"Net.settings"})).without == {"Net.settings"}


def test_what_has_no_part_hides_all_that_is_behind_it_and_nothing_else():
    model = Net()
    without = Surroundings(model, frozenset({"Net.settings", "Net.calls"}))
    model.settings.beta, model.calls = 2.0, 1
    assert not without.changes()
    model.settings = Settings()
    assert not without.changes()
    model.temperature = 2.0
    assert without.changes() == {"Net.temperature"}


@pytest.mark.parametrize("rate", [1.0001, 1.001])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_temperature_that_is_annealed(autocast, rate, product):
    model = Net().eval()
    for _ in range(8):
        model.temperature *= rate
        mine, theirs = product(model, autocast)
        assert (mine - theirs).norm() < (8e-3 if autocast else 2e-6) * theirs.norm()


def test_an_output_that_is_small_beside_another_is_compared_by_its_own_size(product):
    """By a way in which a model can change that nobody looks for."""

    class Small(Net):
        def forward(self, x):
            h = self.head(self.body(x).tanh())
            return torch.cat([h[:, :3] / float(scale[0]), h[:, 3:] + 1000.0], -1)

    import numpy as np

    scale, model = np.ones(1), Small()
    family = families.Product([families.Categorical(), families.Gaussian()], [3, 1])
    product(model, family=family)
    scale *= 0.9
    mine, theirs = product(model, family=family)
    assert (mine - theirs).norm() < 2e-6 * theirs.norm()


def test_nothing_is_kept_alive():
    model = Net()
    model.own = model.rest  # a bound method, which holds it
    model.register_forward_hook(lambda module, args, out, model=model: out)
    surroundings, there = Surroundings(model), weakref.ref(model)
    del model
    gc.collect()
    assert there() is None
    assert surroundings.changes()


def test_functions_methods_and_cycles():
    class Holder:
        def __init__(self) -> None:
            self.power, self.me, self.list = 2, self, []
            self.list.append(self.list)

        def outputs(self, parameters, x):
            return (x @ parameters["w"]) ** self.power

    holder = Holder()
    scaled = scaled_by(2.0)
    by_method, by_function = Surroundings(holder.outputs), Surroundings(scaled)
    assert not by_method.changes()
    assert not by_function.changes()
    holder.power = 3
    scaled.change()
    assert len(by_method.changes()) == len(by_function.changes()) == 1
