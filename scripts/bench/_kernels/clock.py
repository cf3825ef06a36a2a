"""How a step is timed: CUDA events around a call, with the caches cold and the launches ahead.

Owns every CUDA call of the benchmark. Must not know what it times. :class:`NoClock` stands in for
it on a CPU: it calls, and measures nothing.

Before each timed call the stream reads 2 GiB. That evicts the last call's data from the L2, leaves
no dirty lines whose writing back would be billed to the call (writing a buffer would), and takes
half a millisecond in which Python gets ahead, so that the events see the device and not the
launches. What Python takes is a number of its own, ``host``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from scripts.bench._kernels.contenders import Step

_GIB = 2**30


@dataclass(slots=True)
class Ready:
    """A step that was run once and can be timed.

    Attributes:
        step: what it was made of.
        first_s: wall time of the first call, compilation included.
        peak_mib: most memory of a call above what was there before.
        samples: microseconds, a list per round.
        host: microseconds that the call took Python.
        count: calls per round.
    """

    step: Step
    first_s: float | None = None
    peak_mib: float | None = None
    samples: list[list[float]] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    count: int = 1
    graph: torch.cuda.CUDAGraph | None = None
    stream: torch.cuda.Stream | None = None


class NoClock:
    """Runs, measures nothing."""

    times = False
    device = torch.device("cpu")

    def first(self, step: Step, graph: bool) -> tuple[Ready, tuple[torch.Tensor, ...]]:
        """Set up, call once, return the results. On a CPU there are no graphs."""
        if step.setup is not None:
            step.setup()
        return Ready(step), step.run()

    def bandwidth(self) -> float | None:
        """No copy to compare with."""
        return None

    def free(self) -> None:
        """Nothing is held."""


class Clock:
    """One GPU's. Holds 2 GiB of it to read, and 4 GiB more while it measures the copy."""

    times = True

    def __init__(self, device: torch.device) -> None:
        """Allocate what is read between calls."""
        self.device = device
        self._cold = torch.ones(2 * _GIB // 4, dtype=torch.int32, device=device)

    def bandwidth(self) -> float:
        """GB/s of a copy of 2 GiB, reading and writing counted: median of 15."""
        made = torch.empty_like(self._cold)
        # Not the buffer read between: its end would lie in the cache.
        source = torch.ones_like(self._cold)
        ready = Ready(Step(lambda: (made.copy_(source),)), count=16)
        self.sample(ready)
        return 2 * made.nbytes / statistics.median(ready.samples[0][1:]) / 1e3

    def first(self, step: Step, graph: bool) -> tuple[Ready, tuple[torch.Tensor, ...]]:
        """Set up, call for the first time and measure that, return the results.

        Args:
            step: the step.
            graph: whether it will be timed as a replay.
        """
        ready = Ready(step)
        ready.stream = torch.cuda.Stream(self.device) if graph else None
        torch.cuda.synchronize(self.device)
        # A backward runs on the stream its forward ran on: both where it will be captured.
        with torch.cuda.stream(ready.stream):
            start = time.perf_counter()
            if step.setup is not None:
                step.setup()
            results = step.run()
            torch.cuda.synchronize(self.device)
            ready.first_s = time.perf_counter() - start
        return ready, results

    def warm(self, ready: Ready, prepare: Callable[[], None] | None) -> None:
        """Measure memory, capture, choose the number of calls; arguments as for ``sample``."""
        if prepare is not None:
            prepare()
        with torch.cuda.stream(ready.stream):
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            results = ready.step.run()
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) - before
            ready.peak_mib = peak / 2**20
            del results
        if ready.stream is not None:
            ready.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(ready.graph, stream=ready.stream):
                ready.step.run()
        self.sample(ready, prepare)  # a warm-up, and how long it takes
        (took,) = ready.samples.pop()
        ready.host.clear()
        # Some 25 ms a round, of which half a millisecond a call is for the cache.
        ready.count = min(12, max(2, int(25_000 / (took + 600))))

    def sample(self, ready: Ready, prepare: Callable[[], None] | None = None) -> None:
        """One round: time a step some times.

        Args:
            ready: the step; gets the times.
            prepare: called before each call, outside the time.
        """
        events, host = [], []
        run = ready.step.run if ready.graph is None else ready.graph.replay
        for _ in range(ready.count):
            if prepare is not None:
                prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._cold.sum(dtype=torch.int32)
            begun = time.perf_counter()
            start.record()
            results = run()
            end.record()
            host.append((time.perf_counter() - begun) * 1e6)
            events.append((start, end))
            del results
        torch.cuda.synchronize(self.device)
        ready.samples.append([start.elapsed_time(end) * 1e3 for start, end in events])
        ready.host += host

    def free(self) -> None:
        """Give back what the last case held."""
        torch.cuda.empty_cache()
