"""How far two reports may be apart, and where they are farther."""

from __future__ import annotations

# The model is in float64, but transformers computes the loss, the norms and RoPE in float32 (eps
# 6e-8), and Trainer adds up the loss in float32. Four AdamW steps pass such an error of a gradient
# on at most once each, as a relative error of the update where the gradient is not near zero: 1e-5
# is twenty times what that gives (largest seen 1e-6), and a hundred times smaller than any fault
# here makes (a patch taken away changes the first digits).
TOLERANCE = 1e-5


def differences(a, b, tolerance=TOLERANCE, path=""):
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b})
        return [d for k in keys for d in differences(a.get(k), b.get(k), tolerance, f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, tolerance, f"{path}[{i}]")]
    if isinstance(a, float) and isinstance(b, float):
        return [] if abs(a - b) <= tolerance * max(abs(a), abs(b)) else [f"{path}: {a} {b}"]
    return [] if a == b else [f"{path}: {a} {b}"]
