"""Mutants of gradients of which each rank has a part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness.parity import Case

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.model import parameters
from mutants import wrongly
from mutants.registry import Patch, mutant, register


def _every_sum(wrong: Callable) -> list[Patch]:
    """Another sum of a layer's norm gradients, and of the final norm's."""
    return [(comm, "launch_all_reduce_", wrong)]


def _sum_of_a_layer(wrong: Callable) -> list[Patch]:
    """Another sum of a layer's norm gradients; the final norm's is of one weight ``[64]``."""
    right = comm.launch_all_reduce_
    return _every_sum(lambda dw, axis: (wrong if len(dw) > 64 else right)(dw, axis))


def _partial_not_summed() -> list[Patch]:
    return [
        wrongly.backward(pairs._IdentityAllReduce, lambda ctx, grad: (grad, None)),
        *_every_sum(lambda dw, axis: dw),
    ]


def _partial_averaged() -> list[Patch]:
    def backward(ctx, grad):
        return comm.all_reduce(grad, ctx.axis) / ctx.axis.size, None

    return [
        wrongly.backward(pairs._IdentityAllReduce, backward),
        *_every_sum(wrongly.averaged(comm.all_reduce)),
    ]


for _family, _sp, _tp, _kernels in [
    ("llama", True, 2, True),  # norms on sequence shards
    ("llama", True, 2, False),
    ("qwen3", False, 2, True),  # q_norm, k_norm on local heads, in plain TP too
    ("qwen3", False, 2, False),
    ("llama_kv1", False, 2, True),  # k and v of a head that several ranks compute
    ("llama_kv2", True, 4, True),
]:
    _where = f"{_family}_{'sp' if _sp else 'tp'}" + ("" if _kernels else "_own_norms")
    _case = Case(_family, sp=_sp, parallelize=(("kernels", _kernels),))
    register(f"partial_gradient_not_summed_{_where}", _partial_not_summed, _case, _tp)
    register(f"partial_gradient_averaged_{_where}", _partial_averaged, _case, _tp)


@mutant(Case("llama", accum=3))
def norm_gradients_summed_on_the_accumulated_grad() -> list[Patch]:
    """transformers 5.23's fault: a hook on ``param.grad`` reduces the running sum every time."""
    calls: list[int] = []

    def again(dw, axis):
        # The first micro-batch's sums (two layers' and the final norm's) are reduced again.
        calls.append(1)
        reduced = comm.all_reduce(dw, axis)
        return reduced * axis.size if len(calls) <= 3 else reduced

    return _every_sum(again)


# --- the one sum of a layer's norms ---------------------------------------------------------------


@mutant(Case("llama"))
def sum_of_a_layer_dropped() -> list[Patch]:
    return _sum_of_a_layer(lambda dw, axis: dw)


@mutant(Case("llama"))
def sum_of_a_layer_averaged() -> list[Patch]:
    return _sum_of_a_layer(wrongly.averaged(comm.all_reduce))


@mutant(Case("qwen3"))
def sum_of_the_first_norm_alone() -> list[Patch]:
    def wrong(dw, axis):
        total = comm.all_reduce(dw, axis)
        return torch.cat([total[:64], dw[64:]])

    return _sum_of_a_layer(wrong)


def _swapped(a: int, b: int) -> list[Patch]:
    right = parameters._SumTogether.backward

    def backward(ctx, *grads):
        axis, *sums = right(ctx, *grads)
        sums[a], sums[b] = sums[b], sums[a]
        return axis, *sums

    return [wrongly.backward(parameters._SumTogether, backward)]


@mutant(Case("llama"))
def gradients_of_two_norms_swapped() -> list[Patch]:
    return _swapped(0, 1)


@mutant(Case("qwen3"))
def gradients_of_the_norms_of_queries_and_keys_swapped() -> list[Patch]:
    return _swapped(2, 3)


@mutant(Case("llama", parallelize=(("kernels", False),)))
def norm_sends_its_port_nothing() -> list[Patch]:
    right = parameters._SendToPort.backward
    lost = lambda ctx, grad: (None, right(ctx, grad)[1] * 0)  # noqa: E731
    return [wrongly.backward(parameters._SendToPort, lost)]


@mutant(Case("llama_bias", parallelize=(("kernels", False),)))
def norm_gradients_left_partial() -> list[Patch]:
    def show(self, module, args):
        for name, p in module._parameters.items():
            if p is not None:
                module.__dict__[name] = parameters.local(p)

    return [(parameters.LocalParameters, "show", show)]
