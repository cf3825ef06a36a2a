"""Whole models from a few of their layers: counts of deep models in seconds.

Layers that are alike add alike, so a count is a line in their number. All but one: in backward the
activations of a layer go and its gradients come, and the peak is at one end or the other: the
larger of two lines, whose slopes are known. Where three counts do not show which, or layers differ,
the whole model is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, fields, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_sp.commands.rank import Run, build_on_meta, count, with_layers
from hf_sp.estimate import CollectiveCount, Kinds, TrainingCount

FEW = (3, 4, 5)
MORE = (10, 11, 12)
# By the config's text: counts of so many layers, and whether the layers are alike.
_COUNTED: dict[tuple[str, int, Run], TrainingCount] = {}
_ALIKE: dict[str, bool] = {}
LONGEST = 2**24
"""Tokens beyond which nobody looks whether a row fits."""


def count_whole(config: PreTrainedConfig, run: Run) -> TrainingCount:
    """``count``, of few layers where that is the same.

    Raises:
        ConfigError, PlanError: as ``parallelize``; or transformers has no causal LM of the config.
    """
    layers = int(config.get_text_config().num_hidden_layers)
    for few in (FEW, MORE):
        if layers <= sum(few) or not _alike(config):
            break
        small, middle, large = (_count(config, n, run) for n in few)
        slope = _difference(large, middle)
        if not _same(slope, _difference(middle, small)):
            break
        # The line that is seen has the larger slope of the two: no other meets it further on.
        if slope.peaks["backward"] - slope.held >= max(slope.kept, slope.gradients):
            return _plus(large, slope, layers - few[-1])
    return count(config, run)


def layer_collectives(config: PreTrainedConfig, run: Run) -> dict[str, dict[str, CollectiveCount]]:
    """Collectives of one layer, by phase and kind: the fourth, or behind each of all kinds."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or [""]
    before = max(FEW[0], *(kinds.index(kind) + 1 for kind in {*kinds}))
    less, more = (_count(config, n, run) for n in (before, before + 1))
    found = _difference(more, less).collectives
    return {phase: {k: c for k, c in of.items() if c.calls} for phase, of in found.items()}


def longest(config: PreTrainedConfig, run: Run, capacity: int, peak: int | None = None) -> int:
    """The most tokens a row may have for the peak to stay within `capacity` bytes; 0: none.

    At most `LONGEST`, and a multiple of 1024 and tp. The peak is the largest of several lines in
    the number of tokens, and so convex: the line through two counts says where to look, and beyond
    them the peak rises at least as fast. ``peak`` is of the run itself, where that is known.
    """
    step = 1024 * run.tp
    most = max(1, LONGEST // step)

    def peak_at(steps: int) -> int:
        if peak is not None and steps * step == run.seq:
            return peak
        return count_whole(config, replace(run, seq=steps * step)).peak

    return _last_below(peak_at, capacity, max(1, run.seq // step), most) * step


def _last_below(value: Callable[[int], int], limit: int, start: int, most: int) -> int:
    """The last n from 1 to ``most`` whose value, convex and rising, is within a limit; 0: none."""
    seen: dict[int, int] = {}
    at, low, high = min(start, most), 0, most + 1
    while high - low > 1:
        found = seen[at] = value(at)
        low, high = (at, high) if found <= limit else (low, at)
        below = sorted(n for n in seen if n <= low)
        if len(below) > 1:
            # A chord's slope, and past it the value rises no slower.
            first, last = below[-2:]
            rise = (seen[last] - seen[first]) / (last - first)
            high = min(high, low + int((limit - seen[last]) / rise) + 1) if rise > 0 else high
        at = _next(seen, limit, low, high, at)
    return low


def _next(seen: Mapping[int, int], limit: int, low: int, high: int, at: int) -> int:
    """Where the line through the last two counts meets the limit, inside of the bounds."""
    if len(seen) < 2:
        ahead = 2 * at if seen[at] <= limit else at // 2
    else:
        before, last = list(seen)[-2:]
        slope = (seen[last] - seen[before]) / (last - before)
        ahead = last + int((limit - seen[last]) // slope) if slope > 0 else (low + high) // 2
    return min(max(ahead, low + 1), high - 1)


def _count(config: PreTrainedConfig, layers: int, run: Run) -> TrainingCount:
    """The count of so many layers, made once."""
    key = config.to_json_string(use_diff=False), layers, run
    if key not in _COUNTED:
        _COUNTED[key] = count(with_layers(config, layers), run)
    return _COUNTED[key]


def _alike(config: PreTrainedConfig) -> bool:
    """Whether all layers from the third on are made of the same modules and weights."""
    key = config.to_json_string(use_diff=False)
    if key not in _ALIKE:
        _ALIKE[key] = _look(config)
    return _ALIKE[key]


def _look(config: PreTrainedConfig) -> bool:
    model: Any = build_on_meta(config, torch.bfloat16)
    layers: Any = next((m.layers for m in model.modules() if hasattr(m, "layers")), [])
    found = set()
    for layer in list(layers)[FEW[0] - 1 :]:
        kinds = tuple((name, type(m)) for name, m in layer.named_modules())
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        found.add((kinds, shapes))
    return len(found) == 1


def _same(a: TrainingCount, b: TrainingCount) -> bool:
    """To a few numbers that torch makes when it first runs something."""
    off = _difference(a, b)
    numbers = [off.held, off.gradients, off.kept, off.host, *off.peaks.values()]
    kinds = [n for kinds in off.kinds_at.values() for n in astuple(kinds)]
    return all(abs(n) <= 64 for n in numbers + kinds) and a.collectives == b.collectives


def _difference(a: TrainingCount, b: TrainingCount) -> TrainingCount:
    return _combined(a, b, lambda x, y: x - y, lambda x, y: x - y)


def _plus(a: TrainingCount, slope: TrainingCount, times: int) -> TrainingCount:
    def collectives(x: CollectiveCount, y: CollectiveCount) -> CollectiveCount:
        return CollectiveCount(x.calls + times * y.calls, x.bytes + times * y.bytes)

    return _combined(a, slope, lambda x, y: x + times * y, collectives)


def _combined(
    a: TrainingCount, b: TrainingCount, number: Callable[[int, int], int], collective: Any
) -> TrainingCount:
    """Number by number."""
    names = [f.name for f in fields(Kinds)]
    none = CollectiveCount()
    return TrainingCount(
        number(a.held, b.held),
        number(a.gradients, b.gradients),
        number(a.kept, b.kept),
        number(a.host, b.host),
        {phase: number(x, b.peaks[phase]) for phase, x in a.peaks.items()},
        {
            phase: Kinds(*(number(getattr(x, n), getattr(b.kinds_at[phase], n)) for n in names))
            for phase, x in a.kinds_at.items()
        },
        {
            phase: {
                kind: collective(kinds.get(kind, none), b.collectives[phase].get(kind, none))
                for kind in {**kinds, **b.collectives[phase]}
            }
            for phase, kinds in a.collectives.items()
        },
    )
