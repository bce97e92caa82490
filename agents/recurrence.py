"""LSTM and GRU over ragged sequences, with their first-order models written out: Jᵀu and J v of a whole recurrence.

Sequences are cut where an episode begins, sorted by their length, and stepped together: after t steps the first b_t of
them are left. No row is padding, and there are as many steps as the longest sequence has. What does not wait for the
step before (inputs, weights, the slopes of the gates) is one product for all steps, before or after the loop.

PyTorch's fused recurrences have no forward mode, which a Fisher-vector product takes (`npg.linearize`), and their
equations step by step would be ten times as many operations under it. With the gates i, f, g, o, the slopes
a = ∂c/∂(i, f, g), a_o = ∂h/∂o and e = ∂h/∂c of the point, all known before the loop, the LSTM's are

    J v:   ż_t = ẋ_t + U ḣ_{t−1} + U̇ h_{t−1},   ċ_t = f ċ_{t−1} + Σ a ż_t,   ḣ_t = a_o ż_t + e ċ_t
    Jᵀu:   δh_t = u_t + Uᵀ δz_{t+1},   δc_t = e δh_t + f_{t+1} δc_{t+1},   δz_t = (a δc_t, a_o δh_t)

where ż_{t−1}, δz_{t+1} are of the same sequence (Hochreiter & Schmidhuber 1997; Cho et al. 2014 for the GRU). The state
that a sequence begins with is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

__all__ = ["parts_of", "run"]


class Packed(NamedTuple):
    """The order in which the rows of sequences are stepped.

    Attributes:
        rows: where each row, in the order of the steps, is among those in the order of the environments, (N,).
        places: the inverse of it, (N,).
        sizes: how many sequences have a first, second, … step.
        previous: of each row after the first steps, the row of the step before, (N − b_0,).
        envs: whose state each sequence may begin with, (b_0,).
        kept: whether it does, or begins with zeros, (b_0,).
    """

    rows: Tensor
    places: Tensor
    sizes: tuple[int, ...]
    previous: Tensor
    envs: Tensor
    kept: Tensor


def packed(starts: NDArray[Any], device: torch.device) -> Packed:
    """The sequences of environments, (E, T): cut where ``starts`` is not 0."""
    given = starts != 0
    begins = given.copy()
    begins[:, 0] = True
    first = np.flatnonzero(begins)
    lengths = np.diff(first, append=given.size)
    order = np.argsort(-lengths, kind="stable")
    first, lengths = first[order], lengths[order]
    steps = np.arange(lengths[0])
    sizes = len(first) - np.searchsorted(lengths[::-1], steps, side="right")
    offsets = np.cumsum(sizes) - sizes
    step = np.repeat(steps, sizes)
    sequence = np.arange(given.size) - np.repeat(offsets, sizes)
    rows = first[sequence] + step
    places = np.empty_like(rows)
    places[rows] = np.arange(len(rows))
    later = step > 0
    kept = ~given.reshape(-1)[first] & (first % given.shape[1] == 0)
    arrays = (rows, places, offsets[step[later] - 1] + sequence[later], first // given.shape[1], kept)
    rows_, places_, previous, envs, kept_ = (torch.as_tensor(array).to(device) for array in arrays)
    return Packed(rows_, places_, tuple(sizes.tolist()), previous, envs, kept_)


def parts_of(rnn: nn.RNNBase) -> int:
    """How many parts its state has: hidden and cell of an LSTM, hidden of a GRU.

    Raises:
        TypeError: for another recurrence.
        ValueError: for what is not computed: dropout, a projection, hooks and so on.
    """
    if type(rnn) not in _CELLS:
        raise TypeError(f"a recurrent policy has an nn.LSTM or nn.GRU, got {type(rnn).__name__}: their exact types")
    if rnn.bidirectional or rnn.proj_size or rnn.dropout or not rnn.bias:
        raise ValueError(f"{rnn} must have bias, one direction, no projection and no dropout")
    if rnn._forward_hooks or rnn._forward_pre_hooks:
        raise ValueError(f"{rnn} has forward hooks, which are not called: its parameters are stepped. Remove them")
    return 2 if type(rnn) is nn.LSTM else 1


def run(
    rnn: nn.RNNBase, features: Tensor, starts: NDArray[Any], state: Tensor, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """All layers over all steps of all environments.

    Args:
        rnn: an LSTM or GRU, whose parameters are taken.
        features: (E·T, F), those of an environment together, in the order of time.
        starts: not 0 where an episode begins, (E, T): the state is zero there. On the host, which cuts and sorts.
        state: before the first step, (E, parts, layers, H); a constant.
        keep: whether to return the states too.

    Returns:
        The hidden states of the last layer, (E·T, H), and all states after each step, (E, T, parts, layers, H).
    """
    parts_of(rnn)
    order = packed(starts, features.device)
    initial = torch.where(order.kept[:, None, None, None], state[order.envs], 0.0)
    x, kept = features[order.rows], []
    for layer in range(rnn.num_layers):
        W, U, b, c = (getattr(rnn, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        x, states = _CELLS[type(rnn)](x, W, U, b, c, initial[:, :, layer], order)
        kept.append(states)
    states_ = torch.stack([torch.stack(layer, 1) for layer in kept], 2) if keep else None  # (N, parts, layers, H)
    shape = (*starts.shape, *state.shape[1:])
    return x[order.places], None if states_ is None else states_[order.places].reshape(shape)


def _lstm_layer(
    x: Tensor, W: Tensor, U: Tensor, b: Tensor, c: Tensor, initial: Tensor, order: Packed
) -> tuple[Tensor, Sequence[Tensor]]:
    hidden, cells, _ = _LSTM.apply(linear(x, W, b + c), U, initial[:, 0], initial[:, 1], order.previous, order.sizes)
    return hidden, (hidden, cells)


def _gru_layer(
    x: Tensor, W: Tensor, U: Tensor, b: Tensor, c: Tensor, initial: Tensor, order: Packed
) -> tuple[Tensor, Sequence[Tensor]]:
    hidden, _, _ = _GRU.apply(linear(x, W, b), U, c, initial[:, 0], order.previous, order.sizes)
    return hidden, (hidden,)


_CELLS: dict[type, Any] = {nn.LSTM: _lstm_layer, nn.GRU: _gru_layer}


def _steps(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """The rows of each step."""
    return x.split(sizes)


def _before(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """For each step but the first, the rows of the step before whose sequences go on."""
    return [rows[:size] for rows, size in zip(x.split(sizes), sizes[1:])]


def _previous(x: Tensor, initial: Tensor, previous: Tensor) -> Tensor:
    """For each row, the one of the step before, or the initial one."""
    return torch.cat([initial, x[previous]])


class _Cell(Function):
    """A layer of all steps, of whose outputs the hidden states alone are differentiable."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.sizes = inputs
        saved = (*tensors[1:], *output)  # all but the input's part, which enters linearly
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)


class _LSTM(_Cell):
    """(W x + b, U, h₀, c₀) ↦ h, c and the gates, for rows in the order of the steps."""

    @staticmethod
    def forward(x: Tensor, U: Tensor, h: Tensor, c: Tensor, previous: Tensor, sizes: Sequence[int]) -> Any:
        H = U.shape[1]
        gates, Ut = torch.empty_like(x), U.t()
        hidden, cells, squashed = (x.new_empty(len(x), H) for _ in range(3))
        views = (gates, gates[:, : 2 * H], *gates.split(H, 1), cells, squashed, hidden)
        before = zip([h, *_before(hidden, sizes)], [c, *_before(cells, sizes)])
        for step in zip(_steps(x, sizes), before, *(_steps(view, sizes) for view in views)):
            x_, (h_, c_), z, i_and_f, i, f, g, o, cell, tanh, new = step
            torch.addmm(x_, h_, Ut, out=z)
            i_and_f.sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.mul(i, g, out=cell).addcmul_(f, c_)
            torch.mul(o, torch.tanh(cell, out=tanh), out=new)
        return hidden, cells, gates

    @staticmethod
    def _slopes(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """U, the previous h, f, the slopes (a, a_o) of the gates, and e."""
        U, h, c, previous, hidden, cells, gates = ctx.saved_tensors
        i, f, g, o = gates.chunk(4, 1)
        tanh = cells.tanh()
        a = [g * i * (1 - i), _previous(cells, c, previous) * f * (1 - f), i * (1 - g * g), tanh * o * (1 - o)]
        return U, _previous(hidden, h, previous), f, torch.stack(a, 1), o * (1 - tanh * tanh)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, V: Tensor | None, *others: Any) -> Any:
        U, h, f, a, e = _LSTM._slopes(ctx)
        z = torch.zeros_like(a).flatten(1) if x is None else x.clone(memory_format=torch.contiguous_format)
        if V is not None:
            z.addmm_(h, V.t())
        Ut, H = U.t(), U.shape[1]
        cells, hidden = torch.empty_like(h), torch.empty_like(h)
        gates = z.view(len(z), 4, H)
        views = (z, gates, gates[:, 3], a, e, f, cells, hidden)
        before = [None, *zip(_before(hidden, ctx.sizes), _before(cells, ctx.sizes))]
        for last, *step in zip(before, *(_steps(view, ctx.sizes) for view in views)):
            z_, all_, to_hidden, a_, e_, f_, cell, new = step
            if last is not None:
                z_.addmm_(last[0], Ut)
            torch.sum(all_.mul_(a_)[:, :3], 1, out=cell)
            if last is not None:
                cell.addcmul_(f_, last[1])
            torch.addcmul(to_hidden, e_, cell, out=new)
        return hidden, None, None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, *others: Any) -> Any:
        U, h, f, a, e = _LSTM._slopes(ctx)
        H = U.shape[1]
        hidden, cells, z = u.clone(), torch.empty_like(h), torch.empty_like(a)
        views = (hidden, cells, z, z[:, :3], z[:, 3], a[:, :3], a[:, 3], e, f, z.view(len(z), 4 * H))
        steps = list(zip(*(_steps(view, ctx.sizes) for view in views)))
        after: Any = None
        for step in reversed(steps):
            new, cell, _, z_cell, z_hidden, a_cell, a_hidden, e_, f_, z_ = step
            if after is None:
                torch.mul(e_, new, out=cell)
            else:
                f_next, cell_next, z_next = after
                n = len(z_next)
                torch.addmm(new[:n], z_next, U, out=new[:n])
                torch.mul(e_, new, out=cell)
                cell[:n].addcmul_(f_next, cell_next)
            torch.mul(a_cell, cell.unsqueeze(1), out=z_cell)
            torch.mul(a_hidden, new, out=z_hidden)
            after = f_, cell, z_
        flat = z.view(len(z), 4 * H)
        return flat, flat.t() @ h if ctx.needs_input_grad[1] else None, None, None, None, None


class _GRU(_Cell):
    """(W x + b, U, c, h₀) ↦ h, the gates r, z, n, and U h + c of n, for rows in the order of the steps."""

    @staticmethod
    def forward(x: Tensor, U: Tensor, c: Tensor, h: Tensor, previous: Tensor, sizes: Sequence[int]) -> Any:
        H = U.shape[1]
        Ut = U.t()
        gates, recurrent, hidden = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), H)
        r_and_z, n = slice(0, 2 * H), slice(2 * H, 3 * H)
        views = (x[:, r_and_z], x[:, n], recurrent, recurrent[:, r_and_z], recurrent[:, n])
        views = (*views, gates[:, r_and_z], *gates.split(H, 1), hidden)
        for h_, *step in zip([h, *_before(hidden, sizes)], *(_steps(view, sizes) for view in views)):
            x_rz, x_n, all_, to_rz, to_n, rz, r, z, new, out = step
            torch.addmm(c, h_, Ut, out=all_)
            torch.add(x_rz, to_rz, out=rz).sigmoid_()
            torch.addcmul(x_n, r, to_n, out=new).tanh_()
            torch.lerp(new, h_, z, out=out)
        return hidden, gates, recurrent[:, n].clone()

    @staticmethod
    def _slopes(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """U, the previous h, z, and the slopes of h in the gates' parts of the input, and in the recurrent ones."""
        U, _, h, previous, hidden, gates, to_n = ctx.saved_tensors
        r, z, n = gates.chunk(3, 1)
        before = _previous(hidden, h, previous)
        a_n = (1 - z) * (1 - n * n)
        a = [a_n * to_n * r * (1 - r), (before - n) * z * (1 - z)]
        return U, before, z, torch.stack([*a, a_n], 1), torch.stack([*a, a_n * r], 1)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, V: Tensor | None, d: Tensor | None, *others: Any) -> Any:
        U, h, z, a, b = _GRU._slopes(ctx)
        hidden = torch.zeros_like(h) if x is None else (a * x.reshape(a.shape)).sum(1)
        if V is not None:
            hidden.add_((b * (h @ V.t()).view_as(b)).sum(1))
        if d is not None:
            hidden.add_((b * d.view(3, -1)).sum(1))
        Ut = U.t()
        steps = zip(_before(hidden, ctx.sizes), *(_steps(view, ctx.sizes)[1:] for view in (hidden, z, b)))
        for last, new, z_, b_ in steps:
            new.add_(torch.mm(last, Ut).view_as(b_).mul_(b_).sum(1)).addcmul_(z_, last)
        return hidden, None, None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, *others: Any) -> Any:
        U, h, z, a, b = _GRU._slopes(ctx)
        hidden = u.clone()
        steps = zip(_before(hidden, ctx.sizes), *(_steps(view, ctx.sizes)[1:] for view in (hidden, z, b)))
        for last, new, z_, b_ in reversed(list(steps)):
            torch.addmm(last, (b_ * new.unsqueeze(1)).flatten(1), U, out=last).addcmul_(z_, new)
        recurrent = (b * hidden.unsqueeze(1)).flatten(1)
        inputs = (a * hidden.unsqueeze(1)).flatten(1)
        return inputs, recurrent.t() @ h if ctx.needs_input_grad[1] else None, recurrent.sum(0), None, None, None
