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
_GATED_NORM = """
def forward(self, x, gate=None):
    dtype = x.dtype
    x = x.to(torch.float32)
    if gate is not None:
        x = x * nn.functional.silu(gate.to(torch.float32))
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.eps)
    return self.weight * x.to(dtype)
"""
_FALCON_NORM = """
def forward(self, x, gate=None):
    dtype = x.dtype
    ndim = x.ndim
    if not self.norm_before_gate and gate is not None:
        x = x * F.silu(gate.to(torch.float32))
    if len(x.shape) == 3:
        batch, length, dim = x.shape
    else:
        batch, dim = x.shape
        length = 1
    x = x.to(torch.float32)
    x = x.view(batch, length, self.n_groups, int(dim // self.n_groups))
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.eps)
    x = self.weight.view(self.n_groups, int(dim // self.n_groups)) * x
    x = x.view(batch, length, dim)
    if ndim == 2:
        x = x.squeeze(1)
    if self.norm_before_gate and gate is not None:
        x = x * F.silu(gate.to(torch.float32))
    return x.to(dtype)
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
    # Norms of what comes out of a state-space model, over all features or groups of them.
    "gated_norm": {
        "all": _GATED_NORM,
        "groups": """
def forward(self, x, gate=None):
    dtype = x.dtype
    x = x.to(torch.float32)
    if gate is not None:
        x = x * nn.functional.silu(gate.to(torch.float32))
    *dims, last = x.shape
    count = last // self.group_size
    grouped = x.view(*dims, count, self.group_size)
    variance = grouped.pow(2).mean(-1, keepdim=True)
    grouped = grouped * torch.rsqrt(variance + self.eps)
    x = grouped.view(*dims, count * self.group_size)
    return self.weight * x.to(dtype)
""",
        "falcon": _FALCON_NORM,
        # Its result for one token has a dim less, which broadcasts to the same for one sequence.
        "falcon, before 5.20": _FALCON_NORM.replace("ndim = x.ndim\n    ", "").replace(
            "ndim == 2", "length == 1"
        ),
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
