"""What a process counts of the tasks it owns: how they ended, how long they waited and ran. Plain data.

Counting is on the hot path, so what comes one by one is put on lists, and worked off in bulk.
"""

from __future__ import annotations

from collections import Counter

from shoal_core.protocol.measures import Histogram, Metric
from shoal_core.protocol.metrics import (
    TASK_FETCH_SECONDS,
    TASK_QUEUE_SECONDS,
    TASK_RETRIES,
    TASK_RUN_SECONDS,
    TASKS_FINISHED,
    TASKS_PENDING,
)
from shoal_core.protocol.records import Measured

MOST_LISTED = 4096
MOST_FUNCTIONS = 100
"""So many functions of one process are counted under their names."""
OTHERS = "(other)"
OUTCOMES = {
    "task": "failed",
    "task_cancelled": "cancelled",
    "task_group_removed": "cancelled",
    "actor_group_removed": "cancelled",
    "task_unschedulable": "unschedulable",
}
"""How a task has ended by the code of its error; with every other error it was lost."""
LOST = "lost"


class Tally:
    """Numbers of one process since they were last taken.

    Whoever owns tasks appends to ``names`` for each that has ended well, and to ``seconds`` for each that has run.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.seconds: list[float] = []
        self.queue_seconds = Histogram(TASK_QUEUE_SECONDS.bounds)
        """How long tasks waited; those that were sent together like the first of them."""
        self.fetch_seconds = Histogram(TASK_FETCH_SECONDS.bounds)
        self.retries = {"raised": 0, LOST: 0}
        self._run_seconds = Histogram(TASK_RUN_SECONDS.bounds)
        self._ended: Counter[tuple[str, str]] = Counter()
        self._known: set[str] = set()
        self._pending = 0

    @property
    def has_news(self) -> bool:
        """Whether anything was counted since the last time."""
        return bool(self.names or self.seconds or self._ended or any(self.retries.values()))

    def failed(self, name: str, code: str) -> None:
        """A task has ended with an error."""
        self._ended[self._shown(name), OUTCOMES.get(code, LOST)] += 1

    def work_off(self) -> None:
        """Count what is on the lists."""
        names, self.names = self.names, []
        seconds, self.seconds = self.seconds, []
        self._run_seconds.observe_all(seconds)
        for name, count in Counter(names).items():
            self._ended[self._shown(name), "ok"] += count

    def take(self, pending: int) -> list[Measured]:
        """Return what has changed since the last time; ``pending`` is how many tasks there are now."""
        self.work_off()
        measured = [
            _increment(TASKS_FINISHED, count, function=function, outcome=outcome)
            for (function, outcome), count in self._ended.items()
        ]
        measured += [_increment(TASK_RETRIES, count, reason=reason) for reason, count in self.retries.items() if count]
        for metric, histogram in (
            (TASK_QUEUE_SECONDS, self.queue_seconds),
            (TASK_RUN_SECONDS, self._run_seconds),
            (TASK_FETCH_SECONDS, self.fetch_seconds),
        ):
            if any(histogram.counts):
                measured.append(
                    Measured(metric.name, metric.kind, "", (), histogram.total, metric.bounds, histogram.counts)
                )
        if pending != self._pending:
            self._pending = pending
            measured.append(Measured(TASKS_PENDING.name, TASKS_PENDING.kind, "", (), pending))
        self._forget()
        return measured

    def _forget(self) -> None:
        self._ended.clear()
        self.retries = dict.fromkeys(self.retries, 0)
        self.queue_seconds = Histogram(TASK_QUEUE_SECONDS.bounds)
        self.fetch_seconds = Histogram(TASK_FETCH_SECONDS.bounds)
        self._run_seconds = Histogram(TASK_RUN_SECONDS.bounds)

    def _shown(self, name: str) -> str:
        """Return a name under which a function is counted: one of few, since users may draw names by the thousand."""
        if name not in self._known:
            if len(self._known) >= MOST_FUNCTIONS:
                return OTHERS
            self._known.add(name)
        return name


def _increment(metric: Metric, amount: float, **labels: str) -> Measured:
    return Measured(metric.name, metric.kind, "", tuple(sorted(labels.items())), amount)
