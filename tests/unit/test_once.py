"""Gradients of gradients are refused, wherever the second path would go."""

from __future__ import annotations

import pytest
import torch

from hf_sp.comm.autograd import once_differentiable
from hf_sp.errors import ConfigError


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy, None


def test_the_first_derivative():
    x = torch.arange(3.0, requires_grad=True)
    _Square.apply(x, None).sum().backward()
    assert torch.equal(x.grad, 2 * x)
    assert x.grad.grad_fn is None


def test_the_second_through_a_saved_tensor():
    """torch's own decorator lets this pass: the gradient that comes in depends on nothing."""
    x = torch.arange(3.0, requires_grad=True)
    (grad,) = torch.autograd.grad(_Square.apply(x, None).sum(), x, create_graph=True)
    assert torch.equal(grad, 2 * x)
    with pytest.raises(ConfigError, match="no second derivative"):
        (x.sum() + grad.square().sum()).backward()


def test_the_second_through_the_incoming_gradient():
    x = torch.arange(3.0, requires_grad=True)
    loss = _Square.apply(x, None).exp().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(ConfigError, match="no second derivative"):
        grad.sum().backward()
