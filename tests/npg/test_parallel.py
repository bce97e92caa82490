"""Two Gloo processes with half of the batch each equal one process with the whole batch.

Run as a script, this file is one of those processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from npg import Fisher, LevenbergMarquardt, TrustRegion, conjugate_gradient, families, natural_step
from npg.curvature import KroneckerFisher
from npg.parallel import World, average_, equal, mean_, moments, open_world, size

STEPS = 3
OPTIONS = {
    "rate": {"learning_rate": 0.2, "damping": 0.05},
    "radius": {"trust_region": TrustRegion(0.05), "damping": 0.01},
    "backtracking": {"trust_region": TrustRegion(1.0, min_gain_ratio=0.8), "damping": 0.01},
}


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
    return model, torch.randn(16, 3), torch.randint(4, (16,))


def far_away() -> Tensor:
    """Sixteen float32 numbers whose mean is 10⁴ times their spread."""
    return (1e4 + torch.randn(16, generator=torch.Generator().manual_seed(2))).float()


def everything(x: Tensor, y: Tensor, model: nn.Module, group: dist.ProcessGroup | None) -> dict[str, object]:
    """All that must come out the same, from the share (x, y) of the batch."""
    family = families.Categorical()
    found: dict[str, object] = {}
    for kind, options in {"exact": {}, "empirical": {"kind": "empirical", "targets": y}}.items():
        fisher = Fisher(model, x, family, process_group=group, **options)
        V = torch.randn(fisher.shape[0], 3, generator=torch.Generator().manual_seed(1))
        found[f"{kind} vector"] = fisher @ V[:, 0]
        found[f"{kind} block"] = fisher @ V
        found[f"{kind} quadratic"] = fisher.quadratic(V)
        found[f"{kind} dense"] = fisher.dense()
        found[f"{kind} diagonal"] = fisher.diagonal()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for name, options in OPTIONS.items():
        model.load_state_dict(start)
        damping = options["damping"]
        for step in range(STEPS):
            report = natural_step(
                model,
                x,
                family,
                lambda outputs: family.log_likelihood(outputs, y).mean(),
                solver=partial(conjugate_gradient, rtol=1e-12),
                process_group=group,
                **{**options, "damping": damping},
            )
            damping = LevenbergMarquardt().update(damping, report.predicted_gain, report.actual_gain, report.accepted)
            figures = (report.objective, report.actual_gain, report.predicted_gain, report.kl, report.predicted_kl)
            found[f"{name} {step} report"] = torch.tensor((*figures, report.scale, report.backtracks, damping))
            found[f"{name} {step} step"] = report.step
        found[f"{name} parameters"] = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])

    # a rank with a bad share stops all of them, and all keep their parameters
    rank = dist.get_rank(group) if group is not None else 1
    before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    bad = torch.nan if rank == 1 else 1.0
    report = natural_step(
        model,
        x,
        family,
        lambda outputs: bad * family.log_likelihood(outputs, y).mean(),
        process_group=group,
        **OPTIONS["radius"],
    )
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    found["refused"] = torch.tensor([float(not report.accepted), float(torch.equal(before, after))])
    return found


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


#: Each brings its process group.
WRAPPERS = {
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: compiled(DistributedDataParallel(model)),
    "DDP of a compiled one": lambda model: DistributedDataParallel(compiled(model)),
}


def through(wrap: Callable[[nn.Module], nn.Module], x: Tensor, y: Tensor) -> Tensor:
    """F and the step of a model that is wrapped, without a word of its group."""
    family, model = families.Categorical(), wrap(problem()[0])
    F = Fisher(model, x, family).dense()
    report = natural_step(
        model,
        x,
        family,
        lambda outputs: family.log_likelihood(outputs, y).mean(),
        solver=partial(conjugate_gradient, rtol=1e-12),
        **OPTIONS["radius"],
    )
    return torch.cat([F, report.step[None]])


#: What is made of a Fisher, (model, x, group) → anything.
OF_A_FISHER = {
    "product": lambda *of: (F := fisher_of(*of)) @ torch.ones(F.shape[0]),
    "quadratic": lambda *of: (F := fisher_of(*of)).quadratic(torch.ones(F.shape[0])),
    "dense": lambda *of: fisher_of(*of).dense(),
    "diagonal": lambda *of: fisher_of(*of).diagonal(),
    "estimate": lambda *of: fisher_of(*of).diagonal(probes=1),
    "kfac": lambda *of: KroneckerFisher(fisher_of(*of)),
    "curvature_inputs": lambda model, x, group: natural_step(
        model,
        torch.ones(4, 3),
        families.Categorical(),
        lambda outputs: outputs.square().mean(),
        curvature_inputs=x,
        process_group=group,
        **OPTIONS["radius"],
    ),
}


def fisher_of(model: nn.Module, x: Tensor, group: dist.ProcessGroup | None) -> Fisher:
    return Fisher(model, x, families.Categorical(), process_group=group)


def refused(use: Callable[..., object], *of: object) -> str:
    try:
        use(*of)
    except ValueError as error:
        return str(error)
    return ""


def work(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    model, x, y = problem()
    with open_world("cpu") as world:
        share = slice(8 * world.rank, 8 * (world.rank + 1))
        found = everything(x[share], y[share], model, world.group)
        for name, wrap in WRAPPERS.items():
            found[name] = through(wrap, x[share], y[share])
        # few enough events for products with Jᵀ in one process, too many in the other
        uneven = x[:2] if world.rank else x[:14]
        found["unequal shares"] = {name: refused(use, model, uneven, world.group) for name, use in OF_A_FISHER.items()}
        found["mean"] = mean_(torch.tensor([float(world.rank), 5.0]), world.group)
        found["moments"] = torch.stack(moments(far_away()[share], world.group))
        several = [torch.full((2, 3), float(world.rank)), torch.tensor(world.rank), torch.tensor([4.0 * world.rank])]
        average_(several, world.group)
        found["average"] = torch.cat([several[0].flatten(), several[2]])
        found["size"] = torch.tensor(size(world.group))
        verdicts = {}
        for bad in (torch.nan, torch.inf, 4.0):
            for who in (0, 1, None):  # who has it, or both
                value = torch.tensor([1.0, bad if who in (world.rank, None) else 3.0])
                verdicts[bad, who] = equal([value, torch.ones(2)], world.group)
        found["equal"] = torch.tensor(list(verdicts.values()))
    with open_world("cpu") as world:  # as often as one likes
        found["another world"] = mean_(torch.tensor([float(world.rank)]), world.group)
        torch.save(found, folder / f"rank{world.rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, two_processes) -> list[dict[str, object]]:
    return two_processes(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(double) -> dict[str, object]:
    model, x, y = problem()
    wrapped = through(lambda model: model, x, y)
    return everything(x, y, model, None) | dict.fromkeys(WRAPPERS, wrapped)


def test_two_processes_equal_one(ranks, alone):
    both = ranks[0]
    assert set(both) == {*alone, "unequal shares", "mean", "moments", "average", "size", "equal", "another world"}
    for name, expected in alone.items():
        torch.testing.assert_close(
            both[name], expected, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_ranks_stay_equal_bit_for_bit(ranks):
    for name in ranks[0].keys() - {"unequal shares"}:
        assert torch.equal(ranks[0][name], ranks[1][name]), name


def test_the_cases_are_what_they_claim(alone):
    assert alone["refused"].tolist() == [1.0, 1.0]
    assert max(float(alone[f"backtracking {step} report"][6]) for step in range(STEPS)) > 0
    assert torch.equal(alone["exact dense"], alone["exact dense"].T)


def test_unequal_shares_are_refused_by_all(ranks):
    for n, found in zip((14, 2), ranks, strict=True):
        assert found["unequal shares"].keys() == OF_A_FISHER.keys()
        for name, message in found["unequal shares"].items():
            expected = f"the processes have mini-batches of different sizes, {n} here and 8 in the mean: "
            assert message.startswith(expected), (name, message)


def test_mean(ranks):
    assert ranks[0]["mean"].tolist() == [0.5, 5.0]
    assert ranks[0]["average"].tolist() == [0.5] * 6 + [2.0]
    assert int(ranks[0]["size"]) == 2


def test_one_world_after_another(ranks):
    assert [rank["another world"].item() for rank in ranks] == [0.5, 0.5]


def test_equality_is_of_finite_numbers(ranks):
    for rank in ranks:
        assert rank["equal"].tolist() == [False] * 8 + [True]


def test_no_two_processes_of_any_runs_draw_the_same():
    worlds = [World(torch.device("cpu"), rank, 8) for rank in range(8)]
    seeds = [world.own_seed(seed) for world in worlds for seed in range(64)]
    assert seeds[:64] == list(range(64))
    assert len({*range(128), *seeds}) == 128 + 7 * 64
    assert 0 <= min(seeds) <= max(seeds) < 2**32


def test_moments(ranks):
    x = far_away().double()
    expected = torch.stack([x.mean(), x.var(correction=0)])
    torch.testing.assert_close(ranks[0]["moments"], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.stack(moments(far_away(), None)), expected, rtol=1e-10, atol=0)


def test_without_a_group_nothing_happens():
    value = torch.tensor([1.0, 2.0])
    assert mean_(value, None) is value
    average_([value], None)
    assert value.tolist() == [1.0, 2.0]
    assert size(None) == 1


ALONE = """
import gc, sys, weakref
import torch, torch.distributed as dist
from npg import Fisher, families

dist.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)
group = weakref.ref(dist.group.WORLD)
fisher = Fisher(torch.nn.Linear(2, 2), torch.ones(3, 2), families.Categorical(), process_group=dist.group.WORLD)
fisher @ torch.ones(6)
del fisher
dist.destroy_process_group()
gc.collect()
assert group() is None
"""


@pytest.mark.slow
def test_a_destroyed_group_ends(tmp_path):
    # only then does it join its threads, which abort the process if they outlive the interpreter
    done = subprocess.run([sys.executable, "-c", ALONE, f"file://{tmp_path}/store"], check=False, timeout=240)
    assert done.returncode == 0


WATCHED = """
import os, signal, sys, time
import torch
import npg.parallel

npg.parallel.SILENT = 4.0
with npg.parallel.open_world("cpu") as world:
    world.sum_(torch.ones(1))
    if world.rank == 1 and sys.argv[1].startswith("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if world.rank == 1 and sys.argv[1] == "ends early":
        sys.exit()
    if world.rank == 1 and sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] in ("stopped", "killed"):
        world.sum_(torch.ones(1))
    if sys.argv[1] != "stopped at the end":
        time.sleep(9)
    print("the end", flush=True)
"""


@pytest.mark.parametrize("what", ["stopped", "stopped at the end", "killed", "ends early"])
@pytest.mark.slow
def test_a_process_that_is_lost_ends_the_others_with_one_message(what, free_port):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "OMP_NUM_THREADS": "1"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", WATCHED, what],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    )
    try:
        out, err = first.communicate(timeout=120)
    finally:
        second.kill()
        second.communicate()
    silent = "process 1 has given no sign of life for 4 s: it was lost or stopped"
    if what == "ends early":  # a process that has done its part is not missed
        assert first.returncode == 0, err
        assert out == "the end\n"
        assert silent not in err
    else:
        assert first.returncode == 1
        assert err.count("the connection to another process broke: it was killed" if what == "killed" else silent) == 1
        assert "Traceback" not in err


if __name__ == "__main__":
    work(Path(sys.argv[1]))
