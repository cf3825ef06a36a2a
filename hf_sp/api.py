"""``parallelize``: the one line.

Everything is checked, and agreed on by all ranks, before the model is touched; what follows cannot
fail for a reason that the user could have caused.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sp import checks, checks_fsdp, integrations
from hf_sp.comm.collectives import Axis
from hf_sp.comm.degrees import Degrees, ranks_of_node, resolve_degrees
from hf_sp.comm.mesh import Mesh, build_mesh
from hf_sp.comm.parts import Parts
from hf_sp.errors import HfSpError
from hf_sp.install import install
from hf_sp.model.fsdp import shard_over_data
from hf_sp.model.shard import agree_on_weights, placements, report_taken, shard_parameters
from hf_sp.plan import Plan, derive_plan
from hf_sp.plan.known_forms import check_sparse_blocks
from hf_sp.state import ATTRIBUTE, Checkpoint, ParallelState, Recompute

logger = logging.getLogger(__name__)

CpMode = Literal["ulysses", "ring", "hybrid"]  # None chooses
Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    tp: int | None = None,
    sp: bool = True,
    *,
    cp: int = 1,
    cp_mode: CpMode | None = "ulysses",
    cp_ulysses: int | None = None,
    ep: int = 1,
    dp_shard: int | None = None,
    dp_replicate: int = 1,
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, str] | None = None,
    keep_logits: bool = False,
    loss_chunk: int = 4096,
    kernels: bool = True,
    recompute: Recompute | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    checkpoint: Checkpoint = "hf",
) -> Model:
    """Give an unmodified Hugging Face decoder Megatron's tensor + sequence parallelism, in place.

    Call it on every rank, with the same whole model, before the optimizer and the Trainer are made.
    Ranks that built different weights get those of the first rank, as under DDP.

    Args:
        model: a transformers causal LM (or its decoder, or a classifier over it) on CPU or GPU,
            or a ``PeftModel`` with LoRA adapters over one.
        tp: tensor parallel degree. Default: accelerate's ``PARALLELISM_CONFIG_TP_SIZE``, else all
            ranks that the data parallel degrees leave.
        sp: shard hidden states between the blocks along the sequence, over the same tp ranks.
            ``False`` is plain Megatron tensor parallelism.
        cp: context parallel degree: ranks that have a part of the sequence each, which tp cuts
            further. Each is given the whole batch. FSDP2 shards weights and optimizer state over
            these ranks too.
        cp_mode: how these exchange what attention needs. ``"ulysses"``: all tokens of some heads
            for some tokens of all heads, and back; cp divides a tp rank's query heads.
            ``"ring"``: keys and values go around. ``"hybrid"``: a ring of neighbouring ranks that
            exchange heads. ``None`` chooses: heads as far as they and the machine allow, a ring
            beyond.
        cp_ulysses: of ``"hybrid"``, how many ranks exchange heads. Default: as many as can.
        ep: expert parallel degree of mixture-of-experts layers. 1: each rank has a part of the
            features of every expert and the blocks gather and scatter as dense ones do. ``tp``:
            each rank has ``E / ep`` whole experts, and the tokens of its sequence shard travel to
            their experts and back. ``tp*dp_shard``: also over the data parallel ranks.
        dp_shard: data parallel groups of tp ranks, each with a batch of its own, over which FSDP2,
            applied here, shards weights and optimizer state. Gradients are the groups' mean.
        dp_replicate: groups of these that hold the same weights (hybrid sharding).
        mesh: a DeviceMesh to use instead of building one, with axes named ``tp`` and, before it,
            ``dp_shard`` and ``dp_replicate``.
        plan: plan strings to use instead of ``model.tp_plan``, e.g.
            ``{"model.layers.*.self_attn.q_proj": "colwise", ...}``.
        keep_logits: return whole logits from training forwards with labels too. By default the
            chunked loss never makes them and ``logits`` is None there.
        loss_chunk: tokens per chunk of that loss.
        kernels: run the loss, and RMS norms and gated SiLU MLPs whose forward's text is known, in
            Triton kernels on a GPU (the same numbers in torch operations elsewhere).
        recompute: what backward makes again instead of keeping it; bytes a token and layer with
            C for attention, t = tp, under ``sp``:

            - ``"none"``: ``(8h + 8)/t + C + 6f/t``; with ``kernels=False`` HF's own modules run
              untouched, ``(16h + 8)/t + C + 8f/t``
            - ``"norm"``: norm outputs, ``(4h + 8)/t + C + 6f/t``
            - ``"norm+act"``: and ``silu(gate) * up``, ``(4h + 8)/t + C + 4f/t``

            Default: ``"norm+act"``; ``"none"`` with ``kernels=False``. It costs elementwise passes.
        mp_policy: with data parallel groups, FSDP2's mixed precision, e.g.
            ``MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)``: the
            optimizer has the weights in their own dtype, layers gather and compute in bfloat16.
            ``output_dtype`` is what the model returns.
        offload_policy: with data parallel groups, ``CPUOffloadPolicy()``: weights, gradients and
            optimizer state wait on the CPU, and the optimizer steps there.
        checkpoint: what Trainer's checkpoints hold. ``"hf"``: the whole model as transformers
            loads it, written while training waits. ``"dcp"``: each rank's shards, which
            ``torch.distributed.checkpoint`` reads, written by a thread while training goes on;
            ``python -m hf_sp.consolidate`` makes a plain checkpoint of it.

    Returns:
        The same object. Its parameters are DTensors on a mesh axis named ``tp`` (and on the data
        parallel axes); their names are unchanged, and ``full_tensor()`` of one or of its gradient
        is the unsharded model's.

    Collectives per decoder layer and step with ``sp``: 6 all-gathers and 4 reduce-scatters, and one
    small all-reduce of its norms' gradients. Without ``sp``: 4 all-reduces. With data or context
    parallel ranks FSDP's: 2 all-gathers of the layer's weights, 1 reduce-scatter. With ``cp``: 4
    all-to-alls; of a ring of R places at most 3 (R - 1) more, or instead.

    Raises:
        ConfigError: an argument, the environment or the model's state does not allow it.
        PlanError: the model cannot be split, or not by this tp; legal values are listed.
    """
    resolved: Plan | None = None
    degrees: Degrees | None = None
    problem: HfSpError | None = None
    try:
        sizes = {"tp": tp, "cp": cp, "ep": ep, "dp_shard": dp_shard, "dp_replicate": dp_replicate}
        sizes["cp_ulysses"] = cp_ulysses
        switches = {"sp": sp, "keep_logits": keep_logits, "kernels": kernels}
        ways = (None, *get_args(Recompute))
        choices: dict[str, tuple[str | None, tuple[str | None, ...]]] = {
            "cp_mode": (cp_mode, (*get_args(CpMode), None)),
            "recompute": (recompute, ways),
            "checkpoint": (checkpoint, get_args(Checkpoint)),
        }
        checks.check_arguments({"loss_chunk": loss_chunk, **sizes}, switches, choices)
        checks.check_environment()
        checks.check_other_sequence_parallelism()
        checks.check_model(model)
        integrations.check_adapters(model)
        degrees = resolve_degrees(tp, dp_shard, dp_replicate, mesh, cp)
        checks_fsdp.check_policies(mp_policy, offload_policy, degrees, ep)
        reach = degrees.dp_shard if degrees.dp_replicate * degrees.cp == 1 else 1
        with integrations.without_adapters(model) as whole:
            exchange = checks.check_exchange(cp_mode, cp_ulysses, ranks_of_node())
            how = degrees.tp, sp, plan, ep, reach, degrees.cp, exchange
            resolved = _checked_plan(whole, *how)
        degrees = dataclasses.replace(degrees, ring=resolved.ring)
        checks_fsdp.check_data_parallel(model, resolved, degrees)
        checks.check_optimizers(model)
    except HfSpError as error:
        problem = error
    options = f"{degrees} {keep_logits=} {loss_chunk=} {kernels=} {recompute=}"
    options += f" {mp_policy=} {offload_policy=} {checkpoint=}"
    settings = {"plan": f"{resolved}", "options": options, **checks.describe_tensors(model)}
    checks.agree(mesh, problem, settings)
    assert resolved is not None
    assert degrees is not None
    ranks = build_mesh(degrees, mesh)
    checks.check_devices(model, ranks.tp)
    checks_fsdp.check_backends(offload_policy)
    state = ParallelState(
        mesh=ranks.tp,
        axis=Axis.of(ranks.tp),
        whole=ranks.whole,
        everyone=ranks.everyone,
        sp=sp,
        plan=resolved,
        keep_logits=keep_logits,
        loss_chunk=loss_chunk,
        kernels=kernels,
        recompute=recompute or ("norm+act" if kernels else "none"),
        mp_policy=mp_policy or MixedPrecisionPolicy(),
        offload_policy=offload_policy or OffloadPolicy(),
        checkpoint=checkpoint,
        degrees=degrees,
        parts=None if ranks.cp is None else _parts(ranks, degrees, sp),
        peers=ranks.peers,
    )
    with integrations.without_adapters(model) as whole:
        taken = agree_on_weights(whole, state.everyone, state.mesh.device_type)
        shard_parameters(whole, resolved, state)
        install(whole, state)
        setattr(whole, ATTRIBUTE, state)
        integrations.install(whole)
    if ranks.data is not None:
        # With the adapters, which are back.
        shard_over_data(whole, state, ranks.data)
    if state.everyone.rank == 0:
        logger.info("%s", resolved)
    report_taken(taken, state)
    return model


def _parts(ranks: Mesh, degrees: Degrees, sp: bool) -> Parts:
    assert ranks.cp is not None
    multiple = degrees.tp if sp else 1
    return Parts(ranks.cp, multiple, degrees.ring, ranks.inner, ranks.outer)


def _checked_plan(model: nn.Module, *how: Any) -> Plan:
    plan = derive_plan(model, *how)
    placements(model, plan)
    check_sparse_blocks(model, plan)
    return plan


@dataclass(frozen=True, slots=True)
class Support:
    """Whether ``parallelize`` takes a model: true with the plan, or false with the reason.

    Attributes:
        plan: what it would do; None if it refuses.
        reason: the refusal, as ``parallelize`` says it; "" if it does not refuse.
    """

    plan: Plan | None
    reason: str = ""

    def __bool__(self) -> bool:
        return self.plan is not None

    def __str__(self) -> str:
        return self.reason or str(self.plan)


def supports(
    name_or_config: Any,
    tp: int = 8,
    sp: bool = True,
    *,
    ep: int = 1,
    cp: int = 1,
    cp_mode: CpMode | None = "ulysses",
    cp_ulysses: int | None = None,
    plan: Mapping[str, str] | None = None,
    model_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> Support:
    """Whether a model can be parallelized, without weights, ranks or a launch.

    Args:
        name_or_config: a model's name or folder, of which the config is read, or its config.
        tp: as in ``parallelize``, as are ``sp``, ``ep`` and ``plan``.
        sp: shard the sequence.
        ep: expert parallel degree.
        cp: context parallel degree.
        cp_mode: how these ranks attend; machines are taken to be as large as need be.
        cp_ulysses: of ``"hybrid"``, how many exchange heads.
        plan: plan strings to use instead of the model's own.
        model_class: whose ``from_config`` builds the model, on meta.
        **kwargs: of ``AutoConfig.from_pretrained``, for a name.

    Returns:
        True with the plan, or False with the reason. What only the weights, the environment or the
        adapters of a run could make ``parallelize`` refuse is not looked at.
    """
    config = name_or_config
    if not hasattr(config, "get_text_config"):
        config = AutoConfig.from_pretrained(config, **kwargs)
    with torch.device("meta"):
        model = model_class.from_config(config)
    try:
        sizes = {"tp": tp, "ep": ep, "cp": cp, "cp_ulysses": cp_ulysses}
        modes = {"cp_mode": (cp_mode, (*get_args(CpMode), None))}
        checks.check_arguments(sizes, {"sp": sp}, modes)
        checks.check_model(model)
        exchange = checks.check_exchange(cp_mode, cp_ulysses, 0)
        return Support(_checked_plan(model, tp, sp, plan, ep, 1, cp, exchange))
    except HfSpError as error:
        return Support(None, f"{type(error).__name__}: {error}")
