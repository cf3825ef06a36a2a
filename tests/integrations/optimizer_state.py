"""Job: optimizer state on disk by itself."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from integrations.scene import refused, same, weights


def optimizer_state(scene):
    """State through DCP directly: uneven and empty shards, numbers, groups."""
    # Not at the top: the plain process must not have seen it.
    from hf_sp import parallel_state
    from hf_sp.checkpoint.optimizer import load_optimizer, save_optimizer

    mesh = parallel_state(scene.tiny()).mesh

    def small():
        g = torch.Generator().manual_seed(1)
        model = nn.Module()
        for name, shape, placement in (
            ("uneven", (5, 3), Shard(0)),
            ("empty", (1, 3), Shard(0)),
            ("row", (2, 7), Shard(1)),
            ("norm", (4,), Replicate()),
        ):
            value = torch.randn(shape, generator=g)
            sharded = distribute_tensor(value, mesh, [placement], src_data_rank=None)
            model.register_parameter(name, nn.Parameter(sharded))
        return model

    def stepped(model, optimizer, n=2):
        for i in range(n):
            for p in model.parameters():
                p.grad = p.detach() * (i + 1)
            optimizer.step()
        return optimizer

    def build(model, kind):
        sharded = [model.uneven, model.empty, model.row]
        groups = [{"params": sharded, "weight_decay": 0.1}, {"params": [model.norm]}]
        return kind(groups)

    kinds = {
        "adamw": lambda g: torch.optim.AdamW(g, lr=0.1, betas=(0.8, 0.9)),
        "fused": lambda g: torch.optim.AdamW(g, lr=0.1, fused=True),
        "sgd": lambda g: torch.optim.SGD(g, lr=0.1),
        "momentum": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9),
        "amsgrad": lambda g: torch.optim.AdamW(
            g, lr=torch.tensor(0.1), amsgrad=True, foreach=False
        ),
    }
    report = {}
    for name, kind in kinds.items():
        model = small()
        optimizer = stepped(model, build(model, kind))
        folder = scene.out / f"dcp-{name}"
        save_optimizer(model, optimizer, folder)
        other = small()
        other.load_state_dict(model.state_dict())
        fresh = build(other, kind)
        load_optimizer(other, fresh, folder)
        stepped(model, optimizer, 1)
        stepped(other, fresh, 1)
        report[name] = same(weights(model), weights(other))
    model = small()
    report["misfit"] = refused(
        lambda: load_optimizer(model, torch.optim.AdamW([model.uneven]), scene.out / "dcp-adamw")
    )
    model = small()
    odd = stepped(model, torch.optim.SGD(model.parameters(), lr=0.1))
    odd.state[model.row]["codes"] = torch.zeros(8, dtype=torch.uint8)
    report["plain_state"] = refused(lambda: save_optimizer(model, odd, scene.out / "dcp-odd"))
    return report
