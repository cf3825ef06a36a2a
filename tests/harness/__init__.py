"""What the tests stand on.

Ranks (pool), models and batches (tiny, batches), comparisons (report, compare), training parity
(parity), kinds of use (inputs, uses, generation, noise).
"""

import inspect

from harness.tiny import float64_router
from hf_sp.plan.known_forms import FORMS

# A block whose router has another forward is refused: the one of the tests is made known.
FORMS["router"]["float64"] = inspect.getsource(float64_router).replace("functional.", "F.")
