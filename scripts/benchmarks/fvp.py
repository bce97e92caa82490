"""Time of one Fisher-vector product, in units of one gradient: ours, and the ways in which others form it.

    python scripts/benchmarks/fvp.py --csv docs/results/fvp.csv

* gradient: forward and backward pass of the mean log-likelihood;
* ours: `npg.Fisher`, linearised before (what one CG iteration costs);
* ours, no oneDNN: the same with ``torch.backends.mkldnn`` off, for convolutions as well;
* ours, linearise: the linearisation itself (once per solve; the gradient comes out of it as well);
* double backward: the derivative of ∇KL·v on a kept graph, as the reinforcement-learning libraries do it;
* jvp-vjp: `torch.func.jvp`, then a kept backward graph;
* curvlinops: its GGN operator (`pip install curvlinops-for-pytorch`), where it is installed.

All take turns within one run; the ratio is taken within each round.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy

import torch
from interleaved import machine, make_parser, measure, ratio, synchronize, with_number, write_csv
from torch import nn
from torch.func import functional_call, jvp

from npg import Fisher, families
from npg.model import frozen_statistics
from npg.vision import model_from_name


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(17, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 6))


def problems(
    of: list[tuple[str, int]], device: torch.device
) -> dict[str, tuple[nn.Module, torch.Tensor, families.Family]]:
    made: dict[str, tuple[nn.Module, torch.Tensor, families.Family]] = {}
    for model_name, batch in of:
        if model_name.startswith("mlp-"):
            model: nn.Module = mlp(int(model_name.removeprefix("mlp-")))
            x, family = torch.randn(batch, 17), families.Gaussian()
        else:
            model, x, family = model_from_name(model_name), torch.randn(batch, 3, 32, 32), families.Categorical()
        made[f"{model_name}@{batch}"] = model.to(device), x.to(device), family
    return made


def rivals(model: nn.Module, x: torch.Tensor, family: families.Family) -> dict[str, Callable[[], torch.Tensor]]:
    parameters = list(model.parameters())
    named = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in parameters]
    with frozen_statistics(model):
        outputs = model(x)
    targets = family.sample(outputs)
    v = torch.randn(sum(sizes), device=x.device)
    tangents = {name: t.view_as(p) for (name, p), t in zip(named.items(), v.split(sizes))}
    metric = family.metric(outputs)
    events = len(x)

    def flat(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    def gradient() -> torch.Tensor:
        return flat(torch.autograd.grad(family.log_likelihood(model(x), targets).mean(), parameters))

    fisher = Fisher(model, x, family)
    with torch.backends.mkldnn.flags(enabled=False):
        without_one_dnn = Fisher(deepcopy(model), x, family)  # each has its program from the first product on
        without_one_dnn @ v

    def no_one_dnn() -> torch.Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return without_one_dnn @ v

    with frozen_statistics(model):
        old = model(x)
        kl = family.kl(old.detach(), old).mean()
        kl_gradient = flat(torch.autograd.grad(kl, parameters, create_graph=True))

    def double_backward() -> torch.Tensor:
        return flat(torch.autograd.grad((kl_gradient * v).sum(), parameters, retain_graph=True))

    def jvp_vjp() -> torch.Tensor:
        with frozen_statistics(model):
            _, tangent = jvp(lambda p: functional_call(model, p, (x,)), (named,), (tangents,))
        return flat(torch.autograd.grad(outputs, parameters, metric(tangent) / events, retain_graph=True))

    ways = {
        "gradient": gradient,
        "ours": lambda: fisher @ v,
        "ours, no oneDNN": no_one_dnn,
        "ours, linearise": lambda: Fisher(model, x, family).linearization.push_forward(v),
        "double backward": double_backward,
        "jvp-vjp": jvp_vjp,
    }
    expected = fisher @ v
    # Through a Wide ResNet in float32, PyTorch's convolutions without oneDNN alone are off a float64 product by 1e-3;
    # ours and double backward are off by 2e-4.
    for name, bound in (("ours, no oneDNN", 5e-3), ("double backward", 1e-3), ("jvp-vjp", 1e-3)):
        difference = float((ways[name]() - expected).norm() / expected.norm())
        assert difference < bound, f"{name} differs from ours by {difference:.1e}"
    try:
        from curvlinops import GGNLinearOperator
    except ImportError:
        return ways
    loss: nn.Module = nn.CrossEntropyLoss() if isinstance(family, families.Categorical) else nn.MSELoss()
    try:
        with frozen_statistics(model):
            operator = GGNLinearOperator(
                model, loss, list(model.parameters()), [(x, targets)], check_deterministic=False
            )
            operator @ v
    except Exception as error:
        print(f"curvlinops does not take this model: {type(error).__name__}: {str(error).splitlines()[0]}")
        return ways

    def curvlinops() -> torch.Tensor:
        with frozen_statistics(model):
            return operator @ v

    return {**ways, "curvlinops": curvlinops}


def main() -> None:
    parser = make_parser(__doc__, rounds=20)
    parser.add_argument(
        "problems",
        nargs="*",
        type=with_number("@", 1),
        default=[("mlp-64", 2048), ("mlp-64", 8192), ("densenet-19", 128), ("wrn-16-1", 128)],
        help="MODEL@BATCH",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")  # flags() touches a setting of GPUs
    device = torch.device(options.device)

    rows = []
    print(f"{'problem':<18}{'product':<18}{'ms':>9}{'gradients':>11}   quartiles")
    for name, (model, x, family) in problems(options.problems, device).items():
        functions = rivals(model, x, family)
        synchronize(device)
        seconds = measure(functions, rounds=options.rounds, turn=10 if name.startswith("mlp") else 2, device=device)
        for way, times in seconds.items():
            low, middle, high = ratio(seconds, way, "gradient")
            milliseconds = 1e3 * sorted(times)[len(times) // 2]
            print(f"{name:<18}{way:<18}{milliseconds:>9.2f}{middle:>11.2f}   {low:.2f} to {high:.2f}")
            rows.append(
                {
                    "problem": name,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "product": way,
                    "ms_median": f"{milliseconds:.3f}",
                    "gradients_median": f"{middle:.3f}",
                    "gradients_quartile_1": f"{low:.3f}",
                    "gradients_quartile_3": f"{high:.3f}",
                    "rounds": options.rounds,
                    "threads": options.threads,
                    "machine": machine(device),
                    "torch": torch.__version__,
                }
            )
    write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
