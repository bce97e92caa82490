"""Code for accelerators, on CUDA where there is one and on a make-believe device: the CPU's results, few looks at it.

On the make-believe device all cases run in a process of their own, because it stays where it was imported.
"""

import copy
import json
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import agents
from envs import make_vec_env
from npg import Fisher, acceleration, conjugate_gradient, families, linearize, optim
from npg.optim import gradients
from npg.vision import wide_resnet

FAMILY = families.Categorical()
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "online-ngd": lambda m: optim.OnlineNGD(m.parameters(), 0.05, weight_decay=0.1, max_change=1.0),
    "kl-shampoo": lambda m: optim.KLShampoo(m.parameters(), 0.02, weight_decay=0.1, max_axis=20),
    "kl-shampoo-natural": lambda m: optim.KLShampoo(m.parameters(), 0.01, power=1.0),
    "ngd": lambda m: optim.NGD(m, FAMILY, lr=0.3, damping=0.1, momentum=0.5),
    "ngd-max-kl": lambda m: optim.NGD(m, FAMILY, damping=0.1, max_kl=0.01, damping_metric="online"),
    "kfac": lambda m: optim.NGD(m, FAMILY, lr=0.3, damping=0.1, solver="kfac", probes=None),
    "ekfac": lambda m: optim.NGD(m, FAMILY, lr=0.3, damping=0.1, solver="ekfac", probes=None),
    "diagonal-ngd": lambda m: optim.DiagonalNGD(m, FAMILY, lr=0.05, probes=None),
    "diagonal-ngd-online": lambda m: optim.DiagonalNGD(m, FAMILY, lr=0.05, probes=None, damping_metric="online"),
}
AGENTS = ["TRPO", "NPG", "MDPO"]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).double()


def data(*shape: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, *shape, generator=g).double(), torch.randint(3, (16,), generator=g)
    return x.to(device), y.to(device)


def same(a: nn.Module, b: nn.Module, tolerance: float = 1e-8) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def reads() -> Counter[str]:
    """How often the host has looked at the make-believe device; nobody counts on CUDA."""
    module = sys.modules.get("pretend_device")
    return Counter() if module is None else module.reads


# -------------------------------------------------------------------------------------------------------- the cases


def mixing_is_refused(device: str) -> None:
    with pytest.raises(RuntimeError, match=device):
        torch.ones(2, device=device) + torch.ones(2)
    assert (torch.ones(2, device=device) + torch.tensor(1.0)).tolist() == [2.0, 2.0]


def products_are_those_of_the_cpu(device: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    here, there = build(), build().to(device)
    v = torch.randn(sum(p.numel() for p in here.parameters()), dtype=torch.float64)
    want = Fisher(here, data(*shape)[0], FAMILY) @ v
    got = Fisher(there, data(*shape, device=device)[0], FAMILY) @ v.to(device)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-12)


def programs_are_traced(device: str) -> None:
    """And what they give is what autograd recorded, or they would not be used."""
    accelerate, found = linearize.accelerate, []

    def noted(*arguments: object) -> object:
        found.append(accelerate(*arguments))
        return found[-1]

    linearize.accelerate = noted
    try:
        with acceleration.mode("auto"):
            for build, shape in ((mlp, (4,)), (convolutional, (2, 6, 6))):
                inputs = data(*shape, device=device)[0].float()
                fisher = Fisher(build().float().to(device), inputs, FAMILY)
                product = fisher @ torch.ones(fisher.shape[0], device=device)
                assert product.device.type == device
    finally:
        linearize.accelerate = accelerate
    assert len(found) == 2
    assert all(maps is not None for maps in found)


def cg_looks_once_in_eight_iterations(device: str) -> None:
    with acceleration.mode("auto"):  # plain forward mode compares the outputs of every product with the recorded ones
        fisher = Fisher(mlp().to(device), data(4, device=device)[0], FAMILY)
        g = torch.randn(fisher.shape[0], dtype=torch.float64).to(device)
        fisher @ g  # what is done once per linearisation
    looks = []
    for iterations in (8, 16, 32):
        reads().clear()
        solution = conjugate_gradient(fisher, g, damping=0.1, max_iterations=iterations, rtol=0.0)
        looks.append(reads().total())
        assert solution.iterations == iterations
    # what is read at the end of a solve is the same for all
    if device == "pretend":
        assert [b - a for a, b in pairwise(looks)] == [1, 2], looks
        assert looks[0] <= 4, looks


def an_optimizer_is_that_of_the_cpu(device: str, name: str) -> None:
    here, there = convolutional(), convolutional().to(device)
    for model, place in ((here, "cpu"), (there, device)):
        torch.manual_seed(2)  # K-FAC's signs
        optimizer = OPTIMIZERS[name](model)
        x, y = data(2, 6, 6, device=place)
        for _ in range(13):
            if isinstance(optimizer, gradients.GradientOptimizer):
                optimizer.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                reads().clear()
                optimizer.step()
                assert not reads().total(), f"the host looked: {reads()}"
            else:
                optimizer.step(x, y)
    if device == "pretend" or "kfac" not in name:  # which draws its signs from another generator on CUDA
        same(there, here)
    with pytest.raises(AssertionError):
        same(there, convolutional())
    if isinstance(optimizer, gradients.GradientOptimizer):
        for p in there.parameters():
            p.grad = torch.full_like(p, float("nan"))
        before = copy.deepcopy([p.detach().cpu() for p in there.parameters()])
        optimizer.step()
        with pytest.warns(RuntimeWarning, match="refused a step"):
            optimizer.state_dict()
        assert all(torch.equal(p.cpu(), q) for p, q in zip(there.parameters(), before, strict=True))


def parameters_may_lie_on_two_devices(device: str, name: str) -> None:
    here, there = convolutional(), convolutional()
    for model, place in ((here, "cpu"), (there, device)):
        first, last = model[:3].to(place), model[3:]
        x, y = data(2, 6, 6)
        optimizer = OPTIMIZERS[name](model)
        for _ in range(5):
            optimizer.zero_grad()
            functional.cross_entropy(last(first(x.to(place)).cpu()), y).backward()
            optimizer.step()
    same(there, here)


def a_wide_resnet_steps(device: str, name: str) -> None:
    models = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        model = wide_resnet(depth=10, widen_factor=1, num_classes=3, stem_stride=2).double().to(place)
        x, y = data(3, 8, 8, device=place)
        optimizer = OPTIMIZERS[name](model)
        for _ in range(2):
            if isinstance(optimizer, gradients.GradientOptimizer):
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            else:
                optimizer.step(x, y)
        models.append(model)
    same(models[1], models[0], 1e-6)


def an_agent_learns(device: str, name: str) -> None:
    results = []
    for place in ("cpu", device):
        env = make_vec_env("CartPole-v1", n_envs=2, seed=0, backend="gymnasium")
        model = getattr(agents, name)("MlpPolicy", env, n_steps=32, batch_size=32, seed=0, device=place)
        before = [p.detach().cpu().clone() for p in model.policy.parameters()]
        model.learn(64)
        assert all(p.device.type == place for p in model.policy.parameters())
        results.append([p.detach().cpu() for p in model.policy.parameters()])
        assert all(p.isfinite().all() for p in results[-1])
        assert any(not torch.equal(p, q) for p, q in zip(before, results[-1], strict=True))
    if device == "pretend":  # CUDA draws other actions
        for p, q in zip(*results, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


CASES: dict[str, Callable[[str], None]] = {
    "mixing": mixing_is_refused,
    "fisher": partial(products_are_those_of_the_cpu, build=mlp, shape=(4,)),
    "fisher of convolutions": partial(products_are_those_of_the_cpu, build=convolutional, shape=(2, 6, 6)),
    "traced programs": programs_are_traced,
    "cg": cg_looks_once_in_eight_iterations,
    **{name: partial(an_optimizer_is_that_of_the_cpu, name=name) for name in OPTIMIZERS},
    **{f"two devices, {name}": partial(parameters_may_lie_on_two_devices, name=name) for name in list(OPTIMIZERS)[:2]},
    **{f"wide resnet, {name}": partial(a_wide_resnet_steps, name=name) for name in ("kl-shampoo", "ngd")},
    **{name: partial(an_agent_learns, name=name) for name in AGENTS},
}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_on_cuda(case: str) -> None:
    CASES[case]("cuda")


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each case."""
    file = tmp_path_factory.mktemp("pretend") / "errors.json"
    # -P: in the folder of this file there is another envs
    done = subprocess.run([sys.executable, "-P", __file__, str(file)], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(f"this PyTorch, {torch.__version__}, has no hook for devices in Python")
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", CASES)
def test_on_the_make_believe_device(errors: dict[str, str], case: str) -> None:
    assert errors[case] == ""


def main(file: Path) -> None:
    sys.path.append(str(Path(__file__).parent))
    try:
        import pretend_device
    except ImportError:
        sys.exit(77)
    taken = gradients._Outcome.taken
    gradients._Outcome.taken = pretend_device.uncounted()(taken)  # of the step before, which CUDA does not wait for
    found = {}
    for name, case in CASES.items():
        try:
            case("pretend")
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
