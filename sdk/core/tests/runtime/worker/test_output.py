"""Lines of worker processes, and the marks that say what printed them."""

from __future__ import annotations

import io

from shoal_core.runtime.worker.output import MARK, MarkedStream, by_name, marked, unmarked


class Printer:
    """A worker's standard output, and what runs in the worker."""

    def __init__(self) -> None:
        self.name = self.attempt = ""
        self._bytes = io.BytesIO()
        self.stream = MarkedStream(self._bytes, lambda: marked(self.name, self.attempt))

    def begun(self) -> tuple[bytes, list[tuple[int, str]]]:
        """Return what is printed, and where in it attempts begin to print."""
        self.stream.flush()
        return unmarked(self._bytes.getvalue())

    def past_the_stream(self, data: bytes) -> None:
        """Write to the pipe itself, as a library in C would."""
        self.stream.flush()
        self._bytes.write(data)

    def groups(self) -> list[tuple[str, list[str]]]:
        """Return what a reader of the pipe makes of it."""
        self.stream.flush()
        lines = self._bytes.getvalue().decode().removesuffix("\n").split("\n")
        return [(name, group) for name, group in by_name(lines, "") if any(group)]


def test_lines_come_under_the_name_of_what_printed_them() -> None:
    printer = Printer()
    print("nobody", file=printer.stream)
    printer.name = "first"
    print("one", 1, file=printer.stream)
    print("two", file=printer.stream)
    printer.name = "second"
    print("three", file=printer.stream)
    assert printer.groups() == [("", ["nobody"]), ("first", ["one 1", "two"]), ("second", ["three"])]


def test_where_an_attempt_begins_to_print_is_told_also_to_who_sees_one_name() -> None:
    printer = Printer()
    print("nobody", file=printer.stream)
    printer.name = "f"
    for attempt in ("a.0", "b.0", "b.0"):
        printer.attempt = attempt
        print(attempt, file=printer.stream)
    printer.past_the_stream(b"half")
    printer.name = printer.attempt = ""
    print("nobody", file=printer.stream)
    text, begun = printer.begun()
    assert text == b"nobody\na.0\nb.0\nb.0\nhalf\nnobody\n"
    assert begun[-3:] == [(7, "a.0"), (11, "b.0"), (23, "")]
    assert printer.groups() == [("", ["nobody"]), ("f", ["a.0", "b.0", "b.0", "half"]), ("", ["nobody"])]
    assert unmarked(b"no mark\n") == (b"no mark\n", [])


def test_a_name_of_several_lines_is_told_on_one() -> None:
    printer = Printer()
    printer.name, printer.attempt = "first\nsecond", "a.0"
    print("one", file=printer.stream)
    assert printer.begun() == (b"one\n", [(0, "a.0")])
    assert printer.groups() == [("first second", ["one"])]


def test_a_name_is_told_only_where_something_is_printed() -> None:
    printer = Printer()
    for name in ("a", "b", "c"):
        printer.name = name
        printer.stream.write("")
    assert printer.groups() == []


def test_a_line_that_two_tasks_share_is_not_torn() -> None:
    printer = Printer()
    printer.name = "first"
    print("begun ", end="", file=printer.stream)
    printer.name = "second"
    print("ended", file=printer.stream)
    print("own", file=printer.stream)
    assert printer.groups() == [("first", ["begun ended"]), ("second", ["own"])]


def test_a_reader_goes_on_under_the_name_it_heard_last() -> None:
    *_, (name, rest) = by_name([f"{MARK}{marked('first')}", "x"], "")
    assert (name, rest) == ("first", ["x"])
    assert list(by_name(["y", f"{MARK}{marked('second')}"], name)) == [("first", ["y"]), ("second", [])]


def test_what_was_written_past_the_stream_without_an_end_of_line_is_no_part_of_a_mark() -> None:
    printer = Printer()
    printer.name = "first"
    print("one", file=printer.stream)
    printer.past_the_stream(b"half a line")
    printer.name = "second"
    print("two", file=printer.stream)
    assert printer.groups() == [("first", ["one", "half a line"]), ("second", ["two"])]


def test_an_empty_line_is_kept() -> None:
    assert list(by_name(["", f"{MARK}{marked('first')}", "", "x"], "")) == [("", [""]), ("first", ["", "x"])]


def test_what_is_not_text_is_written_all_the_same() -> None:
    printer = Printer()
    print("\udcff", file=printer.stream)
    assert printer.groups() == [("", ["\\udcff"])]
