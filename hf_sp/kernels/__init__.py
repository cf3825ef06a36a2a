"""Fused operations: Triton kernels where they can run, the same arithmetic in torch elsewhere.

Importing this imports no triton: each kernel module is loaded at its first launch.
"""

from hf_sp.kernels.cross_entropy import vocab_parallel_cross_entropy
from hf_sp.kernels.norm import rms_norm
from hf_sp.kernels.swiglu import swiglu

__all__ = ["rms_norm", "swiglu", "vocab_parallel_cross_entropy"]
