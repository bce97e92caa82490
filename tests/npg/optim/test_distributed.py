"""Two processes with half of the batch each take the steps of one process with the whole batch."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from npg import LevenbergMarquardt, families
from npg.optim import NGD, DiagonalNGD, KLShampoo, OnlineNGD
from npg.parallel import open_world

STEPS = 5


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 2, 5, 5, generator=g).double(), torch.randint(3, (12,), generator=g)) for _ in range(STEPS)
    ]


def make_optimizer(name: str, model: nn.Module, **options: object) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    if name == "online-ngd":
        return OnlineNGD(model.parameters(), 0.1, weight_decay=1e-3)
    if name.startswith("kl-shampoo"):
        return KLShampoo(model.parameters(), 0.05, weight_decay=1e-3, power=1.0 if name.endswith("1") else 0.5)
    if name == "diagonal-ngd":
        return DiagonalNGD(model, families.Categorical(), 0.05, probes=None, **options)
    if name == "diagonal-ngd-online":
        return DiagonalNGD(model, families.Categorical(), 0.05, damping=0.1, probes=None, damping_metric="online")
    changes = {
        "ngd": {"lr": 0.5, "damping": 0.1, "momentum": 0.5},
        "ngd-max-kl": {"max_kl": 0.02, "damping": 0.01},
        "ngd-lm": {"damping": 0.1, "damping_control": LevenbergMarquardt(), "warm_start": 0.9},
        "ngd-online": {"lr": 0.5, "damping": 0.1, "damping_metric": "online"},
        "kfac": {"lr": 0.5, "damping": 0.1, "solver": "kfac", "probes": None},
        "ekfac": {"lr": 0.5, "damping": 0.1, "solver": "ekfac", "probes": None, "update_period": 2},
        "ngd-kfac": {"lr": 0.5, "damping": 0.1, "preconditioner": "kfac", "probes": None},
        "ngd-dense": {"lr": 0.5, "damping": 0.1, "solver": "dense"},
    }[name]
    return NGD(model, families.Categorical(), **changes, **options)


OF_GRADIENTS = ["sgd", "online-ngd", "kl-shampoo", "kl-shampoo-1"]
NAMES = [
    *OF_GRADIENTS,
    "diagonal-ngd",
    "diagonal-ngd-online",
    "ngd",
    "ngd-max-kl",
    "ngd-lm",
    "ngd-online",
    "kfac",
    "ekfac",
    "ngd-kfac",
    "ngd-dense",
]
#: Of these also what `torch.compile` makes of DistributedDataParallel, in the order that PyTorch recommends.
COMPILED = ["online-ngd", "diagonal-ngd", "ngd", "kfac"]


def train(name: str, model: nn.Module, part: slice) -> Tensor:
    optimizer = make_optimizer(name, model)
    for x, y in batches():
        if name in OF_GRADIENTS:
            optimizer.zero_grad()
            functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
        else:
            optimizer.step(x[part], y[part])
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def work(folder: Path) -> None:
    with open_world("cpu") as world:
        share = slice(6 * world.rank, 6 * world.rank + 6)
        trained = {name: train(name, DistributedDataParallel(make_model()), share) for name in NAMES}
        for name in COMPILED:
            model = torch.compile(DistributedDataParallel(make_model()), backend="eager")
            trained[f"{name} compiled"] = train(name, model, share)
        others = make_model()
        with torch.no_grad():
            others[0].bias += world.rank
        x, y = batches()[0]
        for name in ("ngd", "diagonal-ngd"):
            optimizer = make_optimizer(name, others, process_group=world.group)
            try:
                optimizer.step(x[share], y[share])
                trained[f"{name} refuses"] = "nothing"
            except ValueError as error:
                trained[f"{name} refuses"] = str(error)
        torch.save(trained, folder / f"rank{world.rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory, two_processes):
    ranks = two_processes(__file__, tmp_path_factory.mktemp("ranks"))
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.parametrize("name", [*NAMES, *(f"{name} compiled" for name in COMPILED)])
def test_two_processes_equal_one(results, name):
    first, second = results[name]
    assert torch.equal(first, second), "replicas must stay bitwise equal"
    alone = train(name.removesuffix(" compiled"), make_model(), slice(None))
    start = nn.utils.parameters_to_vector(make_model().parameters())
    assert (alone - start).norm() > 0.1
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["ngd", "diagonal-ngd"])
def test_processes_that_do_not_begin_alike_are_refused(results, name):
    for message in results[f"{name} refuses"]:
        assert message.startswith("the parameters of model are not the same in all processes of process_group")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
