"""What goes wrong without each patch of torch."""

from __future__ import annotations

import torch
from torch.distributed import _state_dict_utils
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import distribute_tensor

from hf_sp import parallel_state
from hf_sp.torch_packed import packed_shard
from integrations.rows import Raises, row


def _packed(scene, whole):
    """Two halves of four, of which each rank has two."""
    mesh = parallel_state(scene.tiny()).mesh
    return distribute_tensor(whole, mesh, [packed_shard(0)], src_data_rank=None)


@row(
    "Optimizer.add_param_group",
    right=Raises("ConfigError", "Rprop cannot step on shards"),
    wrong=0.01,
)
def an_optimizer_that_fails_at_its_first_step(scene):
    return torch.optim.Rprop(scene.tiny().parameters(), lr=0.01).param_groups[0]["lr"]


@row("DTensor.__create_write_items__", right=2, wrong=1)
def rectangles_written(scene):
    x = _packed(scene, torch.arange(8.0))
    return len(x.__create_write_items__("x", x))


@row("DTensor.__create_chunk_list__", right=2, wrong=1)
def rectangles_read(scene):
    return len(_packed(scene, torch.arange(8.0)).__create_chunk_list__())


@row("DTensor.__get_tensor_shard__", right=2, wrong=4)
def elements_of_a_rectangle(scene):
    x = _packed(scene, torch.arange(8.0))
    start = torch.Size([4 + 2 * scene.rank])
    return len(x.__get_tensor_shard__(MetadataIndex("x", start)))


@row("torch.distributed._state_dict_utils._distribute_tensors", right=True, wrong=False)
def given_by_the_first_rank(scene):
    whole = torch.arange(8.0)
    x = _packed(scene, torch.zeros(8))
    given = {"x": (x, whole)}
    _state_dict_utils._distribute_tensors(given, ["x"], torch.device("cpu"))
    return torch.equal(given["x"].full_tensor(), whole)


# What one rank may log alone.
@row("torch.nn.utils.clip_grad._get_total_norm", right=["Tensor", 2.0], wrong=["DTensor", 2.0])
def norm_of_clipped_gradients(scene):
    parameters = list(scene.tiny().parameters())
    count = sum(p.numel() for p in parameters)
    for p in parameters:
        p.grad = torch.full_like(p, 2.0 / count**0.5)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    return [type(norm).__name__, round(norm.full_tensor().item(), 6)]
