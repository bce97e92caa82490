"""One and two threads, single and double precision: the same steps, to a rounding that is stated here.

The same number of threads gives the same bits. Another one adds up in another order, so that a step differs by the
rounding of its precision, enlarged by the condition of the damped Fisher that it is solved with.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from agents import NPG, TRPO
from envs import make_vec_env
from npg import families, optim

#: Of the length of all steps together, between numbers of threads; and between the precisions.
THREADS = {torch.float64: 1e-11, torch.float32: 5e-5}
PRECISIONS = 1e-4
ROWS, STEPS = 1024, 3  # large enough for PyTorch to share out

OPTIMIZERS = {
    "cg": lambda model: optim.NGD(model, families.Categorical(), damping=0.1, max_kl=0.01),
    "kfac": lambda model: optim.NGD(model, families.Categorical(), lr=0.1, damping=0.1, solver="kfac", probes=None),
    "online": lambda model: optim.OnlineNGD(model.parameters(), lr=0.1),
    "diagonal": lambda model: optim.DiagonalNGD(model, families.Categorical(), lr=0.1, damping=0.1),
}


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def moved(name: str, threads: int, dtype: torch.dtype) -> Tensor:
    """By how much a few steps move the parameters, (P,)."""
    torch.manual_seed(0)
    first, second = (nn.Linear(12, 96), nn.BatchNorm1d(96), nn.Tanh()), (nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 5))
    model: nn.Module = nn.Sequential(*first, *second)
    model, x = model.double().to(dtype), torch.randn(ROWS, 12, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, 5, (ROWS,))
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    torch.set_num_threads(threads)
    optimizer = OPTIMIZERS[name](model)
    for _ in range(STEPS):
        torch.manual_seed(1)
        if name == "online":
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), targets).backward()
            optimizer.step()
        else:
            optimizer.step(x, targets)
    return (nn.utils.parameters_to_vector(model.parameters()).detach() - before).double()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_agree_across_threads_and_precisions(name):
    alone = {dtype: moved(name, 1, dtype) for dtype in THREADS}
    for dtype, tolerance in THREADS.items():
        assert alone[dtype].norm() > 1e-3
        assert torch.equal(moved(name, 1, dtype), alone[dtype])
        assert difference(alone[dtype], moved(name, 2, dtype)) <= tolerance
    assert difference(alone[torch.float64], alone[torch.float32]) <= PRECISIONS


@pytest.mark.parametrize(("algorithm", "critic"), [(TRPO, "adam"), (NPG, "natural")])
def test_an_agents_update_agrees_across_threads(algorithm, critic):
    options = {"n_steps": 256, "n_critic_updates": 2, "critic": critic, "policy_kwargs": {"net_arch": [96, 96]}}
    agent = algorithm("MlpPolicy", make_vec_env("Pendulum-v1", 4, 0), seed=0, device="cpu", **options)
    agent.set_logger(Logger(None, []))
    agent._setup_learn(10**6)
    agent.collect()
    rollout = copy.deepcopy(agent.rollout_buffer)
    before = copy.deepcopy([agent.policy.state_dict(), agent.policy.optimizer.state_dict()])

    def updated(threads: int) -> Tensor:
        agent.policy.load_state_dict(before[0])
        agent.policy.optimizer.load_state_dict(copy.deepcopy(before[1]))
        agent.rollout_buffer, agent.critic_damping = copy.deepcopy(rollout), 0.1
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002  what Stable-Baselines3's buffers draw from
        torch.set_num_threads(threads)
        agent.train()
        after = agent.policy.state_dict()
        return torch.cat([(after[name] - before[0][name]).flatten().double() for name in after])

    one = updated(1)
    assert one.norm() > 1e-3
    assert torch.equal(updated(1), one)
    assert difference(one, updated(2)) <= THREADS[torch.float32]


def test_a_run_is_the_same_bits_with_the_same_threads():
    def trained() -> Tensor:
        env = make_vec_env("CartPole-v1", 4, 0, backend="gymnasium")
        agent = TRPO("MlpPolicy", env, n_steps=64, batch_size=64, seed=0, device="cpu").learn(512)
        return nn.utils.parameters_to_vector(agent.policy.parameters()).detach()

    torch.set_num_threads(2)
    assert torch.equal(trained(), trained())
