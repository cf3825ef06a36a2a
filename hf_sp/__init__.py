"""hf_sp: Megatron tensor + sequence parallelism for unmodified Hugging Face models, in one line."""

from hf_sp.versions import warn_if_untested

# Before the rest, which a version that is too new may fail to import.
warn_if_untested()

from hf_sp.api import Support, parallelize, supports
from hf_sp.loading import from_pretrained
from hf_sp.model.gradients import grad_norm
from hf_sp.plan import Plan
from hf_sp.proof.found import Verification
from hf_sp.proof.replicas import check_replicas
from hf_sp.proof.verify import verify
from hf_sp.state import parallel_state
from hf_sp.torch_private import one_gloo_thread

# Now, for whoever makes the process groups: a launcher's script, accelerate, parallelize.
one_gloo_thread()

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Support",
    "Verification",
    "__version__",
    "check_replicas",
    "from_pretrained",
    "grad_norm",
    "parallel_state",
    "parallelize",
    "supports",
    "verify",
]
