"""How a program of the benchmark measures: repeated, and by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Measured:
    """What one process measured: samples in the row's unit, and what else is worth knowing."""

    samples: list[float]
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    repetitions: int
    seconds: float


def rate(effort: Effort, run: Callable[[], object], units: float = 1.0) -> Measured:
    """Return how many units a second ``run`` does, which does ``units`` in one call; the way Ray's own timer counts."""
    began = time.perf_counter()
    calls = 0
    while time.perf_counter() - began < min(1.0, effort.seconds):
        run()
        calls += 1
    step = calls // 10 + 1
    samples = []
    for _ in range(effort.repetitions):
        calls = 0
        began = time.perf_counter()
        while time.perf_counter() - began < effort.seconds:
            for _ in range(step):
                run()
            calls += step
        samples.append(units * calls / (time.perf_counter() - began))
    return Measured(samples)


def seconds(effort: Effort, run: Callable[[], object]) -> Measured:
    """Return how many seconds one call of ``run`` takes, after one that is not counted."""
    run()
    samples = []
    for _ in range(effort.repetitions):
        began = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began)
    return Measured(samples)
