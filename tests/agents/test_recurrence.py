"""LSTM and GRU over ragged sequences, against PyTorch's own cells stepped one environment at a time, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.recurrence import packed, run
from npg.linearize import Linearization

torch.set_num_threads(1)
E, T, F, H = 4, 9, 3, 5


def stepped(rnn: nn.RNNBase, features: Tensor, starts: np.ndarray, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (E·T, H) and all states (E, T, parts, layers, H), by PyTorch's module and one step after the other."""
    outputs, states = [], []
    for e, rows in enumerate(features.unflatten(0, starts.shape)):
        s = state[e]
        for t, row in enumerate(rows):
            if starts[e, t]:
                s = torch.zeros_like(s)
            hx = tuple(s.contiguous()) if isinstance(rnn, nn.LSTM) else s[0].contiguous()
            out, hx = rnn(row.unsqueeze(0), hx)
            s = torch.stack(hx) if isinstance(rnn, nn.LSTM) else hx.unsqueeze(0)
            outputs.append(out[0])
            states.append(s)
    return torch.stack(outputs), torch.stack(states).unflatten(0, starts.shape)


class Stepped(nn.Module):
    traceable = False  # a trace of all steps takes seconds

    def __init__(self, rnn: nn.RNNBase, starts: np.ndarray, state: Tensor, by: Any) -> None:
        super().__init__()
        self.rnn, self.starts, self.state, self.by = rnn, starts, state, by

    def forward(self, features: Tensor) -> Tensor:
        return self.by(self.rnn, features, self.starts, self.state)[0]


@pytest.fixture(params=[(nn.LSTM, 1), (nn.LSTM, 2), (nn.GRU, 1), (nn.GRU, 2)], ids=["lstm", "lstm2", "gru", "gru2"])
def case(request) -> Any:
    kind, layers = request.param
    torch.manual_seed(0)
    rnn = kind(F, H, layers).double()
    starts = np.random.default_rng(0).random((E, T)) < 0.3
    starts[:, 0] = [True, False, False, True]
    starts[1] = False  # one environment whose episode goes on for all of the rollout
    state = torch.randn(E, 2 if kind is nn.LSTM else 1, layers, H, dtype=torch.float64)
    return rnn, torch.randn(E * T, F, dtype=torch.float64), starts, state


def test_outputs_and_states_are_those_of_single_steps(case):
    rnn, features, starts, state = case
    outputs, states = run(rnn, features, starts, state, keep=True)
    expected, expected_states = stepped(*case)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(states, expected_states, rtol=0, atol=1e-14)
    assert run(rnn, features, starts, state)[1] is None


def test_gradients_are_those_of_single_steps_also_in_the_features(case):
    rnn, features, starts, state = case
    features.requires_grad_()
    u = torch.randn(E * T, H, dtype=torch.float64)
    inputs = [features, *rnn.parameters()]
    ours = torch.autograd.grad((run(rnn, features, starts, state)[0] * u).sum(), inputs)
    theirs = torch.autograd.grad((stepped(rnn, features, starts, state)[0] * u).sum(), inputs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_both_maps_of_the_first_order_model_are_those_of_single_steps(case):
    rnn, features, starts, state = case
    ours = Linearization(Stepped(rnn, starts, state, run), features)
    theirs = Linearization(Stepped(rnn, starts, state, stepped), features)
    v = torch.randn(ours.parameters.numel, dtype=torch.float64)
    u = torch.randn(E * T, H, dtype=torch.float64)
    torch.testing.assert_close(ours.push_forward(v), theirs.push_forward(v), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.pull_back(u), theirs.pull_back(u), rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "weight_ih_l0", "bias_hh_l0"])
def test_frozen_parameters_do_not_move(case, frozen):
    rnn, features, starts, state = case
    getattr(rnn, frozen).requires_grad_(False)
    ours = Linearization(Stepped(rnn, starts, state, run), features)
    theirs = Linearization(Stepped(rnn, starts, state, stepped), features)
    v = torch.randn(ours.parameters.numel, dtype=torch.float64)
    torch.testing.assert_close(ours.push_forward(v), theirs.push_forward(v), rtol=0, atol=1e-12)
    assert ours.pull_back(torch.ones(E * T, H, dtype=torch.float64)).shape == v.shape


def test_an_environment_s_numbers_do_not_depend_on_the_others_nor_on_where_it_is_cut(case):
    rnn, features, starts, state = case
    whole, states = run(rnn, features, starts, state, keep=True)
    rows = features.unflatten(0, (E, T))
    for e in range(E):
        alone, _ = run(rnn, rows[e], starts[e : e + 1], state[e : e + 1])
        torch.testing.assert_close(alone, whole.unflatten(0, (E, T))[e], rtol=0, atol=1e-14)
    for cut in (1, 4, 8):
        first, before = run(rnn, rows[:, :cut].flatten(0, 1), starts[:, :cut], state, keep=True)
        second, after = run(rnn, rows[:, cut:].flatten(0, 1), starts[:, cut:], before[:, -1], keep=True)
        joined = torch.cat([first.unflatten(0, (E, cut)), second.unflatten(0, (E, T - cut))], 1)
        torch.testing.assert_close(joined.flatten(0, 1), whole, rtol=0, atol=1e-14)
        torch.testing.assert_close(after[:, -1], states[:, -1], rtol=0, atol=1e-14)


def test_the_state_before_an_episode_has_no_part_in_it(case):
    rnn, features, starts, state = case
    starts[:, 0] = True
    expected, _ = run(rnn, features, starts, torch.zeros_like(state))
    assert torch.equal(run(rnn, features, starts, state)[0], expected)
    assert torch.equal(run(rnn, features, starts, torch.full_like(state, torch.nan))[0], expected)


def test_no_row_is_padding_and_there_are_as_many_steps_as_the_longest_sequence_has():
    starts = np.array([[0, 0, 1, 0, 0], [1, 0, 0, 1, 1]], dtype=bool)
    order = packed(starts, torch.device("cpu"))
    assert order.sizes == (5, 3, 2)
    assert order.rows.tolist() == [2, 5, 0, 8, 9, 3, 6, 1, 4, 7]
    assert torch.equal(order.rows[order.places], torch.arange(10))
    assert dict(zip(order.rows[:5].tolist(), order.kept.tolist())) == {2: False, 5: False, 0: True, 8: False, 9: False}


def test_a_second_derivative_is_refused_and_not_wrong(case):
    rnn, features, starts, state = case
    loss = run(rnn, features, starts, state)[0].square().sum()
    (slope,) = torch.autograd.grad(loss, rnn.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_other_recurrences_are_refused():
    features, starts = torch.zeros(2, 3), np.zeros((1, 2), bool)

    class Mine(nn.LSTM):
        pass

    for rnn in (nn.RNN(3, 4), Mine(3, 4)):
        with pytest.raises(TypeError, match=r"nn\.LSTM or nn\.GRU"):
            run(rnn, features, starts, torch.zeros(1, 2, 1, 4))
    for options in ({"bidirectional": True}, {"proj_size": 2}, {"bias": False}, {"num_layers": 2, "dropout": 0.1}):
        with pytest.raises(ValueError, match="must have bias, one direction, no projection and no dropout"):
            run(nn.LSTM(3, 4, **options), features, starts, torch.zeros(1, 2, 1, 4))
