import pytest
import torch
from torch import nn

from npg import optim
from npg.trust_region import LevenbergMarquardt
from npg.vision import rivals
from npg.vision.optimizers import OPTIMIZERS, make_optimizer, takes_batches


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


NEEDS = [name for name in OPTIMIZERS if name in ("soap", "shampoo") and rivals.pytorch_optimizer is None]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_step(name: str) -> None:
    if name in NEEDS:
        pytest.skip("pytorch-optimizer is not installed")
    torch.manual_seed(0)
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = make_optimizer(name, net, {"lr": 0.01})
    inputs, targets = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    for _ in range(10):  # as many as Shampoo waits for
        if takes_batches(name):
            optimizer.step(inputs, targets)
        else:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(net.parameters(), before))
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_names_mean_what_they_say() -> None:
    built = {name: make_optimizer(name, model(), {"lr": 0.01}) for name in OPTIMIZERS if name not in NEEDS}
    assert type(built["adam"]) is type(built["amsgrad"]) is torch.optim.Adam
    assert built["amsgrad"].defaults["amsgrad"]
    assert not built["adam"].defaults["amsgrad"]
    assert isinstance(built["ngd"], optim.NGD)
    assert isinstance(built["diagonal-ngd"], optim.DiagonalNGD)
    assert built["kfac"].solver == "kfac"
    assert make_optimizer("kfac", model(), {"solver": "ekfac"}).solver == "ekfac"
    assert isinstance(built["online-ngd"], optim.OnlineNGD)
    assert isinstance(built["kl-shampoo"], optim.KLShampoo)
    assert isinstance(built["muon"], rivals.Muon)
    for name in {"soap", "shampoo"} - {*NEEDS}:
        assert type(built[name]).__module__.startswith("pytorch_optimizer")


@pytest.mark.parametrize(("decay_all", "decayed"), [(False, [2, 4]), (True, [1, 1, 1, 2, 4])])
def test_weight_decay_reaches_weights_only_unless_asked(decay_all: bool, decayed: list[int]) -> None:
    optimizer = make_optimizer("sgd", model(), {"lr": 0.1, "weight_decay": 0.1}, decay_all=decay_all)
    axes = [p.ndim for group in optimizer.param_groups for p in group["params"] if group["weight_decay"]]
    assert sorted(axes) == decayed
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adma", {"lr": 1.0}, "unknown optimizer 'adma': did you mean adam"),
        ("x", {"lr": 1.0}, "unknown optimizer 'x': known are: sgd, adam, adamw"),
        ("online-ngd", {"lr": 1.0, "rnak": 3}, "unknown option 'rnak' of online-ngd: did you mean rank"),
        ("ngd", {"family": 3}, "unknown option 'family' of ngd: known are: lr, damping"),
        ("online-ngd", {}, "online-ngd needs a learning rate, lr"),
        ("online-ngd", {"lr": -1.0}, "lr"),
        ("sgd", {"lr": -1.0}, r"lr must lie in \[0, inf\), got -1.0"),
        ("sgd", {"lr": "fast"}, "the options of sgd do not fit"),
        ("ngd", {"damping_control": "lm"}, r"mapping of factor, minimum, maximum.* got 'lm'"),
        ("ngd", {"damping_control": {"omega": 2}}, "damping_control must be a mapping"),
        ("ngd", {"damping_control": {"factor": 0.5}}, r"factor must lie in \(1, inf\), got 0.5"),
        ("ngd", {"damping_control": {"factor": "fast"}}, "not a number"),
        ("sgd", {"lr": 1.0, "damping_control": {}}, "unknown option 'damping_control' of sgd"),
    ],
)
def test_bad_input(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, model(), options)


def test_damping_control_is_made_of_plain_values() -> None:
    torch.manual_seed(0)
    plain = make_optimizer("ngd", model(), {"damping": 1.0})
    assert plain.damping_control is None
    optimizer = make_optimizer("ngd", model(), {"damping": 1.0, "damping_control": {"factor": 3.0}})
    assert optimizer.damping_control == LevenbergMarquardt(factor=3.0)
    optimizer.step(torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert optimizer.param_groups[0]["damping"] in (1.0 / 3.0, 3.0)
    assert make_optimizer("ngd", model(), {"damping_control": {}}).damping_control == LevenbergMarquardt()
