"""The program of a submitted job and its guard: what it prints, how it ends, and that nothing of it is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.jobs.entrypoint import Entrypoint
from tests.integration.waiting import is_gone, until


class Run:
    """A program that runs, with a folder of its own, and what it has printed."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder / "given"
        self.folder.mkdir()
        self.printed = b""
        self.program = Entrypoint(command, environment or dict(os.environ), self.folder, self._print)

    def _print(self, data: bytes) -> None:
        self.printed += data

    def wait_for(self, text: bytes) -> None:
        """Wait until it has printed something."""
        until(lambda: text in self.printed, f"{text!r}")


def test_it_prints_and_ends_with_a_status(tmp_path: Path) -> None:
    run = Run("echo out; echo err >&2; exit 5", tmp_path)
    until(run.program.has_ended, "its end")
    assert run.program.end() == 5
    assert run.printed == b"out\nerr\n"
    assert not run.folder.exists()


def test_what_it_leaves_running_is_ended(tmp_path: Path) -> None:
    run = Run("sleep 1000 & echo $!", tmp_path)
    until(run.program.has_ended, "its end")
    assert run.program.end() == 0
    assert is_gone(int(run.printed))


def test_it_is_asked_to_end_and_may_still_print(tmp_path: Path) -> None:
    run = Run("trap 'echo bye; exit 3' TERM; echo begun; while true; do sleep 0.02; done", tmp_path)
    run.wait_for(b"begun")
    assert not run.program.has_ended()
    assert run.program.end() == 3
    assert run.printed.endswith(b"bye\n")


def test_where_it_cannot_be_started_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        Run("true", tmp_path, {"LONG": "x" * (1 << 20)})
    assert not (tmp_path / "given").exists()
