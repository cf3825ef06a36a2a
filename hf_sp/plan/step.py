"""From a plan and the model's shapes to the layouts of a step, as ``parallelize`` will make it.

Told without running anything; the tests hold it to what a step sends, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from hf_sp.plan.known_forms import norm_form
from hf_sp.plan.layouts import Collective, LayerLayout, Layout, Stage, StepLayout, Tokens
from hf_sp.plan.schema import Block, Leaf, Plan


def step_layout(model: nn.Module, plan: Plan, tokens: Tokens) -> StepLayout:
    """The layouts of a step.

    Args:
        model: whose parameters have the whole shapes: on meta, or parallelized.
        plan: of that model.
        tokens: sizes of the batch.
    """
    return _Step(model, plan, tokens).layout()


class _Step:
    def __init__(self, model: nn.Module, plan: Plan, tokens: Tokens) -> None:
        self.modules, self.plan, self.tokens = dict(model.named_modules()), plan, tokens
        embedding = self.modules[plan.embedding].get_parameter("weight")
        self.hidden = embedding.shape[1]
        self.moving: Layout = "SCATTERED" if plan.sp else "FULL"
        S, tp = tokens.length, plan.tp
        self.padded = -(-S // tp) * tp
        # Whether a gradient is wanted of the hidden states here: something before is trained.
        self.wanted: bool = self._trains(embedding)

    def layout(self) -> StepLayout:
        begin, layers = self._begin(), tuple(map(self._layer, self.plan.layers))
        return StepLayout(begin, layers, self._end())

    # --- ends ------------------------------------------------------------------------------------

    def _begin(self) -> Stage:
        plan = self.plan
        # Who reads the embedding beside layer 0 is given the whole: a model around the decoder,
        # projections of it to inputs of layers.
        if plan.sp and not plan.per_token and "." not in plan.decoder:
            found = [self._sequence("forward", "reduce_scatter", "rows of the vocabulary")]
        else:
            whole = (self.tokens.batch, self.tokens.length, self.hidden)
            what, size = "rows of the vocabulary", self.tokens.itemsize
            found = [Collective("forward", "all_reduce", what, whole, size)]
        if plan.sp and self.wanted:
            found.append(self._sequence("backward", "all_gather", "gradient of the shards"))
        return Stage(plan.embedding, "embedding", "FULL", "FULL", self.moving, tuple(found))

    def _end(self) -> Stage:
        plan, t, found = self.plan, self.tokens, []
        norm = self.modules[plan.norm]
        if plan.sp:
            fused = t.fused and norm_form(norm) is not None
            found += [self._sum("norm's gradient", p, fused) for p in self._trained(norm)]
        self.wanted = self.wanted or bool(self._trained(norm))
        if plan.head is None:
            if plan.sp:
                found.append(self._sequence("forward", "all_gather", "last hidden state"))
            return Stage(plan.norm, "final norm", self.moving, self.moving, "FULL", tuple(found))
        ranks = plan.tp if plan.sp else 1
        height = self.padded // plan.tp if plan.sp else t.length
        step = max(1, t.loss_chunk // max(1, t.batch * ranks))
        wide = max(4, t.itemsize)
        for start in range(0, height, step):
            rows = min(step, height - start) * ranks * t.batch
            size = (rows, self.hidden)
            if plan.sp:
                found.append(Collective("forward", "all_gather", "a chunk", size, t.itemsize))
            stats = (plan.tp, 3, rows)
            found.append(Collective("forward", "all_gather", "its statistics", stats, wide))
            if self.wanted:
                kind: Any = "reduce_scatter" if plan.sp else "all_reduce"
                found.append(Collective("forward", kind, "its gradient", size, t.itemsize))
        what = "final norm, head and loss by chunks"
        return Stage(plan.head, what, self.moving, "FULL", "FULL", tuple(found))

    # --- layers ----------------------------------------------------------------------------------

    def _layer(self, path: str) -> LayerLayout:
        norms = [p for p in self.plan.shard_norms if p.startswith(f"{path}.")]
        blocks = [b for b in self.plan.blocks if b.path.startswith(f"{path}.")]
        # As they run: in a plan they stand as transformers' strings do.
        blocks.sort(key=lambda b: not b.attention)
        partial = [p for block in blocks for p in block.partial]
        partial += [own.module for b in blocks if b.mixer is not None for own in b.mixer.own]
        stages: list[Stage] = []
        inside: dict[str, Layout] = {"attention": self.moving, "mlp": self.moving}
        trained = [p for n in norms for p in self._trained(self.modules[n])]
        self.wanted = self.wanted or bool(trained)
        for block in blocks:
            stage = self._block(block)
            stages.append(stage)
            inside["attention" if block.attention else "mlp"] = stage.inside
        norms = norms if self.plan.sp else []
        sums = self._norms(list(dict.fromkeys([*norms, *partial])))
        if sums:
            what = "gradients of norms"
            stages.append(Stage(path, what, self.moving, self.moving, self.moving, sums))
        moving = self.moving
        ways = inside["attention"], inside["mlp"]
        return LayerLayout(path, moving, *ways, moving, moving, tuple(stages))

    def _norms(self, paths: Sequence[str]) -> tuple[Collective, ...]:
        """All of a layer together, in at least float32."""
        count = sum(p.numel() for path in paths for p in self._trained(self.modules[path]))
        what, wide = "gradients of norms together", max(4, self.tokens.itemsize)
        return (Collective("backward", "all_reduce", what, (count,), wide),) if count else ()

    def _block(self, block: Block) -> Stage:
        what = "attention" if block.attention else "MLP" if block.experts is None else "experts"
        found: list[Collective] = []
        leaves = block.leaves
        if block.experts is not None:
            router = self.modules[block.experts.router]
            found += [self._sum("router's gradient", p) for p in self._trained(router)]
            if block.experts.split == "experts":
                found += self._travel(block)
                found += self._whole(leaves)
                inner = [leaf for leaf in leaves if leaf.style != "replicated"]
                if inner:
                    self._tp_block(found, inner, [])
                self.wanted = True
                there = self.moving
                return Stage(block.path, what, there, there, there, tuple(found))
            own = [*router.parameters(), *self.modules[block.experts.path].parameters()]
        else:
            own = []
        for path in block.over_heads:
            sums = (self.tokens.batch, self.tokens.length, 1)
            name = f"sums of squares of {path.rpartition('.')[2]}"
            found.append(Collective("forward", "all_reduce", name, sums, 4))
            found.append(Collective("backward", "all_reduce", name, sums, 4))
        found += self._whole(leaves)
        found += self._shared_groups(block)
        self._tp_block(found, leaves, own)
        return Stage(block.path, what, self.moving, "FULL", self.moving, tuple(found))

    def _shared_groups(self, block: Block) -> Iterator[Collective]:
        """What a mixer's ranks make together for heads of one group, and its norm over them."""
        if block.mixer is None:
            return
        t, tp = self.tokens, self.plan.tp
        for name, segments in block.mixer.columns:
            shared = sum(count * width for count, width in segments if count % tp)
            if shared:
                size = (shared, t.length, t.batch)
                what = f"shared features of {name}"
                yield Collective("forward", "all_gather", what, size, t.itemsize)
                yield Collective("backward", "reduce_scatter", what, size, t.itemsize)
        for name, groups in block.mixer.norms:
            if groups % tp:
                size = (t.batch, t.length, groups)
                yield Collective("forward", "all_reduce", f"sums of squares of {name}", size, 4)
                yield Collective("backward", "all_reduce", f"sums of squares of {name}", size, 4)

    def _tp_block(self, found: list[Collective], leaves: Sequence[Leaf], own: list[Any]) -> None:
        """Entry and exit; ``own`` reads the gathered input beside the column linears."""
        t, sp = self.tokens, self.plan.sp
        columns = [leaf for leaf in leaves if leaf.style != "row"]
        weights = [self.modules[leaf.path].get_parameter("weight") for leaf in columns]
        if sp:
            found.append(self._sequence("forward", "all_gather", "input"))
            found.append(self._sequence("forward", "reduce_scatter", "output"))
        else:
            found.append(self._sequence("forward", "all_reduce", "output"))
        rank = t.lora * len(columns)
        inside = [p for leaf in leaves for p in self.modules[leaf.path].parameters()]
        trains = rank > 0 or any(map(self._trains, [*own, *inside]))
        if sp and (self.wanted or trains):
            found.append(self._sequence("backward", "all_gather", "gradient of the output"))
        if sp and any(map(self._trains, [*own, *weights])):
            found.append(self._sequence("backward", "all_gather", "input again"))
        width = rank + (self.hidden if self.wanted else 0)
        if width:
            kind = "reduce_scatter" if sp else "all_reduce"
            found.append(self._sequence("backward", kind, "gradient of the input", width))
        if rank:
            self._adapters(found, leaves, rank)
        self.wanted = self.wanted or trains

    def _adapters(self, found: list[Collective], leaves: Sequence[Leaf], rank: int) -> None:
        r = self.tokens.lora

        def add(what: str, shape: tuple[int, ...]) -> None:
            found.append(Collective("backward", "all_reduce", what, shape, 4))

        if self.plan.sp:
            add("gradients of A", (rank, self.hidden))
        for leaf in leaves:
            if leaf.style == "row" or leaf.rows(self.plan.tp, 0) is not None:
                name = leaf.path.rpartition(".")[2]
                add(f"gradient of {name}'s B", (leaf.shape[0], r))

    def _whole(self, leaves: Sequence[Leaf]) -> Iterator[Collective]:
        """Gradients of linears that are stored whole, of which a rank has a part."""
        for leaf in leaves:
            if leaf.rows(self.plan.tp, 0) is not None:
                for p in self._trained(self.modules[leaf.path]):
                    yield self._sum(f"gradient of {leaf.path.rpartition('.')[2]}", p)

    def _travel(self, block: Block) -> Iterator[Collective]:
        assert block.experts is not None
        router: Any = self.modules[block.experts.router]
        t, experts = self.tokens, block.experts
        rows = self.padded // self.plan.tp * t.batch * int(router.top_k)
        yield Collective("forward", "all_to_all", "rows of each expert", (experts.count,), 8)

        def move(phase: Any, what: str, *width: int) -> Collective:
            return Collective(phase, "all_to_all", what, (rows, *width), t.itemsize, varies=True)

        yield move("forward", "tokens", experts.hidden)
        yield move("forward", "weights of choices")
        yield move("forward", "outputs", experts.hidden)
        if t.router_logits:
            logits = (self.padded, t.batch, experts.count)
            yield Collective("forward", "all_gather", "router's logits", logits, t.itemsize)
        yield move("backward", "gradients of outputs", experts.hidden)
        gate_up = self.modules[experts.path].get_parameter("gate_up_proj")
        if self._trains(gate_up):
            yield move("backward", "tokens again", experts.hidden)
        yield move("backward", "gradients of weights of choices")
        yield move("backward", "gradients of tokens", experts.hidden)

    # --- small ones ------------------------------------------------------------------------------

    def _trains(self, p: nn.Parameter) -> bool:
        return p.requires_grad and not self.tokens.lora

    def _trained(self, module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module.parameters(recurse=False) if self._trains(p)]

    def _sum(self, what: str, p: nn.Parameter, wide: bool = False) -> Collective:
        size = max(4, p.element_size()) if wide else p.element_size()
        return Collective("backward", "all_reduce", what, tuple(p.shape), size)

    def _sequence(self, phase: Any, kind: Any, what: str, width: int = 0) -> Collective:
        """Of hidden states; sequence-major and padded, where they are sharded."""
        t, width = self.tokens, width or self.hidden
        shape = (self.padded, t.batch) if self.plan.sp else (t.batch, t.length)
        return Collective(phase, kind, what, (*shape, width), t.itemsize)
