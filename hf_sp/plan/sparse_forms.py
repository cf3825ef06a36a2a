"""Texts of the forwards of mixtures of experts whose maths is known (``known_forms``), as data."""

from __future__ import annotations

from hf_sp.plan.router_forms import ROUTERS

_EXPERTS = """
def forward(self, x, index, scale):
    out = torch.zeros_like(x)
    with torch.no_grad():
        mask = F.one_hot(index, num_classes=self.count + 1)
        mask = mask.permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for e in hit:
        e = e[0]
        if e == self.count:
            continue
        choice, token = torch.where(mask[e])
        rows = x[token]
        gate, up = F.linear(rows, self.gate_up[e]).chunk(2, dim=-1)
        y = self.act(gate) * up
        y = F.linear(y, self.down[e])
        y = y * scale[token, choice, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out
"""

_GPT_OSS_EXPERTS = """
def forward(self, x, index=None, scale=None):
    out = torch.zeros_like(x, dtype=x.dtype, device=x.device)
    with torch.no_grad():
        mask = F.one_hot(index, num_classes=self.count)
        mask = mask.permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for e in hit:
        e = e[0]
        if e == self.count:
            continue
        choice, token = torch.where(mask[e])
        rows = x[token]
        both = rows @ self.gate_up[e] + self.gate_up_bias[e]
        gated = self._apply_gate(both)
        y = gated @ self.down[e] + self.down_bias[e]
        z = y * scale[token, choice, None]
        out.index_add_(0, token, z.to(x.dtype))
    return out

def _apply_gate(self, both):
    gate, up = both[..., ::2], both[..., 1::2]
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    y = gate * torch.sigmoid(gate * self.alpha)
    z = (up + 1) * y
    return z
"""

# As ``FORMS``.
SPARSE: dict[str, dict[str, str]] = {
    # transformers 5.17 has E places for tokens, 5.23 one more for those of other ranks.
    "experts": {
        "mixtral": _EXPERTS,
        "mixtral 5.17": _EXPERTS.replace("count + 1", "count"),
        "gpt_oss": _GPT_OSS_EXPERTS,
    },
    "router": ROUTERS,
    "correction": {
        "ernie4_5_moe": "def forward(self, x): return x + self.e_score_correction_bias.squeeze()",
    },
    "block": {
        "gpt_oss": """
def forward(self, x):
    batch, length, hidden = x.shape
    x = x.reshape(-1, hidden)
    _, scale, index = self.router(x)
    x = self.experts(x, index, scale)
    x = x.reshape(batch, length, hidden)
    return x, scale
""",
        "qwen3_moe": """
def forward(self, x):
    batch, length, hidden = x.shape
    flat = x.view(-1, hidden)
    _, scale, index = self.router(flat)
    out = self.experts(flat, index, scale)
    return out.reshape(batch, length, hidden)
""",
        "qwen2_moe": """
def forward(self, x):
    batch, length, hidden = x.shape
    flat = x.view(-1, hidden)
    always = self.shared(flat)
    _, scale, index = self.router(flat)
    out = self.experts(flat, index, scale)
    always = F.sigmoid(self.shared_gate(flat)) * always
    out = out + always
    out = out.reshape(batch, length, hidden)
    return out
""",
        "mixtral": """
def forward(self, x):
    batch, length, hidden = x.shape
    if self.training and self.jitter > 0:
        x *= torch.empty_like(x).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
    x = x.view(-1, x.shape[-1])
    _, scale, index = self.router(x)
    x = self.experts(x, index, scale)
    x = x.reshape(batch, length, hidden)
    return x
""",
        "glm4_moe": """
def forward(self, x):
    given = x
    shape = x.shape
    _, weights, index = self.router(x)
    x = x.view(-1, x.shape[-1])
    x = self.experts(x, index, weights).view(*shape)
    x = x + self.shared(given)
    return x
""",
        "mimo_v2_flash": """
def forward(self, x):
    shape = x.shape
    _, weights, index = self.router(x)
    x = x.view(-1, x.shape[-1])
    return self.experts(x, index, weights).view(*shape)
""",
        "hy_v3": """
def forward(self, x):
    batch, length, hidden = x.shape
    x = x.view(-1, hidden)
    _, weights, index = self.router(x, self.bias)
    out = self.experts(x, index, weights)
    if self.wide:
        x = (out.float() + self.shared(x).float()).to(x.dtype)
    else:
        x = out + self.shared(x)
    return x.reshape(batch, length, hidden)
""",
        "minimax_m2": """
def forward(self, x):
    batch, length, hidden = x.shape
    if self.training and self.jitter > 0:
        x *= torch.empty_like(x).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
    x = x.view(-1, x.shape[-1])
    _, scale, index = self.router(x, self.bias)
    x = self.experts(x, index, scale)
    x = x.reshape(batch, length, hidden)
    return x
""",
        "ernie4_5_moe": """
def forward(self, x):
    batch, length, _ = x.shape
    x = x.view(-1, self.hidden)
    if self.shared is not None:
        always = self.shared(x)
    _, scale, index = self.router(x)
    out = self.experts(x, index, scale)
    if self.shared is not None:
        out = out + always
    out = out.reshape(batch, length, self.hidden)
    return out.to(x.dtype)
""",
        "hunyuan_v1_moe": """
def forward(self, x):
    batch, length, hidden = x.shape
    always = self.shared(x)
    x = x.view(-1, hidden)
    _, scale, index = self.router(x)
    out = self.experts(x, index, scale).reshape(batch, length, hidden)
    return out + always
""",
        "laguna": """
def forward(self, x):
    batch, length, hidden = x.shape
    x = x.view(-1, hidden)
    always = self.shared(x)
    _, scale, index = self.router(x)
    x = self.experts(x, index, scale)
    x = x * self.factor
    x = x + always
    x = x.reshape(batch, length, hidden)
    return x
""",
        "afmoe": """
def forward(self, x):
    batch, length, hidden = x.shape
    flat = x.view(-1, hidden)
    _, scale, index = self.router(x, self.expert_bias)
    always = self.shared(flat).view(batch, length, hidden)
    out = self.experts(flat, index, scale).view(batch, length, hidden)
    return always + out
""",
        "olmoe": """
def forward(self, x):
    batch, length, hidden = x.shape
    x = x.view(-1, hidden)
    _, scale, index = self.router(x)
    out = self.experts(x, index, scale).reshape(batch, length, hidden)
    return out
""",
        "granitemoe": """
def forward(self, x):
    batch, length, hidden = x.size()
    flat = x.reshape(-1, hidden)
    _, scale, index = self.router(flat)
    out = self.experts(flat, index, scale)
    return out.view(batch, length, self.hidden)
""",
        "cohere2_moe": """
def forward(self, x):
    batch, length, hidden = x.shape
    flat = x.view(-1, hidden)
    _, scale, index = self.router(flat)
    out = self.experts(flat, index, scale)
    if self.shared_count > 0:
        always = self.shared(flat)
        if self.combination == "sum":
            out = out + always
        elif self.combination == "average":
            out = (out + always) / 2
        else:
            raise ValueError("`shared_expert_combination_strategy` can only be `sum` or `average`")
    return out.reshape(batch, length, hidden)
""",
    },
}
