"""Of what kind an actor is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from shoal_core.runtime.worker.hosting import is_async, one_line


class Plain:
    """Nothing of it is async."""

    class Inner:
        """Of no concern, since it is no method."""

        async def wait(self) -> None: ...

    def get(self) -> int:
        return 0


class Inherits(Plain):
    """One method of its own is async."""

    async def wait(self) -> None: ...


class Yields:
    """An async generator."""

    async def items(self) -> AsyncIterator[int]:
        yield 0


class Static:
    """Neither is given the instance."""

    @staticmethod
    async def wait() -> None: ...


class Bound:
    """A method of the class."""

    @classmethod
    async def wait(cls) -> None: ...


class Special:
    """A method that all classes have, replaced."""

    async def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("cls", "expected"),
    [(object, False), (Plain, False), (Inherits, True), (Yields, True), (Static, True), (Bound, True), (Special, True)],
)
def test_an_actor_is_async_if_any_of_its_methods_is(cls: type[Any], expected: bool) -> None:
    assert is_async(cls) is expected


def test_what_an_actor_is_called_is_one_line_of_what_can_be_sent() -> None:
    assert one_line("Named(index=3,  x)") == "Named(index=3,  x)"
    assert one_line("Named(\n  3,\r\n)\x1e") == "Named(   3, )"
    assert len(one_line("x" * 5000)) == 1000
    one_line("\udcff").encode()
