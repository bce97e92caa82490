"""Registers our tasks: the paper's, Connect Four, platforms, robots with a speed limit, tasks with no velocity."""

from __future__ import annotations

import gymnasium as gym

from envs.partial import VELOCITIES
from envs.velocity import ROBOTS

__all__: list[str] = []

# The LQR's 20 steps are the task itself (it terminates); the two-state process goes on for ever, so that its limit
# only cuts the stream (it truncates); a game ends when it ends.
gym.register(
    "npg/LQR-v0",
    entry_point="envs.lqr:LQREnv",
    vector_entry_point="envs.lqr:LQRVectorEnv",
)
gym.register(
    "npg/TwoStateMDP-v0",
    entry_point="envs.two_state_mdp:TwoStateMDPEnv",
    vector_entry_point="envs.two_state_mdp:TwoStateMDPVectorEnv",
    max_episode_steps=100,
)
gym.register(
    "npg/Tetris-v0",
    entry_point="envs.tetris:TetrisEnv",
    vector_entry_point="envs.tetris:TetrisVectorEnv",
)
gym.register(
    "npg/ConnectFour-v0",
    entry_point="envs.connect_four:ConnectFourEnv",
    vector_entry_point="envs.connect_four:ConnectFourVectorEnv",
)
gym.register(
    "npg/Platform-v0",
    entry_point="envs.platform:PlatformEnv",
    vector_entry_point="envs.platform:PlatformVectorEnv",
    max_episode_steps=50,
)
# The time limits are those of the tasks within, which have none there (-1): max_episode_steps may be longer too.
for _id, _ours, _entry_point in (
    *((_id, _ours, "envs.velocity:velocity_limited") for _ours, _id in ROBOTS.items()),
    *((_id, "npg/{}NoVel-{}".format(*_id.split("-")), "envs.partial:without_velocities") for _id in VELOCITIES),
):
    gym.register(
        _ours,
        entry_point=_entry_point,
        max_episode_steps=gym.spec(_id).max_episode_steps,
        kwargs={"env_id": _id, "max_episode_steps": -1},
    )
