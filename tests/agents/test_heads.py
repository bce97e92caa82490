"""Programs of actor and critic against the networks that they were traced from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from agents.heads import ActorHead, CriticHead
from npg import acceleration

pytestmark = pytest.mark.usefixtures("accelerated")

BOX = spaces.Box(-2.0, 2.0, (5,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
ACTIONS = {
    "Box": spaces.Box(-1.0, 1.0, (3,), np.float32),
    "Discrete": spaces.Discrete(4),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2, 4]),
    "MultiBinary": spaces.MultiBinary(4),
}


def policy(action: spaces.Space = ACTIONS["Box"], observation: spaces.Space = BOX, **options) -> ActorCriticPolicy:
    torch.manual_seed(0)
    cls = ActorCriticCnnPolicy if observation is IMAGE else ActorCriticPolicy
    return cls(observation, action, lambda _: 1e-3, **options)


def batch(space: spaces.Space, n: int = 6) -> torch.Tensor:
    space.seed(n)
    return torch.as_tensor(np.stack([space.sample() for _ in range(n)]))


def drawn(act, observations: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.stack([act(observations)[0] for _ in range(3)])


def by_modules(head: ActorHead, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = head(head.prepare(observations))
    return head.family.sample(outputs), outputs


def programs(head) -> list:
    return acceleration._functions.kept(head)


@pytest.mark.parametrize("observation", [BOX, IMAGE], ids=["vector", "image"])
@pytest.mark.parametrize("action", ACTIONS)
def test_actions_are_drawn_as_by_the_network(action, observation):
    head = ActorHead(policy(ACTIONS[action], observation))
    for observations in (batch(observation), batch(observation, 3)):
        with torch.no_grad():
            act = head.acting(observations)
        expected = drawn(lambda x: by_modules(head, x), observations)
        assert torch.allclose(drawn(act, observations), expected, atol=1e-5)
        assert torch.allclose(act(observations)[1], head(head.prepare(observations)), atol=1e-5)
        assert not torch.equal(expected[0], expected[1])  # every call draws anew
    assert len(programs(head)) == 2


def test_looking_for_a_program_draws_no_random_number():
    head = ActorHead(policy())
    state = torch.get_rng_state()
    with torch.no_grad():
        head.acting(batch(BOX))
    assert torch.equal(state, torch.get_rng_state())


def test_new_parameters_are_seen_and_another_network_is_traced_anew():
    head, observations = ActorHead(policy()), batch(BOX)
    with torch.no_grad():
        head.acting(observations)
        before = programs(head)
        for p in head.parameters():
            p.add_(0.3)
        act = head.acting(observations)
        assert programs(head) == before
        assert torch.allclose(drawn(act, observations), drawn(lambda x: by_modules(head, x), observations), atol=1e-5)
        head.policy.mlp_extractor.policy_net[1] = nn.ReLU()
        act = head.acting(observations)
        assert programs(head) != before
        assert torch.allclose(drawn(act, observations), drawn(lambda x: by_modules(head, x), observations), atol=1e-5)


def test_a_critic_that_changes_where_the_first_rows_do_not_reach_is_traced_anew():
    head = CriticHead(policy(activation_fn=lambda: nn.Hardtanh(-1.0, 1.0), net_arch=[8]))
    parameters = list(head.own_parameters(batch(BOX)).values())
    near, far, targets = 1e-3 * batch(BOX), 100 * batch(BOX), torch.arange(6.0)
    head.loss_and_gradients(parameters, near, targets)
    assert len(programs(head)) == 1
    head.policy.mlp_extractor.value_net[1].max_val = 4.0
    found = head.loss_and_gradients(parameters, near, targets)(far, targets)
    loss = nn.functional.mse_loss(head(far).flatten(), targets)
    for a, b in zip(found, (loss.detach(), *torch.autograd.grad(loss, parameters)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


class Branching(BaseFeaturesExtractor):
    """Looks at values, which a trace cannot."""

    def __init__(self, space: spaces.Space) -> None:
        super().__init__(space, 5)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return observations if float(observations.sum()) > 0 else 2 * observations


class Normalised(BaseFeaturesExtractor):
    """Has buffers."""

    def __init__(self, space: spaces.Space) -> None:
        super().__init__(space, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.norm(observations)


class Dropped(BaseFeaturesExtractor):
    """Draws random numbers in training."""

    def __init__(self, space: spaces.Space) -> None:
        super().__init__(space, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.dropout(observations)


@pytest.mark.parametrize("extractor", [Branching, Normalised, Dropped])
def test_modules_of_a_users_own_are_left_to_the_policy(extractor):
    head = ActorHead(policy(features_extractor_class=extractor))
    assert head.acting(batch(BOX)) is None
    assert programs(head) == []


def test_what_has_no_program_acts_by_its_modules():
    space = spaces.Dict({"a": BOX, "b": spaces.Discrete(3)})
    torch.manual_seed(0)
    head = ActorHead(MultiInputActorCriticPolicy(space, ACTIONS["Box"], lambda _: 1e-3))
    observations = {"a": batch(BOX), "b": torch.tensor([0, 1, 2, 0, 1, 2])}
    act = head.acting(observations)
    assert programs(head) == []
    assert torch.equal(drawn(act, observations), drawn(lambda x: by_modules(head, x), observations))


@pytest.mark.parametrize(
    ("options", "traced"),
    [
        ({}, True),
        ({"net_arch": {"pi": [8], "vf": [32, 32]}, "activation_fn": nn.ReLU}, True),
        ({"features_extractor_class": Branching}, False),
        ({"features_extractor_class": Normalised}, False),
        ({"features_extractor_class": Dropped}, False),
    ],
    ids=["default", "other sizes", "branching", "batch norm", "dropout"],
)
def test_the_critics_gradients_are_those_of_autograd(options, traced):
    head = CriticHead(policy(**options))
    observations, targets = batch(BOX, 32), torch.randn(32)
    parameters = list(head.own_parameters(observations).values())
    head.policy.set_training_mode(True)
    torch.manual_seed(2)
    gradients = head.loss_and_gradients(parameters, head.prepare(observations), targets)
    assert bool(programs(head)) is traced
    for step in range(2):
        x, y = head.prepare(batch(BOX, 32) + step), targets + step
        torch.manual_seed(3)
        loss, *pulled = gradients(x, y)
        torch.manual_seed(3)
        expected = (head(x).flatten() - y).square().mean()
        assert torch.allclose(loss, expected, rtol=1e-4)
        for a, b in zip(pulled, torch.autograd.grad(expected, parameters), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p in parameters:
                p.mul_(0.9)
