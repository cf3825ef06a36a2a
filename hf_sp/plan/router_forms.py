"""Texts of the forwards of routers whose maths is known (``known_forms``), as data."""

from __future__ import annotations

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

# name of the form -> its text
ROUTERS: dict[str, str] = {
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
    "kolibri1": """
def forward(self, x):
    x = x.reshape(-1, self.hidden)
    if (
        x.is_cuda
        and x.dtype == self.weight.dtype
        and not torch.is_grad_enabled()
        and is_torch_greater_or_equal("2.8.0")
    ):
        logits = torch.mm(x, self.weight.t(), out_dtype=torch.float32)
    else:
        logits = F.linear(x.type(torch.float32), self.weight.type(torch.float32))
    index = torch.topk(logits + self.e_score_correction_bias, self.top_k, dim=-1)[1]
    scores = logits.gather(1, index).sigmoid()
    if self.normalise:
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return logits, scores, index
""",
    "granitemoe": """
def forward(self, x):
    logits = F.linear(x, self.weight).float()
    value, index = logits.topk(self.top_k, dim=-1)
    weights = torch.softmax(value, dim=-1).type_as(x)
    return logits, weights, index
""",
    "ernie4_5_moe": """
def forward(self, x):
    kind = x.device.type if isinstance(x.device.type, str) else "cpu"
    with maybe_autocast(device_type=kind, enabled=False):
        logits = F.linear(x.float(), self.weight.float())
        weights = F.softmax(logits, dim=1, dtype=torch.float)
        _, index = torch.topk(self.correction(weights), self.top_k, dim=-1)
        weights = torch.gather(weights, dim=-1, index=index)
        weights = weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=self.least)
    weights = weights.to(x.dtype)
    return logits, weights, index
""",
    "hunyuan_v1_moe": """
def forward(self, x):
    x = x.reshape(-1, x.shape[-1])
    if self.linear.weight.dtype == torch.float32:
        x = x.float()
    logits = self.linear(x)
    weights = F.softmax(logits, dim=1, dtype=torch.float)
    weights, index = torch.topk(weights, self.top_k, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return logits, weights.to(logits.dtype), index
""",
    "afmoe": """
def forward(self, x, bias):
    _, _, hidden = x.shape
    x = x.view(-1, hidden)
    logits = self.linear(x).to(torch.float32)
    scores = torch.sigmoid(logits)
    _, index = torch.topk(scores + bias, k=self.top_k, dim=1)
    weights = scores.gather(dim=1, index=index)
    total = weights.sum(dim=-1, keepdim=True) + 1e-20
    weights = weights / total
    weights = weights * self.scale
    return logits, weights, index
""",
    "laguna": """
def forward(self, x):
    x = x.reshape(-1, self.hidden)
    logits = F.linear(x, self.weight).float()
    if self.cap > 0.0:
        logits = torch.tanh(logits / self.cap) * self.cap
    scores = torch.sigmoid(logits)
    choice = scores + self.e_score_correction_bias.to(scores.dtype)
    _, index = torch.topk(choice, self.top_k, dim=-1)
    weights = scores.gather(-1, index)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    weights = weights.to(x.dtype)
    return logits, weights, index
""",
    "gpt_oss": """
def forward(self, x):
    logits = F.linear(x, self.weight, self.bias)
    value, index = torch.topk(logits, self.top_k, dim=-1)
    weights = F.softmax(value, dim=1, dtype=value.dtype)
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
}
