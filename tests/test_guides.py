"""The commands and whole programs of guides run as they stand there; those for containers are in tests/integration."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_core.bus.broker import find_server
from tests.guides import ROOT, blocks


def run(script: str, folder: Path, where: Path = ROOT) -> str:
    """Run a script of the shell to its end, with the commands of this environment; return what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), str(Path(find_server()).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=kept | {"PATH": path, "XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder), "COLUMNS": "200"},
        cwd=where,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("guide", "printed"),
    [
        ("laptop.md", ["285\n"]),
        ("coming-from-ray.md", ["14\nTypeError\n"]),
        ("tasks.md", ["6\n", "3\n", "{'FINISHED': 5}\nstep NORMAL_TASK\n"]),
    ],
)
def test_programs_print_what_the_guide_says(guide: str, printed: list[str], tmp_path: Path) -> None:
    for program, expected in zip(blocks(guide, "python"), printed, strict=True):
        (tmp_path / "program.py").write_text(program)
        assert run(f"python {tmp_path}/program.py", tmp_path, tmp_path) == expected


def test_the_commands_for_a_laptop(tmp_path: Path) -> None:
    (commands,) = blocks("laptop.md", "sh")
    try:
        assert "1 of 1 nodes alive" in run(commands, tmp_path)
    finally:
        run("shoal down", tmp_path)


def test_the_commands_about_jobs(tmp_path: Path) -> None:
    (commands,) = blocks("jobs.md", "sh")
    program = "import shoal, sys; shoal.init(); print('trained', sys.argv[1:], shoal.cluster_resources()['CPU'])"
    (tmp_path / "train.py").write_text(program)
    try:
        run("shoal up --num-cpus 3", tmp_path)
        printed = run(commands, tmp_path, tmp_path)
    finally:
        run("shoal down", tmp_path)
    assert printed.count("trained [] 3.0\n") == 1
    for text in (
        "trained ['--epochs', '3'] 3.0\n",
        "SUCCEEDED: The job has finished",
        "It has ended already",
        "Deleted",
    ):
        assert text in printed


def test_the_commands_about_security(tmp_path: Path) -> None:
    commands = "\n".join(blocks("security.md", "sh"))
    # The broker only reads its configuration, and ends.
    assert "has new files" in run(commands.replace("nats-server ", "nats-server -t "), tmp_path, tmp_path)


@pytest.mark.parametrize("guide", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_between_guides_lead_somewhere(guide: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "docs" / guide).read_text()):
        assert (ROOT / "docs" / target).exists(), target
