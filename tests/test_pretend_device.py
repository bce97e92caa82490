"""Code for accelerators, run on a make-believe one: no mixing of devices, few looks by the host, the CPU's results.

All cases run in one process of their own, because the device stays in the process that has imported it.
"""

import copy
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

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


# ------------------------------------------------------------------------- the cases, in the process with the device


def mixing_is_refused() -> None:
    with pytest.raises(RuntimeError, match="meets tensors on pretend"):
        torch.ones(2, device="pretend") + torch.ones(2)
    assert (torch.ones(2, device="pretend") + torch.tensor(1.0)).tolist() == [2.0, 2.0]


def products_are_those_of_the_cpu(build: Callable[[], nn.Module], *shape: int) -> None:
    here, there = build(), build().to("pretend")
    v = torch.randn(sum(p.numel() for p in here.parameters()), dtype=torch.float64)
    want = Fisher(here, data(*shape)[0], FAMILY) @ v
    got = Fisher(there, data(*shape, device="pretend")[0], FAMILY) @ v.to("pretend")
    torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-12)


def programs_are_traced() -> None:
    """And what they give is what autograd recorded, or they would not be used."""
    accelerate, found = linearize.accelerate, []

    def noted(*arguments: object) -> object:
        found.append(accelerate(*arguments))
        return found[-1]

    linearize.accelerate = noted
    try:
        with acceleration.mode("auto"):
            for build, shape in ((mlp, (4,)), (convolutional, (2, 6, 6))):
                inputs = data(*shape, device="pretend")[0].float()
                fisher = Fisher(build().float().to("pretend"), inputs, FAMILY)
                product = fisher @ torch.ones(fisher.shape[0], device="pretend")
                assert product.device.type == "pretend"
    finally:
        linearize.accelerate = accelerate
    assert len(found) == 2
    assert all(maps is not None for maps in found)


def cg_looks_once_in_eight_iterations() -> None:
    import pretend_device

    fisher = Fisher(mlp().to("pretend"), data(4, device="pretend")[0], FAMILY)
    g = torch.randn(fisher.shape[0], dtype=torch.float64).to("pretend")
    fisher @ g  # what is done once per linearisation
    looks = []
    for iterations in (8, 16, 32):
        pretend_device.reads.clear()
        solution = conjugate_gradient(fisher, g, damping=0.1, max_iterations=iterations, rtol=0.0)
        looks.append(pretend_device.reads.total())
        assert solution.iterations == iterations
    # what is read at the end of a solve is the same for all
    assert [b - a for a, b in pairwise(looks)] == [1, 2], looks
    assert looks[0] <= 4, looks


def an_optimizer_is_that_of_the_cpu(name: str) -> None:
    import pretend_device

    taken = gradients._Outcome.taken
    gradients._Outcome.taken = pretend_device.uncounted()(taken)  # of the step before, which CUDA does not wait for
    here, there = convolutional(), convolutional().to("pretend")
    for model, device in ((here, "cpu"), (there, "pretend")):
        torch.manual_seed(2)  # K-FAC's signs
        optimizer = OPTIMIZERS[name](model)
        x, y = data(2, 6, 6, device=device)
        for _ in range(13):
            if isinstance(optimizer, gradients.GradientOptimizer):
                optimizer.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                pretend_device.reads.clear()
                optimizer.step()
                assert not pretend_device.reads.total(), f"the host looked: {pretend_device.reads}"
            else:
                optimizer.step(x, y)
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


def a_wide_resnet_steps(name: str) -> None:
    models = []
    for device in ("cpu", "pretend"):
        torch.manual_seed(0)
        model = wide_resnet(depth=10, widen_factor=1, num_classes=3, stem_stride=2).double().to(device)
        x, y = data(3, 8, 8, device=device)
        optimizer = OPTIMIZERS[name](model)
        for _ in range(2):
            if isinstance(optimizer, gradients.GradientOptimizer):
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            else:
                optimizer.step(x, y)
        models.append(model)
    same(models[1], models[0], 1e-6)


def an_agent_learns(name: str) -> None:
    import agents
    from envs import make_vec_env

    results = []
    for device in ("cpu", "pretend"):
        env = make_vec_env("CartPole-v1", n_envs=2, seed=0, backend="gymnasium")
        model = getattr(agents, name)("MlpPolicy", env, n_steps=32, batch_size=32, seed=0, device=device)
        before = [p.detach().cpu().clone() for p in model.policy.parameters()]
        model.learn(64)
        assert all(p.device.type == device for p in model.policy.parameters())
        results.append([p.detach().cpu() for p in model.policy.parameters()])
        assert any(not torch.equal(p, q) for p, q in zip(before, results[-1], strict=True))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


CASES: dict[str, Callable[[], None]] = {
    "mixing": mixing_is_refused,
    "fisher": lambda: products_are_those_of_the_cpu(mlp, 4),
    "fisher of convolutions": lambda: products_are_those_of_the_cpu(convolutional, 2, 6, 6),
    "traced programs": programs_are_traced,
    "cg": cg_looks_once_in_eight_iterations,
    **{name: lambda name=name: an_optimizer_is_that_of_the_cpu(name) for name in OPTIMIZERS},  # type: ignore[misc]
    **{f"wide resnet, {n}": lambda n=n: a_wide_resnet_steps(n) for n in ("kl-shampoo", "ngd")},  # type: ignore[misc]
    **{name: lambda name=name: an_agent_learns(name) for name in AGENTS},  # type: ignore[misc]
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each case."""
    file = tmp_path_factory.mktemp("pretend") / "errors.json"
    done = subprocess.run([sys.executable, __file__, str(file)], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(f"this PyTorch, {torch.__version__}, has no hook for devices in Python")
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", CASES)
def test_on_the_make_believe_device(errors: dict[str, str], case: str) -> None:
    assert errors[case] == ""


def main(file: Path) -> None:
    try:
        import pretend_device  # noqa: F401
    except ImportError:
        sys.exit(77)
    found = {}
    for name, case in CASES.items():
        try:
            case()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
