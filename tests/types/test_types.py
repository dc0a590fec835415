"""What a type checker makes of programs that use shoal: what expressions reveal, and which lines are errors.

Each line of a snippet says what mypy must say of it: ``# reveals: TYPE``, ``# error: CODE, …``, or else nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SNIPPETS = sorted(Path(__file__).with_name("snippets").glob("*.txt"))
EXPECTED = re.compile(r"# (reveals|error): (.*)$")
SAID = re.compile(r"^(?P<file>[^:]+):(?P<line>\d+): (?P<kind>error|note): (?P<text>.*?)(?:  \[(?P<code>[a-z-]+)\])?$")
REVEALED = re.compile(r'^Revealed type is "(.*)"$')
QUALIFIED = re.compile(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])")

Said = dict[int, list[str]]


def expected(snippet: Path) -> Said:
    """Return what a snippet says must be said of its lines."""
    lines: Said = {}
    for number, line in enumerate(snippet.read_text().splitlines(), start=1):
        if found := EXPECTED.search(line):
            kind, text = found.groups()
            lines[number] = [text] if kind == "reveals" else sorted(text.split(", "))
    return lines


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    """Check all snippets in one run, strictly, as this repository checks itself; return what was said of each line."""
    folder = tmp_path_factory.mktemp("snippets")
    for snippet in SNIPPETS:
        shutil.copy(snippet, folder / f"{snippet.stem}.py")
    flags = ["--no-pretty", "--no-color-output", "--show-error-codes", "--no-error-summary"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *flags, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[str, Said] = {snippet.stem: {} for snippet in SNIPPETS}
    for line in done.stdout.splitlines():
        match = SAID.match(line)
        assert match is not None, line
        revealed = REVEALED.match(match["text"])
        what = QUALIFIED.sub("", revealed[1]) if revealed else match["code"]
        if match["kind"] == "error" or revealed:
            found[Path(match["file"]).stem].setdefault(int(match["line"]), []).append(what)
    return {name: {number: sorted(set(texts)) for number, texts in lines.items()} for name, lines in found.items()}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.stem)
def test_the_checker_says_of_each_line_what_it_should(snippet: Path, said: dict[str, Said]) -> None:
    assert said[snippet.stem] == expected(snippet)
