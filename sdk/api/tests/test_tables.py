"""Tables at any width: texts give way, nothing is cut off, ids stay whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shoal.cli.tables import new_table, print_table

ID = "e1e955348648bfdfae10128000000001"
TEXT = "waits for CPU on 1 node that could run it [CPU: 2 of 2 in use]"


def printed(width: int) -> list[str]:
    out = Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False)
    table = new_table("id", "size", "why", texts={"why"})
    table.add_row(ID, "[green]4.8 MiB[/]", TEXT.replace("[", r"\["))
    print_table(table, out)
    assert isinstance(out.file, io.StringIO)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


def test_a_wide_table_is_as_wide_as_its_contents() -> None:
    assert printed(500) == [f" id{' ' * 32}size     why", f" {ID}  4.8 MiB  {TEXT}"]


@pytest.mark.parametrize("width", [1, 20, 60, 80])
def test_a_narrow_one_breaks_texts_between_words_and_nothing_else(width: int) -> None:
    header, first, *rest = printed(width)
    assert first.startswith(f" {ID}  4.8 MiB  waits for"[: len(first)])
    column = header.index("why")
    assert " ".join(line[column:] for line in (first, *rest)) == TEXT
    assert all(not line[:column].strip() for line in rest)
