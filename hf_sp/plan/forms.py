"""Texts of the forwards whose maths is known (``known_forms``), as data."""

from __future__ import annotations

from hf_sp.plan.sparse_forms import SPARSE

_UNIT = "def _norm(self, x): return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"
_LLAMA = """
def forward(self, x):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.eps)
    return self.weight * x.to(dtype)
"""
_GEMMA = """
def forward(self, x):
    y = self._norm(x.float())
    y = y * (1.0 + self.weight.float())
    return y.type_as(x)
"""
# kind -> name of the form -> its text. Attributes of self may have other names in the class.
FORMS: dict[str, dict[str, str]] = {
    **SPARSE,
    "norm": {
        "llama": _LLAMA,
        "gpt_oss": _LLAMA.replace("self.weight * x.to(dtype)", "(self.weight * x).to(dtype)"),
        "gpt_oss, weight cast": _LLAMA.replace(
            "self.weight * x.to(dtype)", "(self.weight.to(torch.float32) * x).to(dtype)"
        ),
        "gemma": _GEMMA + _UNIT,
        "moshi": _GEMMA.replace("(1.0 + self.weight.float())", "self.weight.float()") + _UNIT,
        "gemma4": """
def forward(self, x):
    y = self._norm(x.float())
    if self.scaled:
        y = y * self.weight.float()
    return y.type_as(x)

def _norm(self, x):
    mean_squared = x.pow(2).mean(-1, keepdim=True) + self.eps
    return x * torch.pow(mean_squared, -0.5)
""",
    },
    "activation": {
        "silu": "def forward(self, x): return F.silu(x)",
        "calls": "def forward(self, x): return self.act(x)",
    },
    "gated": {
        "llama": "def forward(self, x):\n"
        "    y = self.down(self.act(self.gate(x)) * self.up(x)); return y",
        "qwen2": "def forward(self, x): return self.down(self.act(self.gate(x)) * self.up(x))",
        "lfm2": "def forward(self, x): return self.down(F.silu(self.gate(x)) * self.up(x))",
        "phi3": """
def forward(self, x):
    up = self.gate(x)
    gate, up = up.chunk(2, dim=-1)
    up = up * self.act(gate)
    return self.down(up)
""",
        "granitemoeshared": """
def forward(self, x):
    x = self.gate(x)
    both = x.chunk(2, dim=-1)
    x = self.act(both[0]) * both[1]
    x = self.down(x)
    return x
""",
    },
}
