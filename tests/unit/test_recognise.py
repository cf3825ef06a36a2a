"""Norms and MLPs are known by what they compute: the right form, or none."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings

import pytest
import torch
import transformers.models
from torch import nn
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP, Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from hf_sp.kernels.norm import rms_norm
from hf_sp.plan.recognise import GatedForm, NormForm, gated_form, norm_form

SIZES = {"hidden_size": 32, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("norm", "want"),
    [
        (LlamaRMSNorm(64, eps=1e-5), NormForm("llama", 0.0, 1e-5, True)),
        (Qwen3RMSNorm(16, eps=1e-6), NormForm("llama", 0.0, 1e-6, True)),
        (Gemma2RMSNorm(64, eps=1e-6), NormForm("gemma", 1.0, 1e-6, True)),
        (GptOssRMSNorm(64, eps=1e-5), NormForm("gpt_oss", 0.0, 1e-5, True)),
        (Olmo2RMSNorm(64, eps=1e-5), NormForm("gpt_oss", 0.0, 1e-5, True)),
        (nn.LayerNorm(64), None),
        (Qwen3NextRMSNormGated(64), None),
        (nn.Linear(8, 8), None),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_norms_of_transformers(norm, want):
    assert norm_form(norm) == want


class _Base(LlamaRMSNorm):
    """What users subclass."""


class _Same(_Base):
    """Another name and other words, the same maths."""

    def forward(self, tokens):
        wide = tokens.float()
        scale = wide.square().mean(-1, keepdim=True).add(self.variance_epsilon).rsqrt()
        return self.weight * wide.mul(scale).to(tokens.dtype)


class _OneRounding(_Base):
    def forward(self, x):
        wide = x.float()
        return (self.weight.float() * (wide * torch.rsqrt(wide.pow(2).mean(-1, True) + 1e-5))).to(
            x.dtype
        )


class _OtherEps(_Base):
    def forward(self, x):
        return super().forward(x) if self.variance_epsilon > 1 else _plain(self, x, 2e-5)


class _Centred(_Base):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class _FrozenScale(_Base):
    """The same numbers forward, another gradient: the statistics are detached."""

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return self.weight * (wide * scale).to(x.dtype)


class _Remembers(_Base):
    def forward(self, x):
        self.last = x
        return super().forward(x)


class _Gated(_Base):
    def forward(self, x, gate=None):
        return super().forward(x)


class _Scaled(_Base):
    def __init__(self, size, eps):
        super().__init__(size, eps)
        self.scale = nn.Parameter(torch.ones(size))


class _OverBatch(_Base):
    """Row by row it is a norm; over rows it is not."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x.mean(0, keepdim=True)


def _plain(self, x, eps):
    wide = x.float()
    return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, True) + eps)).to(x.dtype)


def test_other_words_for_the_same_maths():
    assert norm_form(_Same(64, 1e-5)) == NormForm("llama", 0.0, 1e-5, True)
    assert norm_form(_OneRounding(64, 1e-5)).casting == "gpt_oss"


@pytest.mark.parametrize(
    "cls", [_OtherEps, _Centred, _FrozenScale, _Remembers, _Gated, _Scaled, _OverBatch]
)
def test_almost_a_norm_is_none(cls):
    assert norm_form(cls(64, 1e-5)) is None


def test_a_forward_of_the_users_is_left_alone():
    norm = LlamaRMSNorm(64)
    norm.forward = lambda x: x
    assert norm_form(norm) is None


def test_asking_leaves_no_trace():
    norm, mlp = LlamaRMSNorm(64), LlamaMLP(LlamaConfig(**SIZES))
    calls = []
    norm.register_forward_hook(lambda *a: calls.append(1))
    before, state = dict(vars(norm)), torch.get_rng_state()
    weight = norm.weight.clone()
    norm_form(norm)
    mlp.act_fn.register_forward_hook(lambda *a: calls.append(1))
    gated_form(mlp, ["gate_proj", "up_proj"], "down_proj")
    assert vars(norm) == before
    assert not calls
    assert torch.equal(norm.weight, weight)
    assert torch.equal(torch.get_rng_state(), state)


def _rms_norms():
    """Every class called RMSNorm in transformers that is made from a size alone."""
    for entry in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{entry.name}.modeling_{entry.name}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except Exception:  # optional packages that are not there
            continue
        for cls_name, cls in inspect.getmembers(module, inspect.isclass):
            mine = cls.__module__ == name and issubclass(cls, nn.Module)
            if mine and cls_name.endswith("RMSNorm"):
                try:
                    yield cls(96)
                except Exception:  # wants more than a size
                    continue


@pytest.mark.slow
def test_every_rms_norm_of_transformers():
    """Whatever form a class is given, it has that class's bits on rows it was not asked on."""
    known = total = 0
    generator = torch.Generator().manual_seed(7)
    for norm in _rms_norms():
        total += 1
        form = norm_form(norm)
        if form is None:
            continue
        known += 1
        norm = norm.to(torch.bfloat16)
        with torch.no_grad():
            norm.weight.copy_(torch.randn(96, generator=generator))
            x = (3 * torch.randn(40, 96, generator=generator)).to(torch.bfloat16)
            y = rms_norm(x, norm.weight, form.eps, offset=form.offset, casting=form.casting)
            assert torch.equal(norm(x), y), type(norm).__name__
    assert total > 150, "transformers has moved its norms"
    assert known > 0.9 * total


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (LlamaMLP, LlamaConfig(**SIZES)),
        (LlamaMLP, LlamaConfig(**SIZES, mlp_bias=True)),
        (MistralMLP, MistralConfig(**SIZES)),
        (Qwen2MLP, Qwen2Config(**SIZES)),
        (Qwen3MLP, Qwen3Config(**SIZES)),
        (Olmo2MLP, Olmo2Config(**SIZES)),
    ],
)
def test_gated_mlps(cls, config):
    want = GatedForm("gate_proj", "up_proj", "down_proj")
    # The order in which the plan lists the two does not matter.
    assert gated_form(cls(config), ["gate_proj", "up_proj"], "down_proj") == want
    assert gated_form(cls(config), ["up_proj", "gate_proj"], "down_proj") == want


class _Dropping(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class _Clamped(LlamaMLP):
    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=7.0)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class _Normed(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x * 1.0))


class _Doubled(LlamaMLP):
    def forward(self, x):
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("cls", [_Dropping, _Clamped, _Normed, _Doubled])
@pytest.mark.parametrize("training", [True, False])
def test_almost_a_gated_mlp_is_none(cls, training):
    mlp = cls(LlamaConfig(**SIZES)).train(training)
    assert gated_form(mlp, ["gate_proj", "up_proj"], "down_proj") is None


def test_other_activations_and_fused_projections_are_none():
    gelu = Gemma2MLP(Gemma2Config(**SIZES))
    assert gated_form(gelu, ["gate_proj", "up_proj"], "down_proj") is None
    phi = Phi3MLP(Phi3Config(**SIZES, pad_token_id=0))
    assert gated_form(phi, ["gate_up_proj"], "down_proj") is None
