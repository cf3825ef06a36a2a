"""What dropout draws its masks from on this rank: a stream of the tp group's, or one of its own.

What all ranks hold alike has to lose the same places on each: outside of the layers, without
sequence shards also between their blocks, and behind a block's row linear, whose outputs are parts
of one sum. A rank's own tokens, heads and features lose places of their own. Both streams are
states of torch's default generator, the shared one as the forward begins: checkpointing restores
it before a layer runs again, whose masks come back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_sp.comm import collectives as comm
from hf_sp.state import ParallelState
from hf_sp.torch_private import process_group


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    return torch.get_device_module(device).default_generators[device.index]


def drops(module: nn.Module) -> bool:
    """Whether a module, in training, draws random numbers: dropout, or noise on its tokens."""
    jitters = float(getattr(module, "jitter_noise", 0) or 0) > 0
    return module.training and (jitters or (isinstance(module, nn.Dropout) and module.p > 0))


class SharedStream:
    """One stream for all ranks of a tp group, however they are seeded, while a forward runs.

    Collectives: 1 all-gather of a number, in training with dropout outside of attention
    """

    def __init__(self, state: ParallelState) -> None:
        self.state = state
        self._before: list[tuple[torch.Generator, Tensor]] = []
        self._draws = self._looked = False

    def start(self, model: nn.Module) -> None:
        """Switch the default generators to it, if the model draws anything.

        Its modules are looked at in the first forwards, as everything is.
        """
        self.stop()
        state = self.state
        fake = state.tp > 1 and dist.get_backend(process_group(state.axis.group)) == "fake"
        if state.tp == 1 or fake or not model.training:
            return
        if state.checks_left["training"] > 0 or not self._looked:
            self._draws, self._looked = any(drops(m) for m in model.modules()), True
        if not (state.plan.dropout or self._draws):
            return
        device = torch.device(state.mesh.device_type)
        number = torch.randint(2**62, (1, 1)).to(device)
        seed = int(comm.all_gather(number, state.axis)[0])
        generators = {torch.default_generator}
        if device.type != "cpu":
            here = torch.device(device.type, torch.accelerator.current_device_index())
            generators.add(_generator(here))
        for generator in generators:
            self._before.append((generator, generator.get_state()))
            generator.manual_seed(seed)

    def stop(self) -> None:
        """Give the generators back as they were."""
        while self._before:
            generator, state = self._before.pop()
            generator.set_state(state)


class LocalDropout:
    """Attention dropout with masks of their own on each rank.

    Ranks hold different heads but, seeded alike by Trainer, would drop the same places of each.
    One number is drawn from the default generator, on all ranks alike; inside the block it is
    seeded with ``number + rank``, the rank among all. Checkpointing restores the default generator
    before it recomputes: the same number is drawn, and the same masks come back.
    """

    def __init__(self, state: ParallelState) -> None:
        self.state = state
        self._saved: tuple[torch.Generator, Tensor] | None = None

    def start(self, like: Tensor) -> None:
        """Switch the default generator of ``like``'s device to this rank's stream."""
        # Left over if the block was interrupted: the shared stream has to come back first.
        self.stop()
        if self.state.everyone.size == 1:
            return
        seed, generator = int(torch.randint(2**62, ())), _generator(like.device)
        self._saved = (generator, generator.get_state())
        generator.manual_seed(seed + self.state.everyone.rank)

    def stop(self) -> None:
        """Give the shared stream back."""
        if self._saved is not None:
            (generator, state), self._saved = self._saved, None
            generator.set_state(state)


class LayerDropout:
    """Hooks of a decoder layer that drops hidden states: a stream for each region of it.

    Each is seeded with a number that the shared stream gives to the layer, and with the region's,
    and this rank's where the region is its own. A block finds the layer's number in the seed of
    the stream that it is called in: a checkpoint inside of these hooks has restored that.
    """

    def __init__(self, state: ParallelState) -> None:
        self.state = state
        self._before: list[tuple[torch.Generator, Tensor]] = []
        self._number = 0

    def install(
        self, layer: nn.Module, blocks: Sequence[nn.Module], rows: Sequence[nn.Module]
    ) -> None:
        """Register the hooks: of the layer, its blocks, and the row linear of each."""
        layer.register_forward_pre_hook(self.enter, with_kwargs=True)
        layer.register_forward_hook(self.leave, prepend=True, always_call=True)
        for i, (block, row) in enumerate(zip(blocks, rows, strict=True)):
            enter_block = functools.partial(self.enter_block, 3 * i + 1)
            block.register_forward_pre_hook(enter_block, with_kwargs=True, prepend=True)
            block.register_forward_pre_hook(functools.partial(self.go_on, 3 * i + 2, own=True))
            row.register_forward_hook(functools.partial(self.go_on, 3 * i + 3, own=False))
            block.register_forward_hook(self.leave, always_call=True)

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Between the blocks: own tokens, or all ranks the same."""
        self._before.clear()
        if layer.training and self.state.everyone.size > 1:
            self._number = int(torch.randint(2**62, ()))
            self._keep(args, kwargs)
            self.go_on(0, layer, own=self.state.sharded)

    def enter_block(self, region: int, block: nn.Module, args: tuple, kwargs: Any) -> None:
        """Factors of adapters draw one mask for all ranks, as the block begins."""
        if block.training and self.state.everyone.size > 1:
            generator = self._keep(args, kwargs)
            self._number = generator.initial_seed() - self._offset(0, self.state.sharded)
            self.go_on(region, block, own=False)

    def _keep(self, args: tuple, kwargs: dict[str, Any]) -> torch.Generator:
        generator = _generator((args[0] if args else kwargs["hidden_states"]).device)
        self._before.append((generator, generator.get_state()))
        return generator

    def _offset(self, region: int, own: bool) -> int:
        everyone = self.state.everyone
        return region * (everyone.size + 1) + (1 + everyone.rank if own else 0)

    def go_on(self, region: int, *_: Any, own: bool) -> None:
        """In another region's stream; inside of what the hooks have entered."""
        if self._before:
            self._before[-1][0].manual_seed(self._number + self._offset(region, own))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The stream from before: the layer's, or the shared one."""
        if self._before:
            generator, state = self._before.pop()
            generator.set_state(state)
