"""Norms, MLPs and sparse blocks are known by the text of their forward: the right form, or none.

tests/unit/goldens/known_forms_<version>.txt lists what is known of one transformers version. To
write the installed version's anew: HF_SP_WRITE_GOLDENS=1 and this file, then read the diff.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import re
import warnings
from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
import transformers
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
from hf_sp.plan import source as sources
from hf_sp.plan.known_forms import FORMS, GELU_TANH, GatedForm, NormForm, gated_form, norm_form
from hf_sp.plan.source import known_class

GOLDENS = Path(__file__).parent / "goldens"
SIZES = {"hidden_size": 32, "intermediate_size": 48}
# kind of form: names of the classes that might have it
KINDS = {
    "norm": r"Norm",
    "gated": r"MLP$",
    "block": r"(?i:moe)(MLP|Mlp)?$|(MoE|Moe|MoeMLP|MoE\w*|Moe\w*|Sparse\w*)Block$",
    "experts": r"Experts$",
    "router": r"Router|MoeGate",
}


@functools.cache
def _classes():
    """Every module class of transformers' modeling files: (name of the model, class)."""
    found = []
    for entry in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{entry.name}.modeling_{entry.name}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except Exception:  # optional packages that are not there
            continue
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == name and issubclass(cls, nn.Module):
                found.append((entry.name, cls))
    return found


@pytest.mark.slow
def test_what_is_known_of_this_transformers():
    lines = []
    for kind, pattern in KINDS.items():
        for model, cls in _classes():
            if re.search(pattern, cls.__name__):
                form = known_class(cls, FORMS[kind])
                lines.append(f"{kind:<8}{form[0] if form else '-':<24}{model}.{cls.__name__}")
    text = "\n".join(lines) + "\n"
    path = GOLDENS / f"known_forms_{transformers.__version__}.txt"
    if os.environ.get("HF_SP_WRITE_GOLDENS"):
        path.write_text(text)
    assert path.exists(), (
        f"no list for transformers {transformers.__version__}: run HF_SP_WRITE_GOLDENS=1 "
        "pytest tests/unit/test_known_forms.py -k what_is_known, and read it"
    )
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("norm", "want"),
    [
        (LlamaRMSNorm(64, eps=1e-5), NormForm("llama", 0.0, 1e-5, True)),
        (Qwen3RMSNorm(16, eps=1e-6), NormForm("llama", 0.0, 1e-6, True)),
        (Gemma2RMSNorm(64, eps=1e-6), NormForm("gemma", 1.0, 1e-6, True)),
        (GptOssRMSNorm(64, eps=1e-5), NormForm("gpt_oss", 0.0, 1e-5, True)),
        (Olmo2RMSNorm(64, eps=1e-5), NormForm("gpt_oss", 0.0, 1e-5, True)),
        (nn.LayerNorm(64), None),
        (nn.RMSNorm(64), None),
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
    """Other words for the same operations."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of each token."""
        kind: torch.dtype = tokens.dtype
        tokens = tokens.float()  # wide
        square = tokens.pow(2).mean(-1, keepdim=True)
        tokens = tokens * torch.rsqrt(square + self.variance_epsilon)
        return self.weight * tokens.type(kind)


class _OtherName(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = eps

    def forward(self, x):
        return (self.normed(x.float()) * (1.0 + self.weight.float())).type_as(x)

    def normed(self, y):
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.epsilon)


class _GemmaOtherName(_OtherName):
    def forward(self, x):
        y = self.normed(x.to(torch.float))
        y = y * (1.0 + self.weight.to(torch.float32))
        return y.to(x.dtype)


class _OneRounding(_Base):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(input_dtype)


class _NoCast(_Base):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class _OtherEps(_Base):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + 1e-6)
        return self.weight * hidden_states.to(input_dtype)


class _Centred(_Base):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class _FrozenScale(_Base):
    """The same numbers forward, another gradient: the statistics are detached."""

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon).detach()
        return self.weight * hidden_states.to(input_dtype)


class _Remembers(_Base):
    def forward(self, hidden_states):
        self.last = hidden_states
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class _Gated(_Base):
    def forward(self, hidden_states, gate=None):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class _Scaled(_Base):
    def __init__(self, size, eps):
        super().__init__(size, eps)
        self.scale = nn.Parameter(torch.ones(size))


def _doubled(function):
    @functools.wraps(function)
    def inner(*args):
        return 2 * function(*args)

    return inner


class _Decorated(_Base):
    @_doubled
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class _Property(_Base):
    @property
    def variance_epsilon(self):
        return 1.0

    @variance_epsilon.setter
    def variance_epsilon(self, value):
        pass


class _OtherHelper(Gemma2RMSNorm):
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=False) + self.eps)


def test_other_words_for_the_same_operations():
    assert norm_form(_Same(64, 1e-5)) == NormForm("llama", 0.0, 1e-5, True)
    assert norm_form(_GemmaOtherName(64, 1e-5)) == NormForm("gemma", 1.0, 1e-5, True)
    assert norm_form(_OneRounding(64, 1e-5)) == NormForm("gpt_oss", 0.0, 1e-5, True)


@pytest.mark.parametrize(
    "cls",
    [
        _OtherName,  # other statements: unknown, though it computes Gemma's
        _NoCast,
        _OtherEps,
        _Centred,
        _FrozenScale,
        _Remembers,
        _Gated,
        _Scaled,
        _Decorated,
        _Property,
        _OtherHelper,
    ],
)
def test_almost_a_norm_is_none(cls):
    assert norm_form(cls(64, 1e-5)) is None


def test_what_is_put_over_a_class_is_seen(monkeypatch):
    norm, gemma = LlamaRMSNorm(64), Gemma2RMSNorm(64)
    norm.forward = lambda x: x
    assert norm_form(norm) is None
    # Ours would fall back to the class's: a bound one counts as foreign too.
    norm.forward = MethodType(_Same.forward, norm)
    assert norm_form(norm) is None
    gemma._norm = lambda x: x
    assert norm_form(gemma) is None
    assert norm_form(LlamaRMSNorm(64)) is not None
    monkeypatch.setattr(LlamaRMSNorm, "forward", _NoCast.forward)
    assert norm_form(LlamaRMSNorm(64)) is None


def test_without_a_source_none():
    space = {"LlamaRMSNorm": LlamaRMSNorm}
    exec("class Made(LlamaRMSNorm):\n    def forward(self, x):\n        return x", space)
    assert norm_form(space["Made"](64)) is None


def test_names_mean_what_they_mean_where_they_are_used(monkeypatch):
    module = inspect.getmodule(LlamaRMSNorm)

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

    assert norm_form(LlamaRMSNorm(64)) is not None
    source = inspect.getsource(LlamaRMSNorm.forward)
    sources._of_function.cache_clear()
    monkeypatch.setattr(module, "torch", Torch())
    assert inspect.getsource(LlamaRMSNorm.forward) == source
    assert norm_form(LlamaRMSNorm(64)) is None
    sources._of_function.cache_clear()


def test_asking_leaves_no_trace():
    norm, mlp = LlamaRMSNorm(64), LlamaMLP(LlamaConfig(**SIZES))
    calls = []
    norm.register_forward_hook(lambda *a: calls.append(1))
    before, state = dict(vars(norm)), torch.get_rng_state()
    norm_form(norm)
    mlp.act_fn.register_forward_hook(lambda *a: calls.append(1))
    gated_form(mlp, ["gate_proj", "up_proj"], "down_proj")
    assert vars(norm) == before
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_every_known_norm_has_its_forms_bits():
    """The table cannot lie: what is given a form has that form's bits, forward, in bfloat16."""
    total, known = 0, set()
    generator = torch.Generator().manual_seed(7)
    for _, cls in _classes():
        if not re.search("Norm", cls.__name__):
            continue
        try:
            norm = cls(96)
        except Exception:  # wants more than a size
            continue
        form, name = norm_form(norm), known_class(cls, FORMS["norm"])
        total += form is not None
        if form is None:
            continue
        known.add(name[0])
        norm = norm.to(torch.bfloat16)
        with torch.no_grad():
            norm.weight.copy_(torch.randn(96, generator=generator))
            x = (3 * torch.randn(40, 96, generator=generator)).to(torch.bfloat16)
            y = rms_norm(x, norm.weight, form.eps, offset=form.offset, casting=form.casting)
            assert torch.equal(norm(x), y), cls.__name__
            if form.float64:
                norm, x = norm.double(), x.double()
                y = rms_norm(x, norm.weight, form.eps, offset=form.offset, casting=form.casting)
                assert torch.equal(norm(x), y), cls.__name__
    assert total >= 150, "transformers has moved its norms"
    assert {"llama", "gemma", "gpt_oss"} <= known


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
    x = torch.randn(3, 32)
    mlp = cls(config)
    product = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    assert torch.equal(mlp(x), mlp.down_proj(product))


def test_the_plans_names_are_the_forwards():
    mlp = LlamaMLP(LlamaConfig(**SIZES))
    assert gated_form(mlp, ["gate_proj", "down_proj"], "up_proj") is None
    assert gated_form(mlp, ["gate_proj", "gate_proj"], "down_proj") is None


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


def test_tanh_gelu_and_packed_mlps_are_known():
    names = ["gate_proj", "up_proj"], "down_proj"
    gelu = Gemma2MLP(Gemma2Config(**SIZES))
    assert gated_form(gelu, *names) == GatedForm("gate_proj", "up_proj", "down_proj", GELU_TANH)
    phi = Phi3MLP(Phi3Config(**SIZES, pad_token_id=0))
    assert gated_form(phi, ["gate_up_proj"], "down_proj") == GatedForm(
        "gate_up_proj", "", "down_proj"
    )


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "quick_gelu", "gelu_python_tanh"])
def test_other_activations_are_none(act):
    gelu = Gemma2MLP(Gemma2Config(**SIZES, hidden_activation=act))
    assert gated_form(gelu, ["gate_proj", "up_proj"], "down_proj") is None
