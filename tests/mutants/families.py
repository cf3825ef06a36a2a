"""Mutants of what single families need: packed linears, norms over heads, latents, embeddings."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

from harness.parity import Case
from parity import dropout_jobs, family_jobs
from torch.distributed.tensor import Shard

from hf_sp import install
from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.install import _install_norm
from hf_sp.model import block, embedding, forward, norm_over_heads, parameters, shard, streams
from hf_sp.model.mixer import OwnRowsParameters
from hf_sp.model.parameters import Partial
from hf_sp.moe import block as moe_block
from hf_sp.moe import experts, layer_experts
from hf_sp.plan.schema import Leaf, OwnRows
from mutants import wrongly
from mutants.registry import Patch, mutant


def _own(x, axis):
    comm.all_reduce(x, axis)
    return x


_WITHOUT_SUM = SimpleNamespace(all_reduce=_own)


@mutant(Case("olmo2"))
def norm_over_heads_sees_own_heads() -> list[Patch]:
    right = norm_over_heads._OverHeads.forward

    def forward(ctx, *args):
        with mock.patch.object(norm_over_heads, "comm", _WITHOUT_SUM):
            return right(ctx, *args)

    return [(norm_over_heads._OverHeads, "forward", staticmethod(forward))]


@mutant(Case("olmo2"))
def norm_over_heads_sums_no_gradient() -> list[Patch]:
    right = norm_over_heads._OverHeads.backward

    def backward(ctx, *grads):
        with mock.patch.object(norm_over_heads, "comm", _WITHOUT_SUM):
            return right(ctx, *grads)

    return [wrongly.backward(norm_over_heads._OverHeads, backward)]


def _as_one(dim, sizes=(1, 1)):
    return Shard(dim)


# Fewer heads of keys and values than ranks: stored whole.
_FEW_HEADS = Case("phi3", model_kwargs=(("num_key_value_heads", 1),))


@mutant(Case("phi3"))
def gate_and_up_are_split_as_one() -> list[Patch]:
    return [(shard, "packed_shard", _as_one)]


@mutant(_FEW_HEADS)
def packed_heads_are_the_next_ranks() -> list[Patch]:
    right = Leaf.rows
    return [(Leaf, "rows", lambda self, tp, rank: right(self, tp, (rank + 1) % tp))]


@mutant(_FEW_HEADS)
def packed_heads_gradient_is_not_summed() -> list[Patch]:
    right = pairs.identity_allreduce
    return [(pairs, "identity_allreduce", lambda x, axis: x if x.dim() == 2 else right(x, axis))]


@mutant(Case("deepseek_v3"))
def latent_gradients_are_not_summed() -> list[Patch]:
    right = pairs.identity_allreduce
    return [
        (pairs, "identity_allreduce", lambda x, axis: x if x.shape == (24, 64) else right(x, axis))
    ]


@mutant(Case("gemma3"))
def scaled_embedding_forgets_its_scale() -> list[Patch]:
    # The class before it is the one that scales.
    return [(embedding, "_before", lambda kind: embedding.VocabParallelEmbedding)]


@mutant(Case("qwen3_5"))
def keys_and_values_are_split_as_one() -> list[Patch]:
    return [(shard, "packed_shard", _as_one)]


@mutant(Case("bamba"))
def state_and_time_steps_are_split_as_one() -> list[Patch]:
    return [(shard, "packed_shard", _as_one)]


@mutant(Case("qwen3_5"))
def mixer_has_the_next_ranks_rows() -> list[Patch]:
    right = OwnRows.rows
    return [(OwnRows, "rows", lambda self, tp, rank: right(self, tp, (rank + 1) % tp))]


@mutant(Case("qwen3_5"))
def gradients_of_own_rows_are_not_summed() -> list[Patch]:
    return [(OwnRowsParameters, "summed", lambda self: False)]


@mutant(Case("qwen3_next"))
def gated_norm_gradient_is_not_summed() -> list[Patch]:
    right = _install_norm

    def alone(model, path, state, partial):
        mine = path.endswith("linear_attn.norm")
        return right(model, path, state, Partial.NEVER if mine else partial)

    return [(install, "_install_norm", alone)]


@mutant(Case("gpt_oss", attn="eager"))
def sinks_are_of_other_heads() -> list[Patch]:
    right = parameters.local

    def local(p):
        x = right(p)
        return x.flip(0) if x.shape == (4,) and len(p) == 8 else x

    return [(parameters, "local", local)]


@mutant(Case("gpt_oss", attn="eager"))
def every_rank_adds_the_experts_bias() -> list[Patch]:
    def maths(*args, adds_bias):
        return experts.Maths(*args, adds_bias=True)

    return [(moe_block, "Maths", maths)]


@mutant(Case("gpt_oss", attn="eager"))
def experts_bias_is_not_weighted_in_backward() -> list[Patch]:
    right = experts.bias_gradient
    return [(experts, "bias_gradient", lambda dy, w, groups: right(dy, w.sign(), groups))]


@mutant(dropout_jobs.Case("seed_oss"), check=dropout_jobs.drops_all)
def ranks_drop_other_parts_of_a_sum() -> list[Patch]:
    right = streams.LayerDropout.go_on
    go_on = lambda self, *args, own: right(self, *args, own=True)  # noqa: E731
    return [(streams.LayerDropout, "go_on", go_on)]


@mutant(Case("gemma4"))
def routed_weights_of_own_experts_features_are_not_summed() -> list[Patch]:
    # Each rank's own part of the gradient, as if the others had none.
    wrong = mock.Mock(wraps=pairs)
    wrong.allgather_reducescatter = lambda x, _, axis: pairs.allgather_scatter(
        x, x.shape[1] * axis.size, axis
    )
    return [(layer_experts, "pairs", wrong)]


@mutant(Case("gemma4"))
def inputs_of_layers_are_the_first_tokens() -> list[Patch]:
    def own(self, x, name):
        return x[:, : -(-x.shape[1] // self.state.tp)] if name in self.names else x

    return [(block.OwnTokens, "_own", own)]


@mutant(Case("gemma4"))
def routers_of_layers_see_own_tokens_only() -> list[Patch]:
    right = pairs.identity_allreduce
    router = {(4, 64), (4,), (64,)}
    return [
        (pairs, "identity_allreduce", lambda x, axis: x if x.shape in router else right(x, axis))
    ]


@mutant(family_jobs.Case("qwen3_vl"), check=family_jobs.tables)
def pictures_have_own_tokens_gradient_only() -> list[Patch]:
    wrong = mock.Mock(wraps=pairs)
    wrong.identity_allreduce = lambda x, axis: x
    return [(forward, "pairs", wrong)]


@mutant(family_jobs.Case("qwen3_vl"), check=family_jobs.tables)
def pictures_are_added_to_the_next_ranks_tokens() -> list[Patch]:
    right = forward.DecoderBoundary._of_own_tokens

    def own(self, inputs):
        changed = right(self, inputs)
        mask = changed.get("visual_pos_masks")
        return {**changed, "visual_pos_masks": mask.roll(1, 1)} if mask is not None else changed

    return [(forward.DecoderBoundary, "_of_own_tokens", own)]


@mutant(family_jobs.Case("llama"), check=family_jobs.rows_of_all)
def row_of_the_embedding_is_of_the_rank_that_has_it() -> list[Patch]:
    right = embedding.VocabParallelEmbedding.rows

    def rows(self, ids, padding=None):
        if ids.dim():
            return right(self, ids, padding)
        with mock.patch.object(pairs, "allreduce_identity", lambda x, axis: x):
            return right(self, ids, padding)

    return [(embedding.VocabParallelEmbedding, "rows", rows)]


@mutant(family_jobs.Case("llama"), check=family_jobs.rows_of_all)
def row_of_the_embedding_has_no_gradient() -> list[Patch]:
    right = embedding.Rows.__getitem__
    none = wrongly.scaled(0.0).apply
    return [(embedding.Rows, "__getitem__", lambda self, index: none(right(self, index)))]
