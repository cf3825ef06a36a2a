"""Texts of the forwards whose maths is known (``known_forms``), as data."""

from __future__ import annotations

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
_ROUTER = """
def forward(self, x):
    x = x.reshape(-1, self.hidden)
    logits = F.linear(x, self.weight)
    probabilities = F.softmax(logits, dtype=torch.float, dim=-1)
    value, index = torch.topk(probabilities, self.top_k, dim=-1)
    {0}value /= value.sum(dim=-1, keepdim=True)
    value = value.to(logits.dtype)
    scores = value
    return logits, scores, index
"""
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

_GROUPED_ROUTER = """
def forward(self, x):
    x = x.view(-1, self.hidden)
    logits = F.linear(x.type(torch.float32), self.weight.type(torch.float32))
    scores = logits.sigmoid()
    choice = scores + self.bias
    groups = (
        choice.view(-1, self.groups, self.count // self.groups)
        .topk(2, dim=-1)[0]
        .sum(dim=-1)
    )
    best = torch.topk(groups, k=self.top_groups, dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(groups)
    group_mask.scatter_(1, best, 1)
    mask = (
        group_mask.unsqueeze(-1)
        .expand(-1, self.groups, self.count // self.groups)
        .reshape(-1, self.count)
    )
    choice = choice.masked_fill(~mask.bool(), float("-inf"))
    index = torch.topk(choice, k=self.top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, index)
    if self.normalise:
        total = weights.sum(dim=-1, keepdim=True) + 1e-20
        weights /= total
    weights = weights * self.scale
    return logits, weights, index
"""

# kind -> name of the form -> its text. Attributes of self may have other names in the class.
FORMS: dict[str, dict[str, str]] = {
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
    "silu": {"silu": "def forward(self, x): return F.silu(x)"},
    "gated": {
        "llama": "def forward(self, x):\n"
        "    y = self.down(self.act(self.gate(x)) * self.up(x)); return y",
        "qwen2": "def forward(self, x): return self.down(self.act(self.gate(x)) * self.up(x))",
        "lfm2": "def forward(self, x): return self.down(F.silu(self.gate(x)) * self.up(x))",
    },
    # transformers 5.17 has E places for tokens, 5.23 one more for those of other ranks.
    "experts": {"mixtral": _EXPERTS, "mixtral 5.17": _EXPERTS.replace("count + 1", "count")},
    "router": {
        "qwen2_moe": _ROUTER.format("if self.normalise: "),
        "qwen3_5_moe": _ROUTER.format(""),
        "mixtral": """
def forward(self, x):
    x = x.reshape(-1, self.hidden)
    logits = F.linear(x, self.weight)
    probabilities = F.softmax(logits.float(), dim=-1)
    value, index = torch.topk(probabilities, self.top_k, dim=-1)
    value /= value.sum(dim=-1, keepdim=True)
    scores = value
    return logits, scores, index
""",
        "glm4_moe": _GROUPED_ROUTER,
        "deepseek_v2": """
def forward(self, x):
    x = x.view(-1, self.hidden)
    logits = F.linear(x.type(torch.float32), self.weight.type(torch.float32))
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    if self.method == "greedy":
        weights, index = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
    elif self.method == "group_limited_greedy":
        groups = scores.view(-1, self.groups, self.count // self.groups).max(dim=-1).values
        best = torch.topk(groups, k=self.top_groups, dim=-1, sorted=False)[1]
        group_mask = torch.zeros_like(groups)
        group_mask.scatter_(1, best, 1)
        mask = (
            group_mask.unsqueeze(-1)
            .expand(-1, self.groups, self.count // self.groups)
            .reshape(-1, self.count)
        )
        scores = scores.masked_fill(~mask.bool(), 0.0)
        weights, index = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
    weights = weights * self.scale
    return logits, weights, index
""",
        "hy_v3": """
def forward(self, x, bias):
    x = x.reshape(-1, self.hidden)
    logits = F.linear(x.float(), self.weight.float())
    scores = torch.sigmoid(logits)
    choice = scores + bias
    _, index = torch.topk(choice, self.top_k, dim=-1, sorted=False)
    weights = scores.gather(1, index)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    weights = weights * self.scale
    return logits, weights, index
""",
        "minimax_m2": """
def forward(self, x, bias):
    x = x.reshape(-1, self.hidden)
    logits = F.linear(x.to(self.weight.dtype), self.weight)
    probabilities = F.sigmoid(logits.float())
    choice = probabilities + bias
    _, index = torch.topk(choice, self.top_k, dim=-1, sorted=False)
    weights = probabilities.gather(1, index)
    weights /= weights.sum(dim=-1, keepdim=True)
    scores = weights
    return logits, scores, index
""",
        "granitemoe": """
def forward(self, x):
    logits = F.linear(x, self.weight).float()
    value, index = logits.topk(self.top_k, dim=-1)
    weights = torch.softmax(value, dim=-1).type_as(x)
    return logits, weights, index
""",
        "cohere2_moe": """
def forward(self, x):
    logits = F.linear(x, self.weight)
    scores, index = torch.topk(logits, self.top_k, dim=-1)
    if self.choice == "softmax":
        scores = F.softmax(scores, dim=1, dtype=torch.float)
    elif self.choice == "sigmoid":
        scores = F.sigmoid(scores)
        if self.normalise:
            scores = scores / torch.sum(scores, dim=-1, keepdims=True)
    else:
        raise ValueError("`expert_selection_fn` can only be `softmax` or `sigmoid`")
    scores = scores.to(x.dtype)
    return logits, scores, index
""",
    },
    "block": {
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
