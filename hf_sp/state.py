"""What one parallelized model knows about itself, and the small state of its current forward.

It hangs on the model (``parallel_state(model)``) and on the modules that need it, is copied with
them, and holds no tensor between two forwards but a few counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from hf_sp.comm import collectives as comm
from hf_sp.comm.collectives import Axis
from hf_sp.comm.degrees import Degrees
from hf_sp.comm.parts import Parts
from hf_sp.plan.schema import Plan
from hf_sp.torch_private import process_group

Recompute = Literal["none", "norm", "norm+act"]
Checkpoint = Literal["hf", "dcp"]
# Forwards of each kind in which all that is known of the inputs is compared over the ranks.
CHECKS, KINDS = 8, ("training", "evaluation", "decoding")
ATTRIBUTE = "_hf_sp_state"


@dataclass
class ParallelState:
    """The parallel side of one model."""

    mesh: DeviceMesh  # 1-D, its axis is named tp
    axis: Axis  # the same as plain data, for the collectives
    whole: DeviceMesh  # all ranks that hold a part of the model: of tp, and of data parallelism
    everyone: Axis  # these ranks as one axis
    sp: bool  # hidden states between blocks are sequence shards
    plan: Plan
    keep_logits: bool  # a training forward with labels also returns logits
    loss_chunk: int  # tokens per chunk of the LM head's loss
    kernels: bool  # run Triton kernels where they can
    recompute: Recompute  # what is made again in backward instead of being saved
    # What FSDP was given: dtypes to compute and to reduce in, where shards are kept.
    mp_policy: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    offload_policy: OffloadPolicy = field(default_factory=OffloadPolicy)
    offload: bool = False  # inputs of checkpointed layers wait in the host's memory
    mlp_tile: int | None = None  # tokens of a shard that an MLP runs on at a time
    checkpoint: Checkpoint = "hf"  # what Trainer's checkpoints hold
    degrees: Degrees = field(default_factory=lambda: Degrees(1))
    # How the sequence is cut over context parallel ranks, None without them.
    parts: Parts | None = None
    peers: tuple[str, ...] = ()  # process groups over the groups with batches of their own
    # Forwards in which that is still done, by kind of forward; later ones compare digests.
    checks_left: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, CHECKS))

    # The rest is of the current forward; a copy starts without.
    # It decodes a token, or fills a cache with few: plain TP, nothing is scattered.
    few_tokens: bool = field(default=False, init=False)
    # With context parallel ranks: each of them runs it on the whole sequence (it fills a cache).
    uncut: bool = field(default=False, init=False)
    # Length of the sequence, or of the part of it that is cut, while the decoder runs, else None.
    length: int | None = field(default=None, init=False)
    # And of all of it.
    whole_length: int = field(default=0, init=False)
    # Inside the forward of the whole model, where the LM head may return lazy logits.
    in_model: bool = field(default=False, init=False)
    # What the final norm returns there: all ranks' hidden states, or, where only the head meets
    # them, this rank's sequence shard.
    final_hidden: Literal["gathered", "shard"] = field(default="gathered", init=False)
    # Whole length of that shard, from when it was returned to the end of the forward.
    final_length: int | None = field(default=None, init=False)
    # Tokens of each expert in the latest forward, by the path of the experts; of this rank's own
    # tokens where experts are split whole.
    load: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    # The layer whose norms' gradients are summed next, and the ports their sums go to.
    delivered: tuple[Any, Any] = field(default=(None, None), init=False, repr=False)
    # Whether anyone reads the logits of a forward with labels in eval.
    logits_wanted: bool = field(default=True, init=False)

    @property
    def tp(self) -> int:
        """Tensor parallel degree."""
        return self.axis.size

    @property
    def rank(self) -> int:
        """This rank's place on the tp axis."""
        return self.axis.rank

    @property
    def data(self) -> int:
        """Data parallel degree: groups of tp and cp ranks with a batch of their own."""
        return self.everyone.size // self.group_size

    @property
    def group_size(self) -> int:
        """Ranks that are given the same batch."""
        return self.axis.size * (1 if self.parts is None else self.parts.axis.size)

    @property
    def fsdp(self) -> bool:
        """Whether FSDP shards the weights."""
        return self.everyone.size > self.axis.size

    @property
    def cut(self) -> Parts | None:
        """How the current forward's sequence is cut over context parallel ranks, if it is."""
        return None if self.parts is None or self.uncut else self.parts

    @property
    def offloaded(self) -> bool:
        """Whether parameters wait on the CPU, whatever device computes."""
        return isinstance(self.offload_policy, CPUOffloadPolicy)

    @property
    def spread(self) -> bool:
        """Whether experts are split over data parallel ranks too."""
        return self.plan.ep > self.tp

    @property
    def expert_axis(self) -> Axis:
        """The ranks that whole experts are split over."""
        return self.everyone if self.spread else self.axis

    @property
    def group(self) -> ProcessGroup:
        """The tp process group."""
        return self.mesh.get_group()

    @property
    def all_ranks(self) -> ProcessGroup:
        """The process group of ``everyone``."""
        return process_group(self.everyone.group)

    @property
    def fused(self) -> bool:
        """Whether norms and MLPs of a known form run hf_sp's functions instead of their own."""
        return self.kernels or self.recompute != "none"

    @property
    def sharded(self) -> bool:
        """Whether hidden states of the current forward are sequence shards."""
        return self.sp and not self.few_tokens

    @property
    def takes_own_tokens(self) -> bool:
        """Whether a decoder is running whose first layer takes this rank's tokens of the whole."""
        return self.length is not None and (self.sharded or self.cut is not None)

    def expert_load(self) -> dict[str, Tensor]:
        """Tokens that each expert was given in the latest forward, ``[E]`` by the experts' path.

        To be called on every rank. Padding up to a multiple of tp is not counted; what the
        attention mask hides is, as it is routed too. With data parallel ranks: of this rank's
        batch, or of all batches if ep spans them.

        Collectives: with whole experts on each rank, 1 all-reduce for each sparse layer; with
        context parallel ranks another.
        """
        axes = [] if self.plan.ep == 1 else [self.expert_axis]
        axes += [] if self.parts is None else [self.parts.axis]
        load = {path: counts.clone() for path, counts in self.load.items()}
        for axis in axes:
            load = {path: comm.all_reduce(counts, axis) for path, counts in load.items()}
        return load

    @contextlib.contextmanager
    def no_logits(self) -> Iterator[None]:
        """Forwards with labels inside return ``logits=None``, in eval too."""
        wanted, self.logits_wanted = self.logits_wanted, False
        try:
            yield
        finally:
            self.logits_wanted = wanted

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelState:
        # The mesh is a handle on process groups, shared like them.
        copy = dataclasses.replace(self, checks_left=dict(self.checks_left))
        memo[id(self)] = copy
        return copy


def parallel_state(model: nn.Module | None) -> ParallelState | None:
    """The state of a parallelized model, None for any other; sees through wrappers."""
    holder = parallel_model(model)
    return None if holder is None else holder.__dict__[ATTRIBUTE]


def parallel_model(model: nn.Module | None) -> nn.Module | None:
    """The transformers model that was parallelized, inside of whatever holds it; else None.

    Looks at the model itself, then through ``.module`` (DDP, compiled), ``base_model`` and
    ``.model`` (adapters), so that it can be asked of whatever a Trainer holds.
    """
    seen: set[int] = set()
    while isinstance(model, nn.Module) and id(model) not in seen:
        seen.add(id(model))
        if model.__dict__.get(ATTRIBUTE) is not None:
            return model
        held = (model._modules.get(n) for n in ("module", "_orig_mod", "base_model", "model"))
        model = next((inner for inner in held if inner is not None), None)
    return None
