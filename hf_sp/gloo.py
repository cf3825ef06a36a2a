"""Gloo's threads let go of their tensors before the interpreter goes.

A thread of gloo drops a finished collective's tensors under the interpreter's lock, some time after
the call that waited for it came back. If the interpreter has begun to end by then, the process is
aborted ("terminate called without an active exception"): one plain torch script in five on two
busy cores. `destroy_process_group` does not end these threads while anybody holds the group. And
who counts bytes would count theirs. Must not know hf_sp. Collectives: none.
"""

from __future__ import annotations

import atexit
import functools
import time
from pathlib import Path

THREAD = "(pt_gloo_runloop)"
PAUSE_S = 0.01
AT_MOST_S = 2.0


@functools.cache
def finish_at_exit() -> None:
    """Have `finish` called when this process ends, after what is registered from now on."""
    atexit.register(finish)


def finish() -> None:
    """Let go of the interpreter's lock until no thread of gloo runs any more."""
    quiet, deadline = 0, time.monotonic() + AT_MOST_S
    # Twice: one may be on its way from a run queue to the lock.
    while _running() is not None and quiet < 2 and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
        quiet = 0 if _running() else quiet + 1


def _running() -> bool | None:
    """Whether a thread of gloo runs; None where there is none, or no Linux to ask."""
    states = [_state(path) for path in Path("/proc/self/task").glob("*/stat")]
    found = [state for state in states if state]
    return any(state != "S" for state in found) if found else None


def _state(path: Path) -> str:
    """The state of a thread of gloo (S: it sleeps); empty for others and those that have ended."""
    try:
        name, _, rest = path.read_text().partition(")")
    except OSError:
        return ""
    return rest.split()[0] if f"{name})".endswith(THREAD) else ""
