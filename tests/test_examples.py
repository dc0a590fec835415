"""Every example runs, as a user would run it, and says what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

SAYS = {
    "quickstart.py": [
        "8 squares: [0, 1, 4, 9, 16, 25, 36, 49]",
        "none of them this one: True",
        "merge sort of 200 numbers is right: True",
        "a nap of 0.1 s is over, 2 to go",
        "[124999.5, 374999.5, 624999.5, 874999.5]",
        "ZeroDivisionError: division by zero",
        "Done, and everything is gone again.",
    ],
    "actors.py": [
        "counted by three tasks: 30",
        "at once: ['finished', 'finished', 'finished', 'finished']",
        "waited for: [1]",
        "three threads: ['met', 'met', 'met']",
        "threads of the group: ['io', 'io']",
        "beside those who read: computed",
        "in a group of our choice: replied",
        "readers: ['read', 'read']",
        "streamed: [0, 1, 2, 3, 4]",
        "one and the same: True",
        "killed: True",
    ],
    "pool_and_queue.py": [
        "doubled: [2, 4, 6, 8]",
        "in any order: [10, 12, 14]",
        "got work 9",
        "both together: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]",
        "a batch: [1, 2, 3]",
    ],
    "collective.py": ["summed: [3.0, 3.0, 3.0, 3.0]", "told by the first: [0.1, 0.01]"],
    "placement.py": [
        "by a selector: b",
        "fallen back: c",
        "by labels: b",
        "bound to a node: c",
        "where its data lies: c",
        "nowhere: Task zone() cannot run",
    ],
    "placement_groups.py": [
        "all bundles are reserved: True",
        "nodes of the gang: 3",
        "their tasks run in the group: [True, True, True, True]",
        "another gang has no room: False",
        "found by its name: True",
        "now it has: True",
        "the trainers ended with their group, which is REMOVED",
    ],
    "environments.py": [
        "of the job: ['test', 'the job']",
        "of a task: ['test', 'the task']",
        "sent: a library of our own reads what lies beside it",
        "of a pool: ['pool', 'the job']",
        "not set up: the licence server is away",
    ],
    "jobs.py": [
        "squares: [0, 1, 4, 9, 16]",
        "stage: test",
        "it has SUCCEEDED with {'team': 'examples'}",
        "begins",
        "another: The entrypoint failed with exit code 3.",
        "the last was STOPPED",
    ],
    "generators.py": [
        "came: 0",
        "came: 2",
        "before the error: 0",
        "the error: ValueError: number 1 is not to be had",
        "from an actor: [0, 1, 2, 3, 4]",
        "the first of many: 0",
        "cancelled, as we wanted",
        "side by side: [0, 1, 2] [0, 1, 2]",
        "mixed: [0, 0, 1, 1, 2, 2, 49]",
        "never more than two ahead: [0, 1, 2, 3]",
        "closed: []",
    ],
    "asyncio_and_cancel.py": [
        "ready: [1]",
        "awaited: 1",
        "all at once: ['finished', 'finished', 'finished', 'finished']",
        "an actor that awaits tasks: 5",
        "done: [1, 1]",
        "still running, but we have no more time",
        "called off: slow() was cancelled.",
        "cancelled with the task that it started",
        "killed",
        "the actor's call was cancelled, in its own time",
    ],
    "namespaces.py": [
        "colors: ['the first driver']",
        "fruit: no orange in this namespace",
        "fruit: ['the first driver', 'the second driver']",
        "there are: [{'name': 'orange', 'namespace': 'colors'}, {'name': 'orange', 'namespace': 'fruit'}]",
        "left: []",
    ],
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_runs(path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    environment["SHOAL_DEDUP_LOGS"] = "0"  # or a line that two processes print alike may be shown by one of them
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], env=environment, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in SAYS[path.name] if line not in done.stdout] == [], done.stdout
