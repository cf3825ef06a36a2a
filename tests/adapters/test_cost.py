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
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sp import parallelize
from hf_sp.comm.collectives import Axis
from hf_sp.estimate import count_step, fake_tensors, fake_world, per_layer
from hf_sp.estimate.accounting import StepAccounting
from hf_sp.model.columns import Factor, gather_columns
from hf_sp.model.ports import low_rank_column
from scripts.bench._cost.layers import kernels_bytes_per_token

RANK = 16


@functools.cache
def _step(shape, tp, sp, layers, targets, length=256, order="after", dropout=0.0, **options):
    with fake_world(tp) as mesh, fake_tensors():
        config = _config(LlamaConfig, shape, layers, 128)
        model = AutoModelForCausalLM.from_config(config).train()

        def adapt(model):
            lora = peft.LoraConfig(
                r=RANK, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM"
            )
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


SEED = 8
"""Bytes of a draw of dropout, an int64."""


@pytest.mark.parametrize(("targets", "draws"), [("all-linear", 4), (("q_proj", "v_proj"), 1)])
def test_dropout_keeps_its_seed_alone(targets, draws):
    """One draw for q, k, v and one for gate, up; one for each row linear. No mask, no dropped x."""
    plain = _layer(GROUPED, 4, True, targets)
    dropped = _layer(GROUPED, 4, True, targets, dropout=0.3)
    assert dropped.alive_bytes - plain.alive_bytes == draws * SEED
    assert dropped.collectives == plain.collectives


class _Masks(TorchDispatchMode):
    """Counts the masks that are made."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func is torch.ops.hf_sp.keep_mask.default
        return func(*args, **(kwargs or {}))


def _block(sharded, dtype, dropouts):
    """One block's entry and factors: (bytes of x, saved, peak of the backward, masks made)."""
    with fake_world(4) as mesh, fake_tensors(), _Masks() as masks, StepAccounting() as step:
        x = torch.empty(2, 64, 512, dtype=dtype, requires_grad=True)
        factors = [
            Factor(i, torch.empty(RANK, 512, dtype=dtype, requires_grad=True), p)
            for i, p in enumerate(dropouts)
        ]
        before, axis = step.live_bytes, Axis.of(mesh)
        length = 256 if sharded else 64
        gathered = gather_columns(x, [], axis, sharded=sharded, length=length, factors=factors)
        us = [
            low_rank_column(gathered.x, gathered.ports[factor.key], gathered) for factor in factors
        ]
        loss = torch.stack(us).sum() + gathered.x.sum()
        made = masks.made
        del us, gathered
        saved = step.live_bytes - before
        step.peak_bytes = step.live_bytes
        loss.backward()
        return x.nbytes, saved, step.peak_bytes, (made, masks.made - made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("pairs", [1, 3, 7])
def test_dropout_of_a_block_makes_one_mask_at_a_time(pairs, sharded, dtype):
    """However many factors: one mask in the forward; in backward one for dx and one for x."""
    _, saved, peak, _ = _block(sharded, dtype, [0.0] * pairs)
    size, saved_too, peak_too, masks = _block(sharded, dtype, [0.3] * pairs)
    assert masks == (1, 2)
    assert saved_too - saved == SEED
    assert 0 < peak_too - peak <= 3 * size
    # Other probabilities are other masks: the count sees them.
    *_, masks = _block(sharded, dtype, [0.3, 0.4])
    assert masks == (2, 4)
