"""What tests of agents share."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecEnv

from npg import acceleration


@pytest.fixture
def untraced() -> Iterator[None]:
    """For short tests, than which a trace takes longer; some of them ask for one."""
    with acceleration.mode("off"):
        yield


class Step(NamedTuple):
    """Of all environments together."""

    rewards: np.ndarray
    costs: np.ndarray
    dones: np.ndarray
    last: np.ndarray  #: the observations after the step, with the last ones of the episodes that it ended
    cut: np.ndarray  #: whether it was the time limit that ended an episode


@pytest.fixture
def steps_of() -> Callable[[VecEnv], list[Step]]:
    """``steps_of(env)``: a list that every step from now on is added to."""

    def watch(env: Any) -> list[Step]:
        seen: list[Step] = []
        step_wait = env.step_wait

        def noted() -> Any:
            observations, rewards, dones, infos = result = step_wait()
            last = [info.get("terminal_observation", o) for info, o in zip(infos, observations, strict=True)]
            cut = [info.get("TimeLimit.truncated", False) for info in infos]
            costs = [info.get("cost", 0.0) for info in infos]
            seen.append(Step(rewards.copy(), np.array(costs), dones.copy(), np.stack(last), np.array(cut)))
            return result

        env.step_wait = noted
        return seen

    return watch
