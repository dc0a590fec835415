"""What a worker process prints, marked with the name of what prints it.

Whoever reads a worker's pipe sees bytes, not tasks. So before the first whole line that a task prints, its worker
writes a *mark*: ``MARK``, the name for people, ``SEPARATOR``, the attempt's name for the node and the end of the line.
Marks are made only where something is printed, at the
beginning of a line, and only when the name has changed. What libraries write past Python's streams has no mark, and
counts as the output of whatever was named last; where it has no end of line, a mark comes in the middle of one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

MARK = "\x1eshoal-name:"
SEPARATOR = "\x1e"
_MARKS = re.compile(rb"(?m)^%b.*\n|%b.*$" % (MARK.encode(), MARK.encode()))


class MarkedStream(io.TextIOWrapper):
    """A text stream that marks its lines with what ``name`` returns: what ``marked`` does, or "" for nothing to say."""

    def __init__(self, binary: BinaryIO, name: Callable[[], str]) -> None:
        super().__init__(binary, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        self._name = name
        self._told = ""
        self._begins_line = True

    def write(self, text: str, /) -> int:
        """Write text, behind a mark if it is the first that something else prints."""
        if self._begins_line and text:
            name = self._name()
            if name != self._told:
                self._told = name
                super().write(f"{MARK}{name or SEPARATOR}\n")
        written = super().write(text)
        if text:
            self._begins_line = text.endswith("\n")
        return written


def marked(name: str, attempt: str = "") -> str:
    """Return what a mark says, on one line: who prints, for people, and in which attempt to run a task ("": none)."""
    return f"{' '.join(name.splitlines())}{SEPARATOR}{attempt}"


def by_name(lines: Iterable[str], name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield lines in groups of what printed them, without the marks; ``name`` is who was named before.

    The last group is always there, perhaps empty, and tells the name for the lines that follow.
    """
    group: list[str] = []
    for line in lines:
        begun, mark, told = line.partition(MARK)
        if begun or not mark:
            group.append(begun)
        if mark and (told := told.rpartition(SEPARATOR)[0]) != name:
            if group:
                yield name, group
            name, group = told, []
    yield name, group


def unmarked(text: bytes) -> tuple[bytes, list[tuple[int, str]]]:
    """Return whole lines without the marks, and where in them which attempt to run a task begins to print."""
    if MARK.encode() not in text:
        return text, []
    pieces, attempts, end = [], [], 0
    for mark in _MARKS.finditer(text):
        pieces.append(text[end : mark.start()])
        end = mark.end()
        attempt = mark.group().removesuffix(b"\n").rpartition(SEPARATOR.encode())[2]
        attempts.append((sum(map(len, pieces)), attempt.decode(errors="replace")))
    return b"".join((*pieces, text[end:])), attempts
