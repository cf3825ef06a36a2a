"""hf_sp: Megatron tensor + sequence parallelism for unmodified Hugging Face models, in one line."""

from hf_sp.api import parallelize
from hf_sp.plan import Plan
from hf_sp.state import parallel_state

__version__ = "0.1.0"

__all__ = ["Plan", "__version__", "parallel_state", "parallelize"]
