"""Recurrent policies: an LSTM or a GRU between the features and the networks of actor and critic.

Arguments, parts and `predict` are those of the policies of ``sb3_contrib.RecurrentPPO``, for exact natural steps
(`agents.recurrence`, `agents.sequences`). Every method takes rows and the episodes' starts; rows of several steps are
those of an environment together, in the order of time, (E·T, …).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import CombinedExtractor, MlpExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from agents.hybrid import HybridActorCriticPolicy
from agents.recurrence import parts_of, run
from npg.checks import flag, whole

__all__ = [
    "POLICIES",
    "CnnGruPolicy",
    "CnnLstmPolicy",
    "MlpGruPolicy",
    "MlpLstmPolicy",
    "MultiInputGruPolicy",
    "MultiInputLstmPolicy",
    "RNNStates",
    "RecurrentPolicy",
]

State = tuple[Tensor, ...]


class RNNStates(NamedTuple):
    """The states of actor and critic: (hidden, cell) of an LSTM, (hidden,) of a GRU, each (layers, E, H)."""

    pi: State
    vf: State


class RecurrentPolicy(HybridActorCriticPolicy):
    """An actor-critic policy with memory.

    The state of the memory is zero where an episode begins.

    Args:
        observation_space: the space.
        action_space: the space.
        lr_schedule: of the optimizer.
        args: as `ActorCriticPolicy` takes them.
        lstm_hidden_size: units of each layer, of an LSTM or a GRU.
        n_lstm_layers: layers.
        shared_lstm: let the critic read the memory of the actor, and not train it.
        enable_critic_lstm: give the critic a memory of its own. With neither it has none, and a linear layer instead.
        kwargs: as `ActorCriticPolicy` takes them.

    Attributes:
        lstm_actor: of the actor.
        lstm_critic: of the critic, or None.
        critic: the linear layer of a critic without memory, or None.

    Raises:
        TypeError: if an argument is not of its kind.
        ValueError: if the arguments contradict each other, or a subclass changes what the update computes itself.
    """

    memory: ClassVar[type[nn.LSTM] | type[nn.GRU]] = nn.LSTM

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        lstm_hidden_size: int = 256,
        n_lstm_layers: int = 1,
        shared_lstm: bool = False,
        enable_critic_lstm: bool = True,
        **kwargs: Any,
    ) -> None:
        whole("lstm_hidden_size", lstm_hidden_size, low=1)
        whole("n_lstm_layers", n_lstm_layers, low=1)
        flag("shared_lstm", shared_lstm)
        flag("enable_critic_lstm", enable_critic_lstm)
        if shared_lstm and enable_critic_lstm:
            raise ValueError("shared_lstm=True goes with enable_critic_lstm=False: the critic has one of the two")
        if "lstm_kwargs" in kwargs:
            raise ValueError("lstm_kwargs is not taken: layers are lstm_hidden_size and n_lstm_layers alone")
        self.check_own()
        self.lstm_hidden_size, self.n_lstm_layers = int(lstm_hidden_size), int(n_lstm_layers)
        self.shared_lstm, self.enable_critic_lstm = bool(shared_lstm), bool(enable_critic_lstm)
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self.state_shape = (parts_of(self.lstm_actor), self.n_lstm_layers, self.lstm_hidden_size)
        self.lstm_hidden_state_shape = (self.n_lstm_layers, 1, self.lstm_hidden_size)

    def check_own(self) -> None:
        """Refuse methods of one's own that acting and updates would pass over.

        Raises:
            ValueError: if the class has one, or the object itself.
        """
        kind, own = type(self), vars(self)
        if changed := [n for n in _FIXED if n in own or getattr(kind, n) is not getattr(RecurrentPolicy, n)]:
            raise ValueError(
                f"{kind.__name__} changes {', '.join(changed)}, which an update of a recurrent policy computes "
                "by itself: put what is yours into features_extractor_class, net_arch or activation_fn"
            )

    def _build_mlp_extractor(self) -> None:
        """The memories, and the networks behind them."""
        if self.shared_lstm and not self.share_features_extractor:
            raise ValueError("shared_lstm=True needs share_features_extractor=True: a memory has one input")
        size = self.lstm_hidden_size

        def memory() -> nn.RNNBase:
            return self.memory(int(self.features_dim), size, self.n_lstm_layers)

        self.lstm_actor = memory()
        self.lstm_critic = memory() if self.enable_critic_lstm else None
        without = not (self.shared_lstm or self.enable_critic_lstm)
        self.critic = nn.Linear(int(self.features_dim), size) if without else None
        self.mlp_extractor = MlpExtractor(size, self.net_arch, self.activation_fn, self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = ("lstm_hidden_size", "n_lstm_layers", "shared_lstm", "enable_critic_lstm", "share_features_extractor")
        return {**super()._get_constructor_parameters(), **{name: getattr(self, name) for name in names}}

    # ------------------------------------------------------------------------------------------- rows of many steps

    def actor_latent(
        self, prepared: Any, starts: NDArray[Any], state: Tensor, *, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Preprocessed rows ↦ what the action's distribution is made of, (E·T, L); see `agents.recurrence.run`."""
        features = self.pi_features_extractor(prepared)
        memory, states = run(self.lstm_actor, features, starts, state, keep=keep)
        return self.mlp_extractor.forward_actor(memory), states

    def values(
        self, prepared: Any, starts: NDArray[Any], state: Tensor, *, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Preprocessed rows ↦ values (E·T, 1); ``state`` is that of `lstm_critic`, or of a shared memory."""
        features = self.vf_features_extractor(prepared)
        states: Tensor | None = state.unsqueeze(1).expand(-1, starts.shape[1], *state.shape[1:])
        if self.lstm_critic is not None:
            latent, states = run(self.lstm_critic, features, starts, state, keep=keep)
        elif self.shared_lstm:
            latent, states = run(self.lstm_actor, features, starts, state, keep=keep)
            latent = latent.detach()
        else:
            assert self.critic is not None
            latent = self.critic(features)
        return self.value_net(self.mlp_extractor.forward_critic(latent)), states

    def prepared(self, observations: Any) -> Any:
        """Raw observations (N, …) as the networks take them."""
        return preprocess_obs(observations, self.observation_space, normalize_images=self.normalize_images)

    def no_memory(self, n_envs: int) -> Tensor:
        """The state at the beginning of an episode, (E, parts, layers, H)."""
        return torch.zeros(n_envs, *self.state_shape, device=self.device)

    # -------------------------------------------------------------------------- as Stable-Baselines3's policies have it

    def forward(  # type: ignore[override]
        self, obs: Any, lstm_states: RNNStates, episode_starts: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, RNNStates]:
        """Actions, values and log-likelihoods of rows, and the states after them."""
        distribution, pi = self.get_distribution(obs, lstm_states.pi, episode_starts)
        actions = distribution.get_actions(deterministic=deterministic)
        values, vf = self._values(obs, lstm_states.vf, episode_starts)
        shaped = actions.reshape(-1, *(self.action_space.shape or ()))
        return shaped, values, distribution.log_prob(actions), RNNStates(pi, vf)

    def get_distribution(  # type: ignore[override]
        self, obs: Any, lstm_states: State, episode_starts: Tensor
    ) -> tuple[Distribution, State]:
        """The distribution of the actions of rows, and the state after them."""
        starts, state = _by_environment(lstm_states, episode_starts)
        latent, states = self.actor_latent(self.prepared(obs), starts, state, keep=True)
        return self._get_action_dist_from_latent(latent), _by_layer(states)

    def predict_values(self, obs: Any, lstm_states: State, episode_starts: Tensor) -> Tensor:  # type: ignore[override]
        """Values of rows, (E·T, 1)."""
        return self._values(obs, lstm_states, episode_starts)[0]

    def evaluate_actions(  # type: ignore[override]
        self, obs: Any, actions: Tensor, lstm_states: RNNStates, episode_starts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, log-likelihoods and entropies of rows and their actions."""
        distribution, _ = self.get_distribution(obs, lstm_states.pi, episode_starts)
        values = self.predict_values(obs, lstm_states.vf, episode_starts)
        return values, distribution.log_prob(actions), distribution.entropy()

    def _values(self, obs: Any, lstm_states: State, episode_starts: Tensor) -> tuple[Tensor, State]:
        starts, state = _by_environment(lstm_states, episode_starts)
        values, states = self.values(self.prepared(obs), starts, state, keep=True)
        return values, _by_layer(states)

    def _predict(  # type: ignore[override]
        self, observation: Any, lstm_states: State, episode_starts: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, State]:
        distribution, states = self.get_distribution(observation, lstm_states, episode_starts)
        return distribution.get_actions(deterministic=deterministic), states

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Actions for the environment, and the state after them.

        Args:
            observation: of one environment, or of several.
            state: what the call before returned, each part (layers, E, H); None at the beginning of an episode.
            episode_start: whether the observation is the first of an episode, (E,), so that the state before it does
                not count; None for no.
            deterministic: the mode of the distribution, and not a sample.

        Raises:
            ValueError: if ``state`` or ``episode_start`` is of another shape.
        """
        self.set_training_mode(False)
        rows, vectorized = self.obs_to_tensor(observation)
        n = len(next(iter(rows.values())) if isinstance(rows, dict) else rows)
        shape = (self.n_lstm_layers, n, self.lstm_hidden_size)
        given = tuple(np.zeros(shape, np.float32) for _ in range(self.state_shape[0])) if state is None else state
        if len(given) != self.state_shape[0] or any(np.shape(part) != shape for part in given):
            raise ValueError(
                f"state must be {self.state_shape[0]} arrays of shape {shape}, got {[np.shape(part) for part in given]}"
                ": give what the last call of predict returned, or None where all episodes begin"
            )
        starts = np.zeros(n, bool) if episode_start is None else np.asarray(episode_start)
        if starts.shape != (n,):
            raise ValueError(f"episode_start must have shape ({n},), one for each environment, got {starts.shape}")
        with torch.no_grad():
            states = tuple(torch.as_tensor(part, dtype=torch.float32, device=self.device) for part in given)
            sampled, after = self._predict(rows, states, torch.as_tensor(starts), deterministic)
        actions = sampled.cpu().numpy().reshape(-1, *(self.action_space.shape or ()))
        if isinstance(self.action_space, spaces.Box):
            if self.squash_output:
                actions = self.unscale_action(actions)
            else:
                actions = np.clip(actions, self.action_space.low, self.action_space.high)
        actions = self.structured(actions if vectorized else actions.squeeze(axis=0))
        return actions, tuple(part.cpu().numpy() for part in after)


#: What acting and updates do by `actor_latent` and `values`, and would not notice if a subclass did it otherwise.
_FIXED = (
    *("forward", "get_distribution", "predict_values", "evaluate_actions", "_predict", "predict", "actor_latent"),
    *("values", "prepared", "no_memory", "extract_features", "_get_action_dist_from_latent"),
)


def _by_environment(states: State, episode_starts: Tensor) -> tuple[NDArray[Any], Tensor]:
    """Starts (E, T) and the state (E, parts, layers, H) of rows and parts (layers, E, H)."""
    starts = episode_starts.detach().cpu().numpy().reshape(states[0].shape[1], -1)
    return starts, torch.stack(states, 0).permute(2, 0, 1, 3)


def _by_layer(states: Tensor | None) -> State:
    """The parts (layers, E, H) of the last of states (E, T, parts, layers, H)."""
    assert states is not None
    return tuple(states[:, -1].permute(1, 2, 0, 3).contiguous())


class MlpLstmPolicy(RecurrentPolicy):
    """With an LSTM, for vectors."""


class MlpGruPolicy(RecurrentPolicy):
    """With a GRU, for vectors."""

    memory = nn.GRU


class _Images(RecurrentPolicy):
    def __init__(self, *args: Any, features_extractor_class: Any = NatureCNN, **kwargs: Any) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class CnnLstmPolicy(_Images):
    """With an LSTM, for images."""


class CnnGruPolicy(_Images):
    """With a GRU, for images."""

    memory = nn.GRU


class _Dicts(RecurrentPolicy):
    def __init__(self, *args: Any, features_extractor_class: Any = CombinedExtractor, **kwargs: Any) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class MultiInputLstmPolicy(_Dicts):
    """With an LSTM, for Dict observations."""


class MultiInputGruPolicy(_Dicts):
    """With a GRU, for Dict observations."""

    memory = nn.GRU


POLICIES: dict[str, type[RecurrentPolicy]] = {
    policy.__name__: policy
    for policy in (
        MlpLstmPolicy,
        CnnLstmPolicy,
        MultiInputLstmPolicy,
        MlpGruPolicy,
        CnnGruPolicy,
        MultiInputGruPolicy,
    )
}
"""By the names that the algorithms take."""
