"""What a LoRA step costs, exactly: collectives and bytes, from the code itself.

Without an adapter a layer keeps ``(4h + 8)/t + C + 4f/t`` bytes a token: tests/parity/test_cost.py.
No input of a linear is in it that something else does not keep anyway: those of q, k, v, gate, up
and down are made again, that of o is the attention output. So an adapter adds its ``A x``, of rank
r, and nothing else. With HF's own modules (``kernels=False``) the linears alone keep their inputs.
"""

from __future__ import annotations

import functools
from unittest import mock

import peft
import pytest
import torch
from parity.test_cost import GROUPED, LLAMA_8B, _calls, _config
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sp import parallelize
from hf_sp.estimate import count_step, fake_tensors, fake_world, per_layer
from scripts.bench._cost.layers import kernels_bytes_per_token

RANK = 16


@functools.cache
def _step(shape, tp, sp, layers, targets, length=256, order="after", **options):
    with fake_world(tp) as mesh, fake_tensors():
        config = _config(LlamaConfig, shape, layers, 128)
        model = AutoModelForCausalLM.from_config(config).train()

        def adapt(model):
            lora = peft.LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM")
            # Fake parameters cannot be moved, and need not be.
            with mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self):
                return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)

        model = adapt(model) if targets and order == "before" else model
        model = parallelize(model, sp=sp, mesh=mesh, **options)
        model = adapt(model) if targets and order == "after" else model
        if targets:
            model.enable_input_require_grads()
        ids = torch.zeros(1, length, dtype=torch.long)
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def _layer(shape, tp, sp, targets, **kwargs):
    two, three = (_step(shape, tp, sp, n, targets, **kwargs) for n in (2, 3))
    return per_layer(two, three, 1)


@pytest.mark.parametrize("order", ["before", "after"])
def test_collectives_of_a_layer(order):
    """8: no input is gathered again. And one small sum for the factors of each block's half."""
    layer = _layer(GROUPED, 4, True, "all-linear", order=order)
    assert _calls(layer.forward) == {"all_gather": 2, "reduce_scatter": 2}
    assert _calls(layer.backward) == {"all_gather": 2, "reduce_scatter": 2, "all_reduce": 4}
    whole = 256 * GROUPED.hidden * 2
    assert layer.collectives["all_gather"].bytes == 4 * whole
    # The rank-r gradients of q, k, v and of gate, up ride along.
    assert layer.collectives["reduce_scatter"].bytes == 4 * whole + 5 * RANK * 256 * 2
    factors = 5 * RANK * GROUPED.hidden + 2 * RANK * GROUPED.hidden
    assert layer.collectives["all_reduce"].bytes == factors * 2


def test_collectives_of_a_plain_tp_layer():
    """No sum for A: its gradient is whole, as the input and the reduced gradient are."""
    layer = _layer(GROUPED, 4, False, "all-linear")
    assert _calls(layer.forward) == {"all_reduce": 2}
    assert _calls(layer.backward) == {"all_reduce": 2 + 2}


@pytest.mark.parametrize("shape", [GROUPED, LLAMA_8B], ids=str)
@pytest.mark.parametrize(("targets", "pairs"), [("all-linear", 7), (("q_proj", "v_proj"), 2)])
def test_bytes_are_the_full_step_s_and_the_ranks(shape, targets, pairs):
    tp = 4
    adapted = _layer(shape, tp, True, targets).alive_bytes / 256
    assert adapted == kernels_bytes_per_token(shape, tp) + pairs * RANK * 2


@pytest.mark.parametrize("shape", [GROUPED], ids=str)
def test_inputs_of_frozen_linears_are_not_saved(shape):
    """HF's own norms and activations; on q and v alone: less by the MLP's input and down's."""
    tp = 4
    adapted = _layer(shape, tp, True, ("q_proj", "v_proj"), kernels=False).alive_bytes / 256
    full = _layer(shape, tp, True, None, kernels=False).alive_bytes / 256
    inputs = 2 * (shape.hidden + shape.intermediate) / tp
    assert adapted <= full - inputs + 2 * RANK * 2
