"""What several files of tests differentiate."""

import torch


class Cube(torch.autograd.Function):
    """A custom function with a backward that can be differentiated, and without a jvp."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, u):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * u
