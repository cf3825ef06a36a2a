"""The private names of torch that collectives.py stands on, as it uses them."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("all_gather_into_tensor", "(Tensor input, int group_size, {group} group_name) -> Tensor"),
        (
            "reduce_scatter_tensor",
            "(Tensor input, str reduce_op, int group_size, {group} group_name) -> Tensor",
        ),
        ("all_reduce", "(Tensor input, str reduce_op, {group} group_name) -> Tensor"),
        ("wait_tensor", "(Tensor tensor) -> Tensor"),
    ],
)
def test_functional_collectives_keep_their_signature(name, schema):
    found = str(getattr(torch.ops._c10d_functional, name).default._schema)
    wanted = {f"_c10d_functional::{name}{schema.format(group=g)}" for g in ("str", "Any")}
    assert found in wanted


def test_lazy_logits_private_names():
    """layers/lazy.py: wrapper subclasses that stay out of __torch_function__."""
    assert callable(torch.Tensor._make_wrapper_subclass)
    assert torch._C.DisableTorchFunctionSubclass


def test_device_assert_exists():
    """layers/vocab.py: the asynchronous assert of torch.nn.functional's own kernels."""
    assert callable(torch._assert_async)
