"""What a Llama-style decoder layer keeps for backward, in closed form.

Owns: bytes per token and layer for a pre-norm layer with RMSNorm, SwiGLU, grouped-query attention
on flash-style kernels and no dropout, in 16 bit. The measured counts are held against these. Must
not know: torch.

Terms, per token, with t = tp, as transformers' eager modules compute:
    12h + 8     two RMSNorms: an fp32 copy (4h), the normalized 16-bit x (2h) and one fp32 rstd each
    4h          the two normed inputs, of q/k/v and of gate/up
    C           (4q + 4k + 4n)/t: q, k, v, the attention output (16 bit), its logsumexp (fp32)
    8f/t        gate, up, silu(gate) and their product
and with hf_sp's kernels:
    4h + 8      two RMSNorms: the 16-bit input and one fp32 rstd each
    4h, 8f/t    as above, less what backward makes again: the normed inputs (4h), the product
                (2f/t); silu(gate) (2f/t) is never kept
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of a decoder layer.

    Attributes:
        hidden: width h of the residual stream.
        intermediate: width f of the MLP.
        heads: query heads n.
        kv_heads: key and value heads.
        head_dim: width of one head.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def attention_bytes(self, tp: int) -> float:
        """Interior of the attention: C."""
        q, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (4 * q + 4 * k + 4 * self.heads) / tp

    def sharded_bytes(self, tp: int) -> float:
        """Attention and MLP interior, sharded under any tensor parallelism: C + 8f/t."""
        return self.attention_bytes(tp) + 8 * self.intermediate / tp


def tp_bytes_per_token(shape: LayerShape, tp: int) -> float:
    """Tensor parallelism alone: norms and normed inputs on every rank. 16h + 8 + C + 8f/t.

    With tp=1 it is the unsharded layer.
    """
    return 16 * shape.hidden + 8 + shape.sharded_bytes(tp)


def sp_gathered_bytes_per_token(shape: LayerShape, tp: int) -> float:
    """Sequence parallelism that saves the gathered inputs. 4h + (12h + 8)/t + C + 8f/t."""
    return 4 * shape.hidden + (12 * shape.hidden + 8) / tp + shape.sharded_bytes(tp)


def sp_shard_bytes_per_token(shape: LayerShape, tp: int) -> float:
    """Sequence parallelism that saves only shards. (16h + 8)/t + C + 8f/t, 1/t of the whole."""
    return (16 * shape.hidden + 8) / tp + shape.sharded_bytes(tp)


def kernels_bytes_per_token(
    shape: LayerShape, tp: int, recompute: Literal["none", "norm", "norm+act"] = "norm+act"
) -> float:
    """Sequence parallelism with hf_sp's kernels, by what backward makes again.

    ``none``: (8h + 8)/t + C + 6f/t, what Megatron keeps; ``norm``: (4h + 8)/t + C + 6f/t;
    ``norm+act``: (4h + 8)/t + C + 4f/t.
    """
    norms = (8 if recompute == "none" else 4) * shape.hidden + 8
    products = 4 if recompute == "norm+act" else 6
    return (norms + products * shape.intermediate) / tp + shape.attention_bytes(tp)


def kernels_tp_bytes_per_token(shape: LayerShape, tp: int) -> float:
    """Tensor parallelism alone with hf_sp's kernels. 4h + 8 + C + 4f/t."""
    return 4 * shape.hidden + 8 + shape.attention_bytes(tp) + 4 * shape.intermediate / tp
