"""Lines that many processes print alike, which a driver shows once, with how many there were.

1. Two lines of one stream are alike if they have the same words, but for words with a digit.
2. The first is shown at once. So is what the same process prints again, as long as no other has printed alike.
3. What several processes print alike is counted, until the first is as old as a *window*. Then the last of it is shown,
   with its count; it is counted anew from then on, unless it was only one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shoal_core.protocol.ids import ProcessId
from shoal_core.protocol.messages import LogLines

WINDOW_SECONDS = 5.0
MOST_KINDS = 10_000
"""So many kinds of lines are remembered; of more the oldest are not."""
_DIGIT = re.compile(r"\d")
HINT = " (What several processes print alike is shown once; SHOAL_DEDUP_LOGS=0 shows all of it.)"


@dataclass(frozen=True)
class RepeatRules:
    """How long lines that are alike are counted, which are shown in any case, and which never."""

    window_seconds: float = WINDOW_SECONDS
    allowed: re.Pattern[str] | None = None
    skipped: re.Pattern[str] | None = None


@dataclass(slots=True)
class _Alike:
    """What is known of lines that are alike: since when, who prints them, and which was the last that was not shown."""

    since: float
    sources: set[ProcessId]
    count: int = 0
    last: tuple[LogLines, str] | None = None


class Repeats:
    """What is to be shown of the lines of a job's processes. ``waiting``: so many kinds have lines that are not yet."""

    def __init__(self, rules: RepeatRules) -> None:
        self.window_seconds = rules.window_seconds
        self.waiting = 0
        self._allowed = rules.allowed
        self._skipped = rules.skipped
        self._kinds: dict[tuple[str, str], _Alike] = {}
        self._was_hinted = False

    def take(self, lines: LogLines, now: float) -> list[LogLines]:
        """Take in what a process has printed, and return what is to be shown now."""
        shown = self.due(now)
        if fresh := [line for line in lines.lines if self._is_fresh(line, lines, now)]:
            shown.append(lines if len(fresh) == len(lines.lines) else lines.model_copy(update={"lines": fresh}))
        while len(self._kinds) > MOST_KINDS:
            shown += self._end_first()
        return shown

    def due(self, now: float) -> list[LogLines]:
        """Return what was counted for so long that it is to be shown now."""
        shown: list[LogLines] = []
        while self._kinds and now - next(iter(self._kinds.values())).since >= self.window_seconds:
            kind, alike = next(iter(self._kinds.items()))
            shown += self._end_first()
            if alike.count > 1:
                self._kinds[kind] = _Alike(now, alike.sources)
        return shown

    def end(self) -> list[LogLines]:
        """Return all that was not shown yet."""
        return [one for _ in range(len(self._kinds)) for one in self._end_first()]

    def _is_fresh(self, line: str, lines: LogLines, now: float) -> bool:
        """Tell whether a line is to be shown at once."""
        if self._allowed is not None and self._allowed.search(line):
            return True
        if self._skipped is not None and self._skipped.search(line):
            return False
        words = " ".join([word for word in line.split() if not _DIGIT.search(word)])
        if not words:
            return True
        alike = self._kinds.get((lines.stream, words))
        if alike is None:
            self._kinds[lines.stream, words] = _Alike(now, {lines.process_id})
            return True
        alike.sources.add(lines.process_id)
        if len(alike.sources) == 1:
            return True
        self.waiting += not alike.count
        alike.count += 1
        alike.last = lines, line
        return False

    def _end_first(self) -> list[LogLines]:
        """Forget the lines whose first is oldest, and return the last of them, if there are some not shown."""
        kind = next(iter(self._kinds))
        alike = self._kinds.pop(kind)
        if alike.last is None:
            return []
        self.waiting -= 1
        lines, line = alike.last
        if alike.count > 1:
            line = f"{line} [repeated {alike.count}x across cluster]{'' if self._was_hinted else HINT}"
            self._was_hinted = True
        return [lines.model_copy(update={"lines": [line]})]


def repeat_rules_of(variables: Mapping[str, str]) -> RepeatRules | None:
    """Return what the environment says of lines that are alike; None: all are to be shown.

    Raises ``ValueError`` for what is wrong there.
    """
    if variables.get("SHOAL_DEDUP_LOGS", "1") == "0":
        return None
    return RepeatRules(
        _seconds(variables, "SHOAL_DEDUP_LOGS_AGG_WINDOW_S"),
        _pattern(variables, "SHOAL_DEDUP_LOGS_ALLOW_REGEX"),
        _pattern(variables, "SHOAL_DEDUP_LOGS_SKIP_REGEX"),
    )


def _seconds(variables: Mapping[str, str], name: str) -> float:
    text = variables.get(name)
    try:
        seconds = float(text) if text else WINDOW_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name} must be seconds, more than 0, got {text!r}.")
    return seconds


def _pattern(variables: Mapping[str, str], name: str) -> re.Pattern[str] | None:
    text = variables.get(name)
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise ValueError(f"{name} must be a regular expression, got {text!r}: {error}.") from None
