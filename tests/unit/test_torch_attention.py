"""torch's private attention operators: as they are called, and what they compute on a CPU."""

from __future__ import annotations

import pytest
import torch

from hf_sp.torch_attention import attention, attention_backward

_KEYS = "Tensor query, Tensor key, Tensor value"
_PLAIN = "float dropout_p=0., bool is_causal=False"
_GIVEN = f"Tensor grad_out, {_KEYS}, Tensor out, Tensor logsumexp"
SCHEMAS = {
    "flash_attention_for_cpu": f"({_KEYS}, {_PLAIN}, *, Tensor? attn_mask=None, float? scale=None)"
    " -> (Tensor output, Tensor logsumexp)",
    "flash_attention_for_cpu_backward": f"({_GIVEN}, float dropout_p, bool is_causal, *, "
    "Tensor? attn_mask=None, float? scale=None) -> (Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value)",
    "flash_attention": f"({_KEYS}, {_PLAIN}, bool return_debug_mask=False, *, float? scale=None)"
    " -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, "
    "SymInt max_k, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    "flash_attention_backward": f"({_GIVEN}, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, "
    "SymInt max_k, float dropout_p, bool is_causal, Tensor philox_seed, Tensor philox_offset, *, "
    "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    "efficient_attention": f"({_KEYS}, Tensor? attn_bias, bool compute_log_sumexp, {_PLAIN}, *, "
    "float? scale=None) -> (Tensor output, Tensor log_sumexp, Tensor philox_seed, "
    "Tensor philox_offset)",
    "efficient_attention_backward": f"(Tensor grad_out_, {_KEYS}, Tensor attn_bias, Tensor out, "
    "Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, float dropout_p, "
    "bool[4] grad_input_mask, bool is_causal=False, *, float? scale=None) -> (Tensor, Tensor, "
    "Tensor, Tensor)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_operators_are_called_as_they_are(name):
    name = f"_scaled_dot_product_{name}", SCHEMAS[name]
    assert str(getattr(torch.ops.aten, name[0]).default._schema) == f"aten::{name[0]}{name[1]}"


CASES = {
    # heads, key/value heads, queries, keys, D, E, causal, masked
    "plain": (4, 4, 6, 5, 8, 8, False, False),
    "heads in groups": (4, 2, 6, 5, 8, 8, False, True),
    "causal, in groups": (4, 1, 6, 6, 8, 8, True, False),
    "features of two widths": (2, 2, 6, 5, 12, 8, False, True),
    "one query": (2, 1, 1, 5, 8, 8, False, True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parts_of_the_keys_join(case):
    """Output and log-sum-exp; gradients of each half of the keys by the whole's; nothing to see."""
    a, c, n, m, D, E, causal, masked = case
    torch.manual_seed(0)
    shapes = (2, a, n, D), (2, c, m, D), (2, c, m, E)
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    bias = torch.zeros(1, 1, n, m, dtype=torch.float64)
    if masked:
        bias[..., ::2, 1] = bias[..., 0, :] = float("-inf")
    allowed = torch.ones(n, m, dtype=torch.bool).tril() if causal else torch.isfinite(bias)
    each = k.repeat_interleave(a // c, 1), v.repeat_interleave(a // c, 1)
    scores = (q @ each[0].mT * 0.3).masked_fill(~allowed, float("-inf"))
    want = scores.softmax(-1).nan_to_num(0) @ each[1]
    lse = scores.logsumexp(-1)
    dout = torch.randn_like(want)
    grads = torch.autograd.grad(want, (q, k, v), dout)

    q, k, v = (x.detach() for x in (q, k, v))
    out, found = attention(q, k, v, bias if masked else None, causal, 0.3)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(found, lse)
    finite = found.masked_fill(found.isinf(), 0)
    total = torch.zeros_like(q)
    for keys in [slice(0, m)] if causal else [slice(0, m // 2), slice(m // 2, m)]:
        part = q, k[:, :, keys], v[:, :, keys], out, finite
        mask = bias[..., keys] if masked else None
        dq, dk, dv = attention_backward(dout, *part, mask, causal, 0.3)
        total += dq
        torch.testing.assert_close(dk, grads[1][:, :, keys])
        torch.testing.assert_close(dv, grads[2][:, :, keys])
    torch.testing.assert_close(total, grads[0])
