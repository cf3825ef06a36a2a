"""transformers' own tensor parallelism, to compare with.

Private: ``from_pretrained`` makes it of a checkpoint on disk alone. These are what it calls after
making the model on meta and before loading weights, in transformers 5.23 and 5.24.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh


def distribute(tp: int) -> Callable[[Any], nn.Module]:
    """What splits a model as ``from_pretrained(distributed_config=...)`` does.

    To be called outside of fake tensors: it makes a mesh.
    """
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.utils import TransformersDeviceMesh

    axes = ("pp", "dp_replicate", "fsdp", "tp")
    dense = init_device_mesh("cpu", (1, 1, 1, tp), mesh_dim_names=axes)
    # The second is for experts.
    meshes = TransformersDeviceMesh(dense, dense)
    config = DistributedConfig(tp_size=tp)
    return lambda model: type(model).maybe_distribute_model(model, config, meshes)
