"""The one door: its switch, and that it is shut when turned off."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from npg import Fisher, acceleration, families


def test_off_for_a_block_and_from_here_on(accelerated):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    v = torch.randn(26).double()
    with acceleration.mode("off"):
        plain = Fisher(model, x, families.Categorical()) @ v
        assert acceleration.accelerate_function(model, lambda x: [x * 2], [x], lambda run: True) is None
    assert acceleration._programs.kept(model) == acceleration._functions.kept(model) == []
    assert acceleration.mode.now == "auto"
    torch.testing.assert_close(Fisher(model, x, families.Categorical()) @ v, plain, rtol=1e-10, atol=1e-12)
    assert len(acceleration._programs.kept(model)) == 1
    acceleration.mode("off")
    assert acceleration.mode.now == "off"
    acceleration.mode("auto")


def test_the_block_before_comes_back_after_an_error(accelerated):
    with pytest.raises(KeyError), acceleration.mode("off"):
        raise KeyError
    assert acceleration.mode.now == "auto"


def test_an_unknown_mode_is_refused_and_changes_nothing(accelerated):
    with pytest.raises(ValueError, match="mode must be 'auto' or 'off', got 'on'"):
        acceleration.mode("on")
    assert acceleration.mode.now == "auto"


@pytest.mark.parametrize(
    ("value", "says"), [("off", "off"), ("auto", "auto"), ("", "auto"), ("no", "NPG_ACCELERATION")]
)
def test_the_environment_variable(value, says):
    code = "from npg import acceleration; print(acceleration.mode.now)"
    environment = {**os.environ, "NPG_ACCELERATION": value}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert says in (run.stdout if value != "no" else run.stderr)
    assert (run.returncode == 0) is (value != "no")


def test_a_function_is_right_or_has_no_program(accelerated):
    x = torch.ones(3)
    owner = nn.Linear(1, 1)
    run = acceleration.accelerate_function(owner, lambda x: [x * 2], [x], lambda run: bool((run(x)[0] == 2).all()))
    assert torch.equal(run(x + 1)[0], torch.full((3,), 4.0))
    other = nn.Linear(1, 1)
    assert acceleration.accelerate_function(other, lambda x: [x * 2], [x], lambda run: False) is None
    branching = acceleration.accelerate_function(other, lambda x: [x if x.sum() > 0 else -x], [x], lambda run: True)
    assert branching is None


class TwoHeads(nn.Module):
    """Logits that are divided by a temperature, and a regression in units of its own: its outputs lie near 1,000."""

    def __init__(self):
        super().__init__()
        self.trunk, self.heads, self.temperature = nn.Linear(5, 32), nn.Linear(32, 4), 1.0
        with torch.no_grad():
            self.heads.bias[3] = 1000.0

    def forward(self, x):
        outputs = self.heads(self.trunk(x).tanh())
        return torch.cat([outputs[:, :3] / self.temperature, outputs[:, 3:]], -1)


@pytest.mark.parametrize("temperature", [0.9, 0.7])
def test_a_change_of_a_small_output_beside_a_large_one_is_noticed(accelerated, temperature):
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(256, 5)
    y = torch.randint(0, 3, (256,)), 1000 + 300 * torch.randn(256, 1)
    family = families.Product([families.Categorical(), families.Gaussian()], [3, 1])

    def dense():
        fisher = Fisher(model, x, family)
        fisher.linearization.pull_back(family.score(fisher.outputs, y) / 256)  # as a step does, with its slope
        return torch.stack([fisher @ e for e in torch.eye(fisher.shape[0])], 1)

    dense()
    (kept,) = acceleration._programs.kept(model)
    model.temperature = temperature
    found = dense()
    assert kept not in acceleration._programs.kept(model)
    with acceleration.mode("off"):
        torch.testing.assert_close(found, dense(), rtol=1e-4, atol=1e-4 * float(found.abs().amax()))
