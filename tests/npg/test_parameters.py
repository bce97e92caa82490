"""The flat vector: order, sharing, freezing, dtypes, and exact copies."""

import pytest
import torch
from torch import nn

from npg.parameters import Parameters

pytestmark = pytest.mark.usefixtures("double")


def test_order_is_that_of_the_module(mlp):
    model = mlp(2)
    parameters = Parameters(model)
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(parameters.get(), expected)
    assert len(parameters) == parameters.numel == expected.numel()
    assert list(parameters.named()) == [name for name, _ in model.named_parameters()]


def test_flatten_and_unflatten_are_inverse(mlp):
    parameters = Parameters(mlp(2))
    vector = torch.randn(parameters.numel)
    parts = parameters.unflatten(vector)
    assert [p.shape for p in parts] == [p.shape for p in parameters.tensors]
    assert torch.equal(parameters.flatten(parts), vector)
    assert parts[0].data_ptr() == vector.data_ptr()  # views: nothing is copied
    assert torch.equal(parameters.flatten([None, *parts[1:]])[: parts[0].numel()], torch.zeros(parts[0].numel()))


def test_strided_vectors_unflatten_too(mlp):
    parameters = Parameters(mlp(2))
    block = torch.randn(parameters.numel, 3)
    assert torch.equal(parameters.flatten(parameters.unflatten(block[:, 1])), block[:, 1])


def test_frozen_parameters_are_left_out(mlp):
    model = mlp(2)
    model[0].weight.requires_grad_(False)
    parameters = Parameters(model)
    assert "0.weight" not in parameters.names
    assert parameters.numel == sum(p.numel() for p in model.parameters()) - model[0].weight.numel()


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert Parameters(model).numel == 9


def test_scalars_and_several_precisions():
    tensors = {
        "a": nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16)),
        "b": nn.Parameter(torch.randn(2, 3, dtype=torch.float32)),
    }
    parameters = Parameters(tensors)
    assert parameters.dtype is torch.float32
    assert parameters.get()[0] == 2
    parts = parameters.unflatten(torch.arange(7.0, dtype=torch.float32))
    assert parts[0].shape == ()
    assert [p.dtype for p in parts] == [torch.bfloat16, torch.float32]
    tensors["c"] = nn.Parameter(torch.randn(1, dtype=torch.float64))
    assert Parameters(tensors).dtype is torch.float64
    assert Parameters({"a": tensors["a"]}).dtype is torch.float32  # a vector is at least float32


def test_get_is_a_copy(mlp):
    parameters = Parameters({"only": nn.Parameter(torch.zeros(3))})  # one tensor: cat alone would give an alias
    vector = parameters.get()
    vector += 1
    assert torch.equal(parameters.get(), torch.zeros(3))


def test_move_and_restore_are_in_place_and_exact(mlp):
    model = mlp(2).float()
    with torch.no_grad():
        model[0].bias[0] = torch.nan
        model[0].bias[1] = -0.0
    parameters = Parameters(model)
    origin = parameters.copy()
    addresses = [p.data_ptr() for p in model.parameters()]
    step = torch.randn(parameters.numel, dtype=torch.float32)
    parameters.move(origin, step, 0.5)
    parameters.move(origin, step, 0.25)  # from the origin, not from where it is
    expected = torch.cat([p.reshape(-1) for p in origin]) + 0.25 * step
    assert torch.equal(parameters.get().nan_to_num(), expected.nan_to_num())
    parameters.restore(origin)
    bits = [p.detach().view(torch.int32) for p in model.parameters()]
    assert all(torch.equal(a, b.view(torch.int32)) for a, b in zip(bits, origin))
    assert addresses == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e6, 1e30])
def test_a_step_is_scaled_before_it_is_rounded(dtype, scale):
    """An objective in other units has another solution s, and the same step βs."""
    parameters = Parameters({"only": nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=dtype))})
    step = torch.tensor([0.25, 0.5, -1.0], dtype=parameters.dtype) / scale
    parameters.move(parameters.copy(), step, scale)
    moved = torch.tensor([1.25, -1.5, -0.5], dtype=parameters.dtype)
    torch.testing.assert_close(parameters.get(), moved, rtol=1e-6, atol=1e-6)


def test_bad_input(mlp):
    parameters = Parameters(mlp(2))
    for bad in (torch.zeros(5), torch.zeros(5, parameters.numel), torch.zeros(parameters.numel, 1, 1), torch.zeros(())):
        with pytest.raises(ValueError, match=rf"vector must have shape \({parameters.numel},\).*got"):
            parameters.check(bad)
    with pytest.raises(ValueError, match="no trainable parameter: set requires_grad"):
        Parameters(nn.ReLU())
    with pytest.raises(ValueError, match=r"one device, got \['cpu', 'meta'\]"):
        Parameters({"a": torch.zeros(2), "b": torch.zeros(2, device="meta")})
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet: run the model once"):
        Parameters(nn.Sequential(nn.LazyLinear(2)))
    with pytest.raises(ValueError):  # noqa: PT011 - a wrong number of tensors
        parameters.flatten([torch.zeros(2)])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e5m2])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=rf"'odd' is a {dtype} tensor.* convert it"):
        Parameters({"fine": torch.zeros(2), "odd": torch.zeros(2).to(dtype)})


def test_sparse_tensors_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'odd' is a .* layout torch\.sparse_coo.*must be dense"):
        Parameters({"odd": torch.eye(2).to_sparse()})


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_move_or_have_no_dense_gradient_are_refused_by_name(make):
    with pytest.raises(ValueError, match=r"'1\.0' has max_norm=1\.0.*Set max_norm=None"):
        Parameters(nn.Sequential(nn.Linear(2, 2), nn.Sequential(make(5, 2, max_norm=1.0))))
    for option, remedy in (("sparse", "set sparse=False"), ("scale_grad_by_freq", "Set scale_grad_by_freq=False")):
        model = nn.Sequential(make(5, 2, **{option: True}), nn.Linear(2, 2))
        with pytest.raises(ValueError, match=rf"'0' has {option}=True.*{remedy}"):
            Parameters(model)
        model[0].weight.requires_grad_(False)  # then it is no part of the vector
        assert Parameters(model).numel == 6


def test_finite_or_not():
    parameters = Parameters({"a": torch.ones(2, 2), "empty": torch.zeros(0), "b": torch.ones(3)})
    assert parameters.is_finite()
    parameters.tensors[2][1] = -torch.inf
    assert not parameters.is_finite()
    assert Parameters({"empty": torch.zeros(0)}).is_finite()
