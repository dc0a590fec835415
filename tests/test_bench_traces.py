"""The benchmark's row about tracing, tiny: with two programs and their clusters."""

from __future__ import annotations

import subprocess
import sys

from bench.measuring import Effort
from bench.traces import TASKS, TURN_BATCHES, Program, traced_tasks


def test_the_row_about_tracing_has_spans_sent() -> None:
    measured = traced_tasks("shoal", Effort(repetitions=1, seconds=0.01))
    assert len(measured.samples) == 1
    assert measured.details["requests_to_collector"] > 0


def test_a_turn_is_the_same_work_however_fast_the_program_is() -> None:
    endless = "import os\nwhile True: os.write(1, b'.')"
    with subprocess.Popen([sys.executable, "-c", endless], stdout=subprocess.PIPE) as process:
        program = Program(process)
        for _ in range(3):
            program.take_turn()
        assert program.tasks == 3 * TURN_BATCHES * TASKS
        process.kill()
