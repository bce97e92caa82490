"""Two Gloo processes with half of the environments each equal one process with all of them.

Run as a script, this file is one of those processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.running_mean_std import RunningMeanStd

from agents import MDPO, NPG, TRPO
from agents.callbacks import CommonStatistics
from envs import make_vec_env
from npg.parallel import World, open_world

pytestmark = pytest.mark.slow  # one start of two processes serves them all

ALONE = World(torch.device("cpu"))
N_ENVS, N_STEPS, UPDATES = 4, 32, 2
TASKS = ("CartPole-v1", "Pendulum-v1")
#: A mini-batch of 48 out of the 128 rows of a rollout: the last one has 32.
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"n_critic_updates": 3, "batch_size": 48, "learning_rate": 1e-2},
    "natural": {"n_critic_updates": 3, "critic": "natural"},
}
CASES = [(cls, critic, task) for cls in (TRPO, NPG, MDPO) for critic in OPTIONS for task in TASKS]


def name_of(case: tuple[type, str, str]) -> str:
    return f"{case[0].__name__}, {case[1]}, {case[2]}"


def make(case: tuple[type, str, str], n_envs: int) -> Any:
    cls, critic, task = case
    env = make_vec_env(task, n_envs, seed=0, backend="gymnasium")
    # Few iterations: ten of them multiply rounding errors by 10⁸, from the mere order of the rows in one process too.
    iterations = {} if cls is MDPO else {"cg_max_steps": 4}
    return cls("MlpPolicy", env, n_steps=N_STEPS, seed=0, device="cpu", **iterations, **OPTIONS[critic])


def record(case: tuple[type, str, str]) -> dict[str, np.ndarray]:
    """A rollout of all environments, (steps, environments, …)."""
    model = make(case, N_ENVS)
    _, callback = model._setup_learn(10**6, None)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    names = ("observations", "actions", "log_probs", "values", "returns", "advantages")
    return {name: getattr(model.rollout_buffer, name) for name in names}


def permutation(rank: int, call: int, n: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng((rank, call)).permutation(n))


def own_order(rank: int) -> Any:
    """Stands in for ``torch.randperm`` in one of two processes."""
    calls = iter(range(1000))
    return lambda n, **_: permutation(rank, next(calls), n)


def order_of_both(batch_size: int) -> Any:
    """Stands in for ``torch.randperm`` alone: each mini-batch is the union of those of two processes."""
    calls = iter(range(1000))
    own = N_ENVS // 2

    def order(n: int, **_: Any) -> torch.Tensor:
        call, half, b = next(calls), n // 2, batch_size // 2
        both = []
        for rank in (0, 1):  # rows are in the order of steps, and of environments within a step
            rows = permutation(rank, call, half)
            both.append(rows // own * N_ENVS + rank * own + rows % own)
        return torch.cat([p[start : start + b] for start in range(0, half, b) for p in both])

    return order


def trained(case: tuple[type, str, str], rollout: dict[str, np.ndarray], world: World) -> dict[str, Any]:
    """Train in float64 on this process's environments of a recorded rollout: parameters, and what was logged."""
    n_envs = N_ENVS // world.size
    model = make(case, n_envs)
    model.policy.double()
    if world.rank == 1:  # as if it had begun otherwise
        for p in model.policy.parameters():
            p.data.add_(1.0)
    for head in (model.networks.actor, model.networks.critic):
        head.prepare = lambda x, prepare=head.prepare: prepare(x).double()
    model.rollout_buffer.to_torch = lambda array, copy: torch.from_numpy(array).double()
    model.set_logger(Logger(None, []))
    model.join(world.group)
    part = slice(world.rank * n_envs, (world.rank + 1) * n_envs)
    orders = torch.randperm
    torch.randperm = order_of_both(model.batch_size) if world.group is None else own_order(world.rank)
    reports = []
    try:
        for _ in range(UPDATES):
            model.rollout_buffer.reset()
            for name, values in rollout.items():
                setattr(model.rollout_buffer, name, values[:, part].copy())
            model.rollout_buffer.full = True
            model.train()
            reports.append({k: v for k, v in model.logger.name_to_value.items() if k.startswith("train/")})
    finally:
        torch.randperm = orders
    parameters = torch.cat([p.detach().flatten() for p in model.policy.parameters()])
    return {"parameters": parameters, "reports": reports, "model": model}


def statistics(rank: int, rollout: int) -> np.ndarray:
    """Observations of one process: with a mean that is large, and moves."""
    return np.random.default_rng((rank, rollout)).normal(100.0 + 10 * rollout + rank, 0.5, (30, 3))


def merged(world: World) -> list[tuple[Any, Any, float]]:
    """The statistics after each of three rollouts."""
    normalize = SimpleNamespace(norm_obs=True, obs_rms=RunningMeanStd(shape=(3,)), ret_rms=RunningMeanStd())
    callback = CommonStatistics(normalize, world)
    found = []
    for rollout in range(3):
        for rank in (0, 1) if world.group is None else (world.rank,):
            for batch in np.split(statistics(rank, rollout), 10):
                normalize.obs_rms.update(batch)
                normalize.ret_rms.update(batch[:, 0])
        callback._on_rollout_end()
        found += [(s.mean, s.var, s.count) for s in (normalize.obs_rms, normalize.ret_rms)]
    return found


def error_of(work: Any) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with open_world("cpu") as world:
        for case in CASES:
            rollout = torch.load(folder / f"{name_of(case)}.pt", weights_only=False)
            results[name_of(case)] = trained(case, rollout, world)
            del results[name_of(case)]["model"]
        results["statistics"] = merged(world)

        model = make(CASES[0], N_ENVS // world.size)
        model.batch_size = 47
        results["batch_size"] = error_of(lambda: model.join(world.group))
        model.batch_size = 48
        model.join(world.group)
        torch.manual_seed(world.rank)
        model.learn(2 * N_STEPS * N_ENVS)
        results["timesteps"] = model.num_timesteps
        if world.rank == 1:
            next(model.policy.parameters()).data.view(-1)[0] += 1e-6
        results["apart"] = error_of(lambda: model.learn(N_STEPS * N_ENVS))
        model.join(world.group)
        collect = model.collect_rollouts

        def poisoned(env: Any, callback: Any, buffer: Any, n_rollout_steps: int) -> bool:
            collected = collect(env, callback, buffer, n_rollout_steps)
            buffer.returns[3, 0] = np.nan if world.rank == 1 else buffer.returns[3, 0]
            return collected

        model.collect_rollouts = poisoned
        results["poisoned"] = error_of(lambda: model.learn(N_STEPS * N_ENVS))
        torch.save(results, folder / f"rank{world.rank}.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]))


@pytest.fixture(scope="module")
def rollouts() -> dict[str, dict[str, np.ndarray]]:
    torch.set_num_threads(1)
    return {name_of(case): record(case) for case in CASES}


@pytest.fixture(scope="module")
def ranks(
    rollouts: dict[str, Any], two_processes: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two processes came to."""
    folder = tmp_path_factory.mktemp("two")
    for name, rollout in rollouts.items():
        torch.save(rollout, folder / f"{name}.pt")
    return two_processes(__file__, folder)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_two_processes_are_one(case: tuple[type, str, str], ranks: Any, rollouts: Any) -> None:
    name = name_of(case)
    alone = trained(case, rollouts[name], ALONE)
    start = torch.cat([p.detach().flatten() for p in make(case, N_ENVS).policy.parameters()])
    assert alone["parameters"].dtype == torch.float64
    assert (alone["parameters"] - start).norm() > 1e-3
    torch.testing.assert_close(ranks[0][name]["parameters"], alone["parameters"], rtol=1e-10, atol=1e-10)
    assert torch.equal(ranks[0][name]["parameters"], ranks[1][name]["parameters"])
    for both, one in zip(ranks[0][name]["reports"], alone["reports"], strict=True):
        assert both == pytest.approx(one, rel=1e-6, abs=1e-9, nan_ok=True)
        assert both["train/accepted"] == 1.0


def test_statistics_are_those_of_all_steps(ranks: Any) -> None:
    for (mean, var, count), (a_mean, a_var, a_count), (b_mean, b_var, b_count) in zip(
        merged(ALONE), ranks[0]["statistics"], ranks[1]["statistics"], strict=True
    ):
        np.testing.assert_allclose(a_mean, mean, rtol=1e-10)
        np.testing.assert_allclose(a_var, var, rtol=1e-8)
        assert a_count == pytest.approx(count, rel=1e-10)
        np.testing.assert_array_equal(a_mean, b_mean)
        np.testing.assert_array_equal(a_var, b_var)
        assert a_count == b_count


def test_steps_of_all_are_counted(ranks: Any) -> None:
    assert [rank["timesteps"] for rank in ranks] == [2 * N_STEPS * N_ENVS] * 2


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("batch_size", "ValueError: batch_size must be a multiple of the 2 processes that share it, got 47"),
        ("apart", "RuntimeError: the processes have different parameters after update 3"),
        ("poisoned", "FloatingPointError: the critic's loss is not finite in update 3"),
    ],
)
def test_all_processes_meet_the_same_error(key: str, message: str, ranks: Any) -> None:
    assert ranks[0][key].startswith(message)
    assert ranks[0][key] == ranks[1][key]


def test_alone_a_loss_that_is_not_finite_is_an_error(rollouts: Any) -> None:
    bad = {k: v.copy() for k, v in rollouts[name_of(CASES[0])].items()}
    bad["returns"][0, 0] = np.inf
    with pytest.raises(FloatingPointError, match=r"update 1: rewards or observations are not finite"):
        trained(CASES[0], bad, ALONE)
