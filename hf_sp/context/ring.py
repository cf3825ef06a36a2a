"""Ring attention: keys and values travel to the queries, place by place, and their gradients back.

A place of the ring has two stretches of the sequence (``comm/parts.py``). In hop h it gets keys and
values straight from the place h before it; only stretches that one of its queries sees, of which
both know. Attentions over some keys are joined by their log-sum-exp. What a stretch of queries sees
of a stretch of keys is all, nothing, or the causal diagonal; else rows are cut into tiles.

Shape letters: B batch, R tokens of this rank's place, a query heads, c key/value heads here, D and
E features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.comm.parts import Parts
from hf_sp.context.masks import Mask
from hf_sp.torch_attention import attention, attention_backward

TILE_ROWS = 1024
"""Queries of a tile, where a stretch of them is cut."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries and keys that one kernel attends with: places in what is here, and how many."""

    query: int
    n: int
    key: int
    m: int
    causal: bool = False
    masked: tuple[int, int] | None = None  # the first query's and key's place in the sequence


@dataclass(frozen=True, slots=True)
class Hop:
    """What travels in a hop, and what is done with it.

    Args:
        number: from how many places before this one the keys come; 0 is its own.
        receive: rows of keys and values from each place.
        send: and to each.
        sent: the stretches that are sent: places in this rank's own, and how many.
        tiles: of own queries, and of keys that have arrived.
    """

    number: int
    receive: list[int]
    send: list[int]
    sent: list[tuple[int, int]]
    tiles: list[Tile]


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, S: int, parts: Parts
) -> Tensor:
    """Attention of the tokens of this rank's place over the whole sequence.

    Shapes:   q [B, a, R, D], k [B, c, R, D], v [B, c, R, E] -> [B, R, a, E]; R is the number of
              real tokens that the place has
    Forward:  for each hop that somebody needs 1 all-to-all of ``[rows, B, c (D + E)]``, in flight
              beside the attention of the hop before
    Backward: these again, and as many back with the gradients
    Saves:    q, k, v, the output and its log-sum-exp in float32
    Dtypes:   outputs are joined, and gradients summed, in float32; of float64 in float64
    Source:   Liu et al. 2023, arXiv:2310.01889; the order of stretches: Brandon et al. 2023,
              arXiv:2311.09431
    """
    assert parts.outer is not None
    key = S, parts.ring, parts.axis.size
    hops = mask.known.get(key)
    if hops is None:
        hops = mask.known[key] = list(hops_of(mask, S, parts))
    return _Ring.apply(mask, hops, parts.outer, scale, q, k, v)


def hops_of(mask: Mask, S: int, parts: Parts) -> Iterator[Hop]:
    """The hops in which somebody gets something, that of the own stretches first."""
    assert parts.outer is not None
    size, me = parts.ring, parts.outer.rank
    every = [parts.stretches(S, place) for place in range(size)]

    def wanted(reader: int, owner: int) -> list[int]:
        own = every[reader]
        return [i for i, key in enumerate(every[owner]) if any(mask.meets(*q, *key) for q in own)]

    for h in range(size):
        source, target = (me - h) % size, (me + h) % size
        if h and not any(wanted(reader, (reader - h) % size) for reader in range(size)):
            continue
        read = wanted(me, source) if h else range(2)
        given = wanted(target, me) if h else ()
        starts = 0, every[me][0][1]
        sent = [(starts[i], every[me][i][1]) for i in given]
        receive, send = [0] * size, [0] * size
        receive[source] = sum(every[source][i][1] for i in read) if h else 0
        send[target] = sum(n for _, n in sent)
        tiles: list[Tile] = []
        key = 0
        for i in read:
            for query, own in zip(starts, every[me], strict=True):
                tiles += tiles_of(mask, query, own, key, every[source][i])
            key += every[source][i][1]
        yield Hop(h, receive, send, sent, tiles)


def tiles_of(
    mask: Mask, query: int, queries: tuple[int, int], key: int, keys: tuple[int, int]
) -> Iterator[Tile]:
    """What is computed of a stretch of queries and one of keys, whose places here are given."""
    (q0, n), (k0, m) = queries, keys
    if not mask.meets(q0, n, k0, m):
        return
    whole = mask.seen(q0, n)
    if whole is not None and whole.inner_first <= k0:
        if whole.inner_last >= k0 + m - 1:
            yield Tile(query, n, key, m)
            return
        if queries == keys and whole.diagonal:
            yield Tile(query, n, key, m, causal=True)
            return
    for row in range(0, n, TILE_ROWS):
        rows = min(TILE_ROWS, n - row)
        found = mask.seen(q0 + row, rows)
        if found is None:
            cuts = [(k0, k0 + m, True)]
        else:
            # What some see, with what all see in the middle of it.
            begin, end = max(found.first, k0), min(found.last + 1, k0 + m)
            inner = max(found.inner_first, begin), min(found.inner_last + 1, end)
            inner = inner if inner[0] < inner[1] else (end, end)
            cuts = [(begin, inner[0], True), (*inner, False), (inner[1], end, True)]
        for first, last, masked in cuts:
            if first < last:
                place = (q0 + row, first) if masked else None
                yield Tile(query + row, rows, key + first - k0, last - first, masked=place)


class _Ring(Node):
    @staticmethod
    def forward(
        ctx: Any,
        mask: Mask,
        hops: list[Hop],
        axis: Axis,
        scale: float,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        B, a, R, _ = q.shape
        out = q.new_zeros((B, R, a, v.shape[-1]), dtype=wide).transpose(1, 2)
        lse = q.new_full((B, a, R), float("-inf"), dtype=wide)
        for hop, (key, value) in _travelling(hops, axis, k, v):
            for tile in hop.tiles:
                part = _rows(tile, q), _keys(tile, key), _keys(tile, value)
                found = attention(*part, _added(mask, tile, q), tile.causal, scale)
                _merge(_rows(tile, out), lse.narrow(2, tile.query, tile.n), *found)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = mask, hops, axis, scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        mask, hops, axis, scale = ctx.how
        dout = grads[0].transpose(1, 2)
        # Of who has seen nothing: any finite number makes its weights zero.
        lse = lse.masked_fill(lse == float("-inf"), 0)
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        back: list[tuple[Hop, Tensor]] = []

        def land() -> None:
            if not back:
                return
            hop, rows = back.pop()
            found, place = _unpacked(comm.wait(rows), k, v), 0
            for start, n in hop.sent:
                for total, one in zip((dk, dv), found, strict=True):
                    total.narrow(2, start, n).add_(one.narrow(2, place, n))
                place += n

        for hop, (key, value) in _travelling(hops, axis, k, v):
            own = hop is hops[0]
            sums = (dk, dv) if own else [torch.zeros_like(x, dtype=lse.dtype) for x in (key, value)]
            for tile in hop.tiles:
                part = _rows(tile, q), _keys(tile, key), _keys(tile, value), _rows(tile, out)
                saved = *part, lse.narrow(2, tile.query, tile.n).contiguous()
                how = _added(mask, tile, q), tile.causal, scale
                found = attention_backward(_rows(tile, dout), *saved, *how)
                _rows(tile, dq).add_(found[0])
                for total, one in zip(sums, found[1:], strict=True):
                    _keys(tile, total).add_(one)
            land()
            if not own:
                back.append((hop, _given_back(hop, axis, *(x.to(k.dtype) for x in sums))))
        land()
        return None, None, None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _travelling(
    hops: list[Hop], axis: Axis, k: Tensor, v: Tensor
) -> Iterator[tuple[Hop, tuple[Tensor, Tensor]]]:
    """Each hop with the keys and values that it has brought; the next is in flight by then."""
    arriving: Tensor | None = None
    for i, hop in enumerate(hops):
        here = (k, v) if arriving is None else _unpacked(comm.wait(arriving), k, v)
        if i + 1 < len(hops):
            after = hops[i + 1]
            stretches = [(k.narrow(2, *one), v.narrow(2, *one)) for one in after.sent]
            rows = [_packed(*one) for one in stretches or [(k[:, :, :0], v[:, :, :0])]]
            sent = torch.cat(rows) if len(rows) > 1 else rows[0]
            arriving = comm.launch_all_to_all(sent, after.receive, after.send, axis)
        yield hop, here


def _given_back(hop: Hop, axis: Axis, dk: Tensor, dv: Tensor) -> Tensor:
    """Gradients of what a hop has brought, on their way to whose keys and values these are."""
    return comm.launch_all_to_all(_packed(dk, dv), hop.send, hop.receive, axis)


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """``[B, c, rows, D]`` and ``[B, c, rows, E]`` -> ``[rows, B, c (D + E)]``."""
    return torch.cat([x.permute(2, 0, 1, 3).flatten(2) for x in (k, v)], -1)


def _unpacked(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The other way, with heads and features as of k and v; views."""
    widths = [x.shape[1] * x.shape[3] for x in (k, v)]
    found = [
        part.unflatten(-1, (x.shape[1], x.shape[3])).permute(1, 2, 0, 3)
        for part, x in zip(rows.split(widths, -1), (k, v), strict=True)
    ]
    return found[0], found[1]


def _rows(tile: Tile, x: Tensor) -> Tensor:
    return x.narrow(2, tile.query, tile.n)


def _keys(tile: Tile, x: Tensor) -> Tensor:
    return x.narrow(2, tile.key, tile.m)


def _added(mask: Mask, tile: Tile, like: Tensor) -> Tensor | None:
    if tile.masked is None:
        return None
    query, key = tile.masked
    return mask.tile(query, tile.n, key, tile.m, like)


def _merge(out: Tensor, lse: Tensor, more: Tensor, its_lse: Tensor) -> None:
    """Join an attention over other keys into ``out`` and ``lse``, in place."""
    joined = torch.logaddexp(lse, its_lse)
    # Of who has seen nothing yet all three are -inf.
    base = joined.masked_fill(joined == float("-inf"), 0)
    weight, other = (lse - base).exp_(), (its_lse - base).exp_()
    out.mul_(weight[..., None]).add_(more * other[..., None])
    lse.copy_(joined)
