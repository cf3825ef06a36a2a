"""Refused early, on every rank alike, with the model untouched, in a message that helps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from harness import tiny
from harness.pool import pool
from peft import IA3Config
from torch import nn

from hf_sp import parallelize
from hf_sp.checks import check_devices
from hf_sp.checks_fsdp import check_data_parallel
from hf_sp.comm.degrees import Degrees, resolve_degrees
from hf_sp.errors import ConfigError, HfSpError
from hf_sp.estimate import fake_world
from hf_sp.plan import derive_plan
from refusals import jobs

# --- on two ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "parts"),
    [
        ({"tp": 4}, "ConfigError", ["does not make up the world", "torchrun --nproc_per_node 4"]),
        ({"tp": 1}, "ConfigError", ["does not make up the world", "legal:  tp=2"]),
        ({"tp": 0}, "ConfigError", ["positive integer", "tp=0"]),
        ({"tp": "2"}, "ConfigError", ["positive integer"]),
        ({"tp": True}, "ConfigError", ["positive integer"]),
        ({"sp": 2}, "ConfigError", ["sp is a switch"]),
        ({"cp": 3}, "ConfigError", ["cp=3", "tp * cp * dp_shard * dp_replicate"]),
        ({"ep": 2}, "PlanError", ["no layer has experts"]),
        ({"tp": 2, "dp_shard": 2}, "ConfigError", ["dp_shard=2, tp=2 do not make up the world"]),
        ({"dp_shard": "2"}, "ConfigError", ["dp_shard must be a positive integer"]),
        ({"cp_mode": "x"}, "ConfigError", ["'ulysses', 'ring', 'hybrid'"]),
        ({"loss_chunk": 0}, "ConfigError", ["loss_chunk"]),
        ({"mlp_tile": 0}, "ConfigError", ["mlp_tile must be a positive integer"]),
        ({"offload": "cpu"}, "ConfigError", ["offload is True or False"]),
        ({"mlp_tile": 8, "family": "mixtral"}, "ConfigError", ["tiles of the sequence", "mlp"]),
        ({"kernels": "triton"}, "ConfigError", ["kernels is True or False", "'triton'"]),
        ({"checkpoint": "torch"}, "ConfigError", ["unknown checkpoint", "'dcp'"]),
        ({"recompute": "act"}, "ConfigError", ["unknown recompute", "'norm+act'"]),
        ({"recompute": True}, "ConfigError", ["unknown recompute", "True"]),
        ({"per_rank": {1: {"recompute": "none"}}}, "ConfigError", ["asked for different things"]),
        ({"plan": {"lm_head": "magic"}}, "PlanError", ["lm_head: magic"]),
        ({"per_rank": {1: {"sp": False}}}, "ConfigError", ["asked for different things"]),
        ({"per_rank": {1: {"sp": 3}}}, "ConfigError", ["sp is a switch"]),
    ],
    ids=str,
)
def test_arguments(kwargs, error, parts):
    for message, untouched in pool(2).run(jobs.refuse, **kwargs):
        assert untouched
        assert message is not None
        assert message.startswith(error)
        assert all(part in message for part in parts), message


def test_heads_that_tp_does_not_divide():
    for message, untouched in pool(4).run(
        jobs.refuse, plan=None, family="llama", per_rank=None, tp=None
    ):
        assert message is None
        assert not untouched


def test_offload_without_checkpoints():
    """And beside transformers' own; what the first refusal advises works."""
    for alone, evaluated, checkpointed, twice in pool(2).run(jobs.nothing_to_offload):
        assert evaluated is checkpointed is None
        assert alone is not None
        assert "offload=True has nothing to move" in alone
        assert "gradient_checkpointing_enable()" in alone
        assert twice is not None
        assert "did not show hf_sp what it saves" in twice
        assert "leave transformers' own offload out" in twice


@pytest.mark.parametrize(
    ("names", "shape", "part"),
    [(("dp",), (2,), "no axis named 'tp'"), (("dp", "tp"), (2, 1), "other axes beside tp")],
)
def test_meshes(names, shape, part):
    for message, untouched in pool(2).run(jobs.mesh_axes, names=names, shape=shape):
        assert untouched
        assert part in message


def test_mesh_of_the_user_is_taken():
    for message, _ in pool(2).run(jobs.mesh_axes, names=("tp",), shape=(2,)):
        assert message is None


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("values", "input_ids, tp rank 0: shape (2, 12)"),
        ("length", "input_ids, tp rank 1: shape (2, 9)"),
        ("labels", "labels, tp rank 1"),
        ("missing", "labels, tp rank 1: missing"),
        ("embeds", "inputs_embeds, tp rank 0: missing"),
    ],
)
def test_different_batches_are_an_error_and_not_a_hang(kind, part):
    for message in pool(2).run(jobs.different_batches, kind=kind, timeout=60):
        assert message.startswith("BatchMismatchError")
        assert part in message, message


def test_same_batches_pass():
    assert pool(2).run(jobs.same_batches) == [None, None]


def test_parameters_added_later():
    for message in pool(2).run(jobs.later_parameters):
        assert "given parameters after parallelize" in message
        assert "model.extra" in message


@pytest.mark.parametrize(
    ("where", "value"), [("input_ids", 96), ("input_ids", -1), ("labels", 96), ("labels", -5)]
)
def test_ids_outside_the_vocabulary(where, value):
    for message in pool(2).run(jobs.ids_out_of_range, where=where, value=value):
        assert message.startswith("ShapeError")
        assert str(value) in message


def test_resized_later():
    for message, looked in pool(2).run(jobs.resized):
        assert "resize the embeddings before parallelize" in message
        assert looked is None


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("Adafactor", {}, ["Adafactor cannot step", "torch.optim.Adafactor", "AdamW, SGD"]),
        ("transformers", {}, ["Adafactor cannot step", "transformers.optimization"]),
        ("LBFGS", {}, ["LBFGS cannot step", "one vector"]),
        ("Rprop", {}, ["Rprop cannot step", "masks"]),
        ("SGD", {"fused": True}, ["fused=True of SGD", "leave fused=True out"]),
        ("Adagrad", {"fused": True}, ["fused=True of Adagrad", "leave fused=True out"]),
        ("bitsandbytes", {}, ["bitsandbytes.optim.adamw.Raw", "whole tensors"]),
        ("lomo", {}, ["lomo_optim.lomo.Lomo", "inside of backward"]),
        ("Muon", {}, None),
        ("Own", {"lr": 0.1}, None),
        ("Ratio", {}, None),
        ("SGD", {"foreach": True}, None),
        ("AdamW", {"fused": True}, None),
    ],
    ids=str,
)
def test_optimizers(kind, options, parts):
    for message, plain in pool(2).run(jobs.optimizer, kind=kind, **options):
        assert plain is None
        if parts is None:
            assert message is None
        else:
            assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", ["adafactor", "stable_adamw", "lomo", "apollo_adamw"])
def test_optimizer_of_trainer(name, tmp_path):
    for message in pool(2).run(jobs.optimizer_of_trainer, folder=str(tmp_path), name=name):
        assert f"optim='{name}' is not known to be right" in message
        assert "adamw_torch, adamw_torch_fused, sgd" in message


def test_optimizers_of_ones_own():
    """The numbers that a step is made of are of whole tensors, on every rank."""
    for found in pool(2).run(jobs.steps_of_own_optimizers):
        assert found == pytest.approx({"Own": 0, "Ratio": 0}, abs=1e-9)


def test_wrapped_or_debugged(tmp_path):
    for trainer, accelerator, debug in pool(2).run(jobs.wrapped_or_debugged, folder=str(tmp_path)):
        assert "Trainer(model=...): Around.lm" in trainer
        assert "Accelerator.prepare: Around.lm" in accelerator
        assert "debug='underflow_overflow' cannot look" in debug


def test_model_on_a_device_of_another_backend():
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    with fake_world(2) as mesh, pytest.raises(ConfigError, match="the model is on cuda"):
        check_devices(model, mesh)


def test_twice():
    for first, second in pool(2).run(jobs.twice):
        assert "parallelized already" in first
        assert second is not None


def test_different_seeds_train_one_model():
    assert pool(2).run(jobs.different_seeds) == [(True, True)] * 2


def test_deepcopy():
    assert pool(2).run(jobs.deep_copy_works) == [True, True]


# --- no rank needed -----------------------------------------------------------------------------


def test_without_a_launcher_tp_is_refused():
    with pytest.raises(ConfigError, match="torchrun --nproc_per_node 2"):
        parallelize(tiny.build("llama"), tp=2)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("PARALLELISM_CONFIG_SP_SIZE", "2", "DeepSpeed Ulysses"),
        ("PARALLELISM_CONFIG_CP_SIZE", "2", "torch's own context parallelism"),
        ("PARALLELISM_CONFIG_TP_SIZE", "3", "does not make up the world"),
        ("HF_SP_HANG_SECONDS", "abc", "HF_SP_HANG_SECONDS is no number of seconds"),
        ("HF_SP_SAVE_TIMEOUT", "3 min", "HF_SP_SAVE_TIMEOUT is no number of seconds"),
    ],
)
def test_environment(monkeypatch, name, value, part):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=part):
        parallelize(tiny.build("llama"))


@pytest.mark.parametrize("name", ["tp", "dp_shard", "dp_replicate"])
def test_degree_that_contradicts_accelerate(name, monkeypatch):
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "4")
    with pytest.raises(ConfigError, match=f"{name} contradicts accelerate"):
        parallelize(tiny.build("llama"), **{name: 2})


def test_degrees_of_accelerate(monkeypatch):
    """As its YAML has them; what it leaves at 1 may be given."""
    sizes = {"WORLD": 8, **{f"PARALLELISM_CONFIG_{n}": 2 for n in ("TP", "DP_SHARD")}}
    for name, size in {**sizes, "PARALLELISM_CONFIG_DP_REPLICATE": 1}.items():
        monkeypatch.setenv(f"{name}_SIZE", str(size))
    assert resolve_degrees(None, None, 2, None) == Degrees(2, 2, 2)
    assert resolve_degrees(2, 2, 2, None) == Degrees(2, 2, 2)


def _device_map(model):
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers": "cpu"}


def _quantised(model):
    model.hf_quantizer = object()


def _packed(model):
    packed = torch.zeros(64, 32, dtype=torch.uint8)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(packed, requires_grad=False)


def _optimizer(model):
    model.held = torch.optim.SGD(model.parameters(), lr=0.1)


def _gradient(model):
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)


def _adapters(model):
    model.peft_config = {"default": IA3Config()}


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (_device_map, "dispatched by device_map"),
        (_quantised, "quantised weights"),
        (_packed, "QLoRA: not in this release"),
        (_optimizer, "an optimizer was built"),
        (_gradient, "gradients of its whole parameters"),
        (_adapters, "IA3 is not supported"),
        (cpu_offload, "dispatch hooks"),
    ],
)
def test_models_in_no_state_to_be_sharded(spoil, part):
    model = tiny.build("llama")
    spoil(model)
    with pytest.raises(HfSpError, match=part):
        parallelize(model, tp=1)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), object()])
def test_things_that_are_no_transformers_model(thing):
    with pytest.raises(ConfigError):
        parallelize(thing)


@pytest.mark.parametrize(("bias", "data", "part"), [(False, 3, "64 input"), (True, 2, "with a")])
def test_packed_linears_beside_data_parallel_ranks(bias, data, part):
    model = tiny.build("phi3")
    mlp = model.model.layers[0].mlp
    if bias:
        mlp.gate_up_proj = nn.Linear(64, 192)
    plan = derive_plan(model, 2, True)
    check_data_parallel(model, plan, Degrees(tp=2, dp_shard=1, dp_replicate=1))
    with pytest.raises(ConfigError, match=part):
        check_data_parallel(model, plan, Degrees(tp=2, dp_shard=data, dp_replicate=1))
