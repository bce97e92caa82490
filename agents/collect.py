"""The rollout: stepping environments with the policy, and values and log-likelihoods of what was stepped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from math import nan
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3.common import buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from agents import sequences
from agents.buffer import DictRolloutBuffer, RolloutBuffer, rows, stacked
from agents.networks import Networks
from agents.sequences import SequenceBuffer
from envs.checks import check_last, is_episode
from npg.model import undone_on_error
from npg.parallel import mean_, size

__all__ = ["Collector", "cut_off"]

#: Buffers that only store what they are given, to which values and log-likelihoods can be given afterwards.
_STORES = (RolloutBuffer, DictRolloutBuffer, buffers.RolloutBuffer, buffers.DictRolloutBuffer)

#: A step, an environment and its last observation, where an episode was cut off by its time limit.
_Cut = tuple[int, int, Any]


class Collector(OnPolicyAlgorithm):
    """An on-policy algorithm of Stable-Baselines3 that collects as fast as its policy allows.

    Attributes:
        networks: the policy as actor and critic.
        process_group: the processes that learn together; None for one that is alone.
        entropy: of the policy in the last rollout, in nats, the mean over its steps.
        collect_seconds: that the last rollout took.
    """

    networks: Networks
    process_group: dist.ProcessGroup | None = None
    entropy: float = nan
    collect_seconds: float = nan

    #: Of a recurrent policy: the states of actor and critic that go with `_last_obs`, (E, parts, layers, H) each.
    _last_states: Any = (None, None)

    #: Return, length and end of the episode that each environment told of last.
    _told: Mapping[int, Any] = MappingProxyType({})

    def _without_old_episodes(self, infos: list[dict[str, Any]], dones: np.ndarray) -> list[dict[str, Any]]:
        """The infos of a step without what is no episode, or one of before: some tell of one in every step."""
        told, fresh = dict(self._told), []
        for i, (info, done) in enumerate(zip(infos, dones)):
            if (episode := info.get("episode")) is not None:
                told[i] = tuple(episode.get(key) for key in ("r", "l", "t")) if is_episode(episode) else None
                if told[i] is None or (not done and told[i] == self._told.get(i)):
                    info = {key: value for key, value in info.items() if key != "episode"}
            fresh.append(info)
        self._told = told
        return fresh

    def _own_env(self) -> VecEnv:
        """The environments, which an agent that was loaded without them lacks.

        Raises:
            ValueError: if there are none.
        """
        if self.env is None:
            raise ValueError(
                f"env is None, and the agent has no environments to learn in: give it {self.n_envs} with set_env(env), "
                f"or load it with {type(self).__name__}.load(path, env)"
            )
        return self.env

    def collect(self) -> None:
        """One rollout into ``rollout_buffer``, without learning from it: for measurements."""
        self.collect_rollouts(self._own_env(), self._init_callback(None), self.rollout_buffer, self.n_steps)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: buffers.RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer with ``n_rollout_steps`` steps of every environment, as Stable-Baselines3 does.

        Of a policy that is made of Stable-Baselines3's and PyTorch's own parts, what nobody needs while stepping is
        computed afterwards, for all steps in one batch: values, those of the critic at the end of the rollout, and
        bootstrap values of truncated episodes. Callbacks then see the same local variables as in Stable-Baselines3,
        except ``values`` and ``log_probs``. Of any other policy, actions, values and log-likelihoods are those of its
        ``forward``, step by step.

        Raises:
            NotImplementedError: if the policy's log-likelihoods are not those of its distribution.
        """
        started = perf_counter()
        assert self._last_obs is not None, "no previous observation"
        assert self._last_episode_starts is not None, "no previous observation"
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()  # where checkpoints are written: all that is drawn for the rollout comes after
        if self.use_sde:
            self._reset_noise(env.num_envs)
        self.networks.follow()
        stepped = env.num_envs * size(self.process_group)
        shape = (env.num_envs, *(self.action_space.shape or ()))
        observe, record = _recorder(rollout_buffer)
        act = self._acting(obs_as_tensor(self._last_obs, self.device), evaluate_later=type(rollout_buffer) in _STORES)
        truncated: list[_Cut] = []
        outputs: list[Tensor] = []  # of the steps that are to be evaluated, the first ones
        n_steps = 0
        dones: np.ndarray = self._last_episode_starts
        new_obs: Any = self._last_obs
        with undone_on_error(partial(sequences.broken_off, self, rollout_buffer)):
            while n_steps < n_rollout_steps:
                if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                    self._reset_noise(env.num_envs)
                obs_tensor = obs_as_tensor(self._last_obs, self.device)
                sampled, *said = act(obs_tensor)
                if len(said) == 2:
                    values, log_probs = said
                # An environment may write what comes next into the arrays that it gave.
                if len(said) == 1:
                    observe(self._last_obs, self._last_episode_starts)
                else:
                    before: Any = deepcopy((self._last_obs, self._last_episode_starts))
                actions = sampled.cpu().numpy().reshape(shape)
                clipped_actions = self._within_bounds(actions)
                new_obs, rewards, dones, infos = env.step(clipped_actions)
                told = any("episode" in info for info in infos)
                if told:
                    infos = self._without_old_episodes(infos, dones)
                self.num_timesteps += stepped
                callback.update_locals(locals())
                going = callback.on_step()
                cut: list[_Cut] = []
                if told or dones.any():  # a continuing task tells of episodes without being done
                    self._update_info_buffer(infos, dones)
                    cut = cut_off(infos, dones, n_steps)
                if len(said) == 1:
                    outputs += said
                    truncated += cut
                    record(actions, rewards)
                else:
                    if cut:  # in numbers that hold a value: an environment's own may be whole ones
                        rewards = np.array(rewards, dtype=np.result_type(rewards, np.float32))
                    for _, index, final in cut:
                        with torch.no_grad():
                            final_value = self.policy.predict_values(self.policy.obs_to_tensor(final)[0])
                        rewards[index] += self.gamma * float(final_value)
                    observations, starts = before
                    rollout_buffer.add(
                        observations, actions.reshape(env.num_envs, -1), rewards, starts, values, log_probs
                    )
                self._last_obs, self._last_episode_starts = new_obs, dones
                n_steps += 1
                if not going:  # what comes next begins where the environments are
                    if isinstance(rollout_buffer, SequenceBuffer):
                        sequences.interrupted(self, rollout_buffer, rollout_buffer.after)
                    return False
        if isinstance(rollout_buffer, SequenceBuffer):
            last_values = sequences.evaluate(self, rollout_buffer, truncated, outputs)
        else:
            self._evaluate(rollout_buffer, truncated, outputs)
            with torch.no_grad():
                last_values = self.policy.predict_values(obs_as_tensor(new_obs, self.device))
        rollout_buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)
        callback.update_locals(locals())
        callback.on_rollout_end()
        self.collect_seconds = perf_counter() - started
        return True

    # ------------------------------------------------------------------------------------------------------- acting

    def _acting(self, observations: Any, *, evaluate_later: bool) -> Callable[[Any], Sequence[Tensor]]:
        """How to act, for batches of observations like these: ``observations ↦ actions, outputs of the actor``.

        If the policy can act only by its own ``forward``, from the start or after a change during the rollout, the
        function gives ``actions, values, log-likelihoods``, as in Stable-Baselines3, until the rollout ends.
        """
        threads, actor = self._acting_threads(), self.networks.actor
        memory = self.rollout_buffer if isinstance(self.rollout_buffer, SequenceBuffer) else None
        remembering = None if memory is None else sequences.acting(self, memory)
        run = actor.acting(observations) if evaluate_later and memory is None else None

        def act(observations: Any) -> Sequence[Tensor]:
            nonlocal run
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.no_grad():
                    if remembering is not None:
                        return remembering(observations)
                    if run is not None and not (actor.policy is self.policy and actor.unchanged()):
                        run = actor.acting(observations) if actor.policy is self.policy else None
                    return self.policy(observations) if run is None else run(observations)
            finally:
                torch.set_num_threads(before)

        return act

    def _acting_threads(self) -> int:
        """Threads for the policy while it acts: one for vectors on a CPU, whose other cores step the environments.

        A few rows gain nothing from a second thread, and each operation would wait until that gets a core.
        """
        images = any(len(space.shape or ()) > 1 for space in self._observation_spaces())
        return 1 if self.device.type == "cpu" and not images else torch.get_num_threads()

    def _within_bounds(self, actions: np.ndarray) -> np.ndarray:
        """What the environments get: actions of a Box clipped, or unscaled if the policy squashes them."""
        if not isinstance(self.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        return np.minimum(np.maximum(actions, self.action_space.low), self.action_space.high)

    @torch.no_grad()
    def _reset_noise(self, n_envs: int) -> None:
        self.policy.reset_noise(n_envs)

    # --------------------------------------------------------------------------------------------------- afterwards

    @torch.no_grad()
    def _evaluate(self, buffer: buffers.RolloutBuffer, truncated: list[_Cut], outputs: list[Tensor]) -> None:
        """Values and log-likelihoods of the first steps; bootstrap where an episode was cut off by its time limit.

        ``outputs`` are the actor's in these steps. The other steps have both, from the policy itself, whose
        log-likelihood is checked.
        """
        actor, critic = self.networks.actor, self.networks.critic
        entropies, first = [], len(outputs)
        if first:
            batch = self._steps(buffer.observations, slice(first))
            actions = actor.targets(self._steps(buffer.actions, slice(first)))
            at_once = self._evaluated_at_once()
            parts = [slice(start, start + at_once) for start in range(0, len(actions), at_once)]
            values = [critic(critic.prepare(rows(batch, part))).flatten() for part in parts]
            said = torch.cat(outputs)
            grid = (first, buffer.n_envs)
            buffer.values[:first] = torch.cat(values).cpu().numpy().reshape(grid)
            buffer.log_probs[:first] = actor.family.log_likelihood(said, actions).cpu().numpy().reshape(grid)
            entropies.append(actor.family.entropy(said))
        if truncated:
            steps, envs, finals = zip(*truncated)
            last, _ = critic.policy.obs_to_tensor(stacked(finals))
            final_values = critic(critic.prepare(last)).flatten()
            buffer.rewards[list(steps), list(envs)] += self.gamma * final_values.cpu().numpy()
        if first < buffer.pos:
            entropies.append(-self._steps(buffer.log_probs, slice(first, buffer.pos)))
            few = slice(max(0, buffer.pos - max(1, 64 // buffer.n_envs)), buffer.pos)
            self.networks.follow()
            self.networks.actor.check(self._steps(buffer.observations, few), self._steps(buffer.actions, few))
        self.entropy = float(mean_(torch.cat(entropies).mean(), self.process_group))

    def _steps(self, array: Any, steps: slice) -> Any:
        """These steps of an array of the buffer, (steps, environments, …), flattened over both."""
        if isinstance(array, dict):
            return {key: self._steps(value, steps) for key, value in array.items()}
        part = array[steps]
        return torch.as_tensor(part.reshape(-1, *part.shape[2:])).to(self.device)

    def _evaluated_at_once(self) -> int:
        # Images are large when they are floating point: bound what is prepared at once.
        size = sum(int(np.prod(space.shape or ())) for space in self._observation_spaces())
        return max(256, 32 * 1024 * 1024 // max(size, 1))

    def _observation_spaces(self) -> list[spaces.Space[Any]]:
        space = self.observation_space
        return list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]


def _recorder(
    buffer: buffers.RolloutBuffer,
) -> tuple[Callable[[Any, np.ndarray], None], Callable[[np.ndarray, np.ndarray], None]]:
    """How to store a step of which values and log-likelihoods are not known yet: what is seen, and what follows."""
    if isinstance(buffer, RolloutBuffer) and type(buffer) in (RolloutBuffer, DictRolloutBuffer, SequenceBuffer):
        return buffer.observe, buffer.record
    seen: list[Any] = []
    nothing = torch.zeros(buffer.n_envs, device="cpu")

    def observe(*observed: Any) -> None:
        seen[:] = map(deepcopy, observed)

    def record(actions: np.ndarray, rewards: np.ndarray) -> None:
        observations, starts = seen
        buffer.add(observations, actions.reshape(buffer.n_envs, -1), rewards, starts, nothing, nothing)

    return observe, record


def cut_off(infos: list[dict[str, Any]], dones: np.ndarray, step: int) -> list[_Cut]:
    """The environments whose episode was cut off by its time limit in this step, with copies of what was seen last.

    Raises:
        FloatingPointError: for a last observation that is not finite, or absurdly large.
    """
    cut: list[_Cut] = []
    for index in np.flatnonzero(dones).tolist():
        info = infos[index]
        if info.get("TimeLimit.truncated", False) and (last := info.get("terminal_observation")) is not None:
            check_last(last, index, "of the rollout", step)
            cut.append((step, index, deepcopy(last)))
    return cut
