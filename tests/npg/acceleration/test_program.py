"""The traced program against PyTorch's own forward and reverse mode, with every rewriting on and off."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vjp

from npg.acceleration.program import Program, straight_line
from npg.linearize import Linearization

aten = torch.ops.aten


def network(dtype=torch.float32, activation=nn.Tanh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 6))
    return model.to(dtype), torch.randn(600, 17, dtype=dtype)


def first_order(model, x):
    """(η, J v, Jᵀu) as a function of (θ, x, v, u), and its arguments."""
    names = [name for name, _ in model.named_parameters()]
    primals = [p.detach() for p in model.parameters()]
    n = len(primals)

    def function(*values):
        def moved(*p):
            tangents = tuple(values[n + 1 : -1])
            return jvp(lambda *p: functional_call(model, dict(zip(names, p)), (values[n],)), p, tangents)

        outputs, pull, tangent = vjp(moved, *values[:n], has_aux=True)
        return outputs, tangent, pull(values[-1])

    return function, [*primals, x], [torch.randn_like(p) for p in primals], torch.randn_like(model(x)).detach()


def calls(module):
    return Counter(node.target for node in module.graph.nodes if node.op == "call_function")


def one_dnn_calls(program):
    return sum(
        count
        for module in (program._primal, program._push, program._pull)
        for target, count in calls(module).items()
        if "mkldnn" in str(target)
    )


@pytest.fixture
def avx512(monkeypatch):
    """As on a CPU where oneDNN is the faster."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


ACTIVATIONS = [nn.Tanh, nn.ReLU, partial(nn.ReLU, inplace=True), nn.Identity, nn.GELU, partial(nn.LayerNorm, 64)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("enabled", [True, False], ids=["onednn", "default"])
def test_program_equals_forward_and_reverse_mode(enabled, activation, assert_close, avx512):
    model, x = network(activation=activation)
    function, arguments, v, u = first_order(model, x)
    with torch.backends.mkldnn.flags(enabled=enabled):
        program = Program(function, arguments, v, u)
        outputs, maps = program.linearize(arguments)
        expected, tangent, pulled = function(*arguments, *v, u)
        for push, pull in ((maps.push, maps.pull), (maps.plain_push, maps.plain_pull)):
            assert_close(outputs, expected)
            assert_close(push(v), tangent)
            for mine, theirs in zip(pull(u), pulled, strict=True):
                assert_close(mine, theirs)
    if not enabled:
        assert one_dnn_calls(program) == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")
def test_one_dnn_takes_large_float32_products_only(avx512):
    model, x = network()
    assert one_dnn_calls(Program(*first_order(model, x))) >= 8
    assert one_dnn_calls(Program(*first_order(model, x[:4]))) == 0
    assert one_dnn_calls(Program(*first_order(*network(torch.float64)))) == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Identity])
def test_one_dnn_has_nothing_to_transpose(activation, avx512):
    model, x = network(activation=activation)
    program = Program(*first_order(model, x))
    products = [node for node in program._pull.graph.nodes if "mkldnn" in str(node.target)]
    assert len(products) == 3
    assert all(node.args[0].target is not torch.t for node in products)
    model.double()
    exact = Program(*first_order(model, x.double()))
    assert not [n for n in exact._primal.graph.nodes if n.target is aten.clone.default], "only oneDNN needs a copy"


class Narrowed(nn.Module):
    """Its outputs are its inputs, in rows that lie apart."""

    def forward(self, h):
        return torch.cat([h, h], -1)[:, : h.shape[1]]


@pytest.mark.parametrize("given", ["x", "v", "u", "hidden"])
def test_one_dnn_is_given_dense_matrices(given, avx512, assert_close, accelerated):
    # as a right factor it would take a thousand times as long for a matrix whose rows lie apart
    model, x = network()[0], torch.randn(1500, 17)
    if given == "hidden":
        model = nn.Sequential(*(part for layer in model for part in (layer, Narrowed())))
    n = sum(p.numel() for p in model.parameters())
    v, u = torch.randn(n), torch.randn(1500, 6)
    expected = Linearization(model, x)
    pushed, pulled = expected.push_forward(v), expected.pull_back(u)

    def apart(t):
        return torch.stack([t, t], -1)[..., 0]

    taken = []

    def dense(t):
        return t.ndim != 2 or t.is_contiguous() or t.t().is_contiguous()

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_linear_pointwise" in str(func):
                taken.append(dense(args[1 if "default" in str(func) else 2]))
            return func(*args, **(kwargs or {}))

    linearization = Linearization(model, apart(x) if given == "x" else x)
    linearization.pull_back(apart(u) if given == "u" else u)  # over the recorded graph; the program is checked by it
    with Recorder():
        linearization.push_forward(v)
        assert all(taken)
        taken.clear()
        assert_close(linearization.push_forward(apart(v) if given == "v" else v), pushed)
        assert_close(linearization.pull_back(apart(u) if given == "u" else u), pulled)
    expected_calls = 8 if given == "hidden" else 9
    assert len(taken) == (expected_calls if torch.backends.mkldnn.is_available() else 0)
    assert all(taken)


def test_one_dnn_takes_nothing_where_it_is_slower(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert one_dnn_calls(Program(*first_order(*network()))) == 0


def test_what_is_known_to_be_zero_or_known_already_is_not_computed():
    model, x = network(torch.float64)
    function, arguments, v, u = first_order(model, x)
    program = Program(function, arguments, v, u)
    # J v takes x V₁ᵀ, then a Vᵀ and t Wᵀ per layer, fused with the sums; Jᵀu one product down and one across per layer
    push, pull, primal = calls(program._plain_push), calls(program._plain_pull), calls(program._primal)
    assert push[aten.addmm.default] == 5
    assert push[aten.mm.default] == push[aten.add.Tensor] == 0
    assert pull[aten.mm.default] == 5
    assert primal[torch.tanh] == primal[aten.rsub.Scalar] == 2
    assert push[aten.tanh.default] == pull[aten.tanh.default] == 0


def test_products_leave_each_other_alone():
    model, x = network()
    function, arguments, v, u = first_order(model, x)
    _, maps = Program(function, arguments, v, u).linearize(arguments)
    tangent, pulled = maps.push(v), maps.pull(u)
    kept = tangent.clone(), [p.clone() for p in pulled]
    given = [t.clone() for t in v], u.clone()
    maps.push([-t for t in v])
    maps.pull(-u)
    assert torch.equal(tangent, kept[0])
    assert all(map(torch.equal, pulled, kept[1]))
    assert all(map(torch.equal, v, given[0]))
    assert torch.equal(u, given[1])
    assert torch.equal(maps.push(v), tangent)
    assert all(map(torch.equal, maps.pull(u), pulled))


def test_recorded_activations_are_freed_once_the_program_has_its_own(accelerated):
    model, x = network()
    linearization = Linearization(model, x)
    by_autograd = linearization.pull_back(torch.ones(600, 6))
    assert linearization._graph is not None
    linearization.push_forward(torch.ones(linearization.parameters.numel))
    assert linearization._graph is None
    torch.testing.assert_close(linearization.pull_back(torch.ones(600, 6)), by_autograd, rtol=1e-4, atol=1e-4)


def test_what_is_computed_again_after_a_change_in_place_is_another_thing(assert_close):
    def function(p, v, u):
        def moved(p):
            def inner(p):
                x = p * 2.0
                before = x * 3.0
                x[:2] += 1.0
                return (before + x * 3.0).tanh()

            return jvp(inner, (p,), (v,))

        outputs, pull, tangent = vjp(moved, p, has_aux=True)
        return outputs, tangent, pull(u)

    p, v, u = torch.randn(3, 5, dtype=torch.float64)
    outputs, maps = Program(function, [p], [v], u).linearize([p])
    expected, tangent, (pulled,) = function(p, v, u)
    assert_close(outputs, expected)
    assert_close(maps.push([v]), tangent)
    assert_close(maps.pull(u)[0], pulled)


def test_outputs_that_do_not_move_are_refused():
    def function(p, v, u):
        return p.detach() * 1.0, torch.zeros_like(p), [u * 2.0]

    with pytest.raises(NotImplementedError, match="do not move"):
        Program(function, [torch.ones(3)], [torch.ones(3)], torch.ones(3))


def test_a_straight_line_program_takes_all_tensors_as_they_are():
    torch.manual_seed(0)
    w, s, x = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64), torch.randn(5, 3).double()

    def function(w, s, x):
        joined = torch.cat([x @ w.t(), s.exp().expand(5, 4)], -1)
        mean, spread = joined.chunk(2, -1)  # cuts apart what was joined
        return [mean * spread, mean]

    run = straight_line(function, [w, s, x])
    for shift in (0.0, 1.0):
        for t in (w, s, x):
            t.data.add_(shift)  # which no version counts
        for a, b in zip(run(w, s, x), function(w, s, x), strict=True):
            assert torch.allclose(a, b, rtol=1e-12)
    assert calls(run.__self__) == {
        torch.t: 1,
        torch.mm: 1,
        torch.exp: 1,
        torch.Tensor.expand: 1,
        torch.mul: 1,
    }


def test_a_straight_line_program_draws_random_numbers_in_every_call():
    def function(scale, x):
        return [x + scale.exp() * torch.randn(x.shape)]

    scale, x = torch.zeros(3), torch.zeros(4, 3)
    run = straight_line(function, [scale, x])
    torch.manual_seed(0)
    a, b = run(scale, x)[0], run(scale, x)[0]
    torch.manual_seed(0)
    assert torch.equal(a, function(scale, x)[0])
    assert torch.equal(b, function(scale, x)[0])
    assert not torch.equal(a, b)


def test_what_looks_at_values_has_no_program():
    with pytest.raises(Exception, match=r".+"):
        straight_line(lambda x: [x if float(x.sum()) > 0 else -x], [torch.ones(3)])
