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


class Experts(nn.Module):
    """Layers that only some rows reach, and a weight that some use outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x).tanh()
        y = torch.zeros(len(x), 3).to(x)
        for layer, rows in ((self.left, x[:, 0] < 0), (self.right, x[:, 0] >= 0)):
            if rows.any():
                y = y.index_put((rows.nonzero()[:, 0],), layer(hidden[rows]))
        outside = x[:, 1] > 10
        return y + functional.linear(hidden, self.left.weight) * outside.unsqueeze(1) if outside.any() else y


def make_model(name: str = "") -> nn.Module:
    torch.manual_seed(0)
    if name.endswith("experts"):
        return Experts().double()
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 3)).double()


#: Of each step, how many rows of each process go to the left: all, none, or some.
LEFT = [(6, 0), (5, 2), (0, 6), (3, 6), (1, 2)]


def batches(name: str = "") -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    if name.endswith("experts"):
        made = [(torch.randn(12, 3, generator=g).double(), torch.randint(3, (12,), generator=g)) for _ in range(STEPS)]
        for (x, _), of_ranks in zip(made, LEFT, strict=True):
            for rank, n in enumerate(of_ranks):
                sign = torch.ones(6).double()
                sign[:n] = -1
                x[6 * rank : 6 * rank + 6, 0] = sign * (x[6 * rank : 6 * rank + 6, 0].abs() + 0.1)
        if name.startswith("outside"):
            made[3][0][7, 1] = 11.0  # in the second process alone
        return made
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
    if name.startswith("diagonal-ngd") and not name.endswith("online"):
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
    }[name.removesuffix(" experts").removeprefix("outside ")]
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
#: Of these also a model whose layers, and the rows that reach them, differ between the processes.
EXPERTS = [f"{name} experts" for name in ("diagonal-ngd", "ngd", "kfac", "ekfac", "ngd-kfac")]
#: Their multiples have the signs of probes, which differ from process to process.
OUTSIDE = [f"outside {name} experts" for name in ("kfac", "ekfac")]
#: Of these also what `torch.compile` makes of DistributedDataParallel, in the order that PyTorch recommends.
COMPILED = ["online-ngd", "diagonal-ngd", "ngd", "kfac"]


def train(name: str, model: nn.Module, part: slice) -> Tensor:
    optimizer = make_optimizer(name, model)
    for x, y in batches(name):
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
        trained = {
            name: train(name, DistributedDataParallel(make_model(name)), share) for name in [*NAMES, *EXPERTS, *OUTSIDE]
        }
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
        for name in ("diagonal-ngd", "ngd", "kfac"):
            model = make_model()
            optimizer = make_optimizer(name, model, process_group=world.group)
            before = nn.utils.parameters_to_vector(model.parameters())
            unequal = slice(0, 9) if world.is_main else slice(9, 12)
            try:
                optimizer.step(x[unequal], y[unequal])
                trained[f"{name} of unequal shares"] = "nothing", 0.0
            except ValueError as error:
                moved = (nn.utils.parameters_to_vector(model.parameters()) - before).norm()
                trained[f"{name} of unequal shares"] = str(error), float(moved)
        torch.save(trained, folder / f"rank{world.rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory, two_processes):
    ranks = two_processes(__file__, tmp_path_factory.mktemp("ranks"))
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.filterwarnings("ignore:EKFAC takes K-FAC's values")
@pytest.mark.parametrize("name", [*NAMES, *EXPERTS, *(f"{name} compiled" for name in COMPILED)])
def test_two_processes_equal_one(results, name):
    first, second = results[name]
    assert torch.equal(first, second), "replicas must stay bitwise equal"
    alone = train(name.removesuffix(" compiled"), make_model(name), slice(None))
    start = nn.utils.parameters_to_vector(make_model(name).parameters())
    assert (alone - start).norm() > 0.1
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_weight_that_one_process_uses_outside_of_its_layer_has_no_factors_in_any(results, name):
    first, second = results[name]
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert not torch.equal(first, results[name.removeprefix("outside ")][0])


@pytest.mark.parametrize("name", ["ngd", "diagonal-ngd"])
def test_processes_that_do_not_begin_alike_are_refused(results, name):
    for message in results[f"{name} refuses"]:
        assert message.startswith("the parameters of model are not the same in all processes of process_group")


@pytest.mark.parametrize("name", ["diagonal-ngd", "ngd", "kfac"])
def test_unequal_shares_are_refused_by_all(results, name):
    for n, (message, moved) in zip((9, 3), results[f"{name} of unequal shares"], strict=True):
        assert message.startswith(f"the processes have mini-batches of different sizes, {n} here and 6 in the mean: ")
        assert moved == 0.0


if __name__ == "__main__":
    work(Path(sys.argv[1]))
