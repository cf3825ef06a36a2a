"""What goes wrong without each patch of PEFT."""

from __future__ import annotations

from unittest import mock

import peft
import torch
import torch.distributed as dist
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from integrations.rows import Raises, row
from integrations.scene import full

MIXED = Raises("RuntimeError", "got mixed torch.Tensor and DTensor")
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"


def adapted(scene, **options):
    """LoRA of rank 3 on the two q_proj, 16 by 16, after ``parallelize``."""
    options = {"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    torch.manual_seed(5)
    return peft.get_peft_model(scene.tiny(), peft.LoraConfig(task_type="CAUSAL_LM", **options))


@row("LoraLayer._get_in_out_features", right=[16, 3], wrong=[8, 3])
def shape_of_a_factor(scene):
    return list(adapted(scene).get_parameter(NAME).shape)


@row("DoraLinearLayer.update_layer", right=[16], wrong=MIXED)
def shape_of_the_magnitude(scene):
    model = adapted(scene, use_dora=True)
    return list(full(next(p for n, p in model.named_parameters() if "magnitude" in n)).shape)


@row("BaseTuner.inject_adapter", right=True, wrong=False)
def factor_is_sharded(scene):
    return isinstance(adapted(scene).get_parameter(NAME), DTensor)


@row(
    "PeftModel.add_adapter",
    right=Raises("ConfigError", "is not supported for a parallelized model"),
    wrong="taken",
)
def prompt_tuning(scene):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(scene.tiny(), config)
    return "taken"


@row(
    "LoraModel.add_weighted_adapter",
    right=Raises("ConfigError", "add_weighted_adapter is not supported"),
    wrong=MIXED,
)
def weighted(scene):
    model = adapted(scene)
    model.add_adapter("two", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "both")
    return "taken"


@row(
    "peft.utils.hotswap.hotswap_adapter_from_state_dict",
    right=Raises("ConfigError", "hotswap_adapter is not supported"),
    wrong=MIXED,
)
def hotswap(scene):
    model = adapted(scene)
    folder = scene.fresh("hotswap")
    model.save_pretrained(str(folder))
    hotswap_adapter(model, str(folder), "default")
    return "taken"


@row(
    "peft.utils.save_and_load._reshard_dtensor_values_for_load",
    right=Raises("CheckpointError", "(8, 3)"),
    wrong="taken",
)
def factor_of_a_shards_shape(scene):
    model = adapted(scene)
    folder = scene.fresh("misfit")
    model.save_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    if scene.rank == 0:
        tensors = load_file(path)
        name = next(n for n in tensors if "q_proj.lora_B" in n)
        tensors[name] = tensors[name][:8].contiguous()
        save_file(tensors, path)
    dist.barrier()
    model.load_adapter(str(folder), "default")
    return "taken"


# A and B of one linear in each of two layers; without the patch the 21 of the base, too.
@row(
    "PeftModel.save_pretrained",
    right=4,
    wrong=Raises("RuntimeError", "invalid python storage"),
)
def gathered_for_an_adapter(scene):
    model = adapted(scene)
    folder = scene.fresh("adapter")
    gathered, original = [], DTensor.full_tensor

    def spy(self, **kwargs):
        gathered.append(1)
        return original(self, **kwargs)

    with mock.patch.object(DTensor, "full_tensor", spy):
        model.save_pretrained(str(folder))
    dist.barrier()
    assert len(load_file(folder / "adapter_model.safetensors")) == 4
    return len(gathered)
