"""Of what kind an actor is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from shoal_core.runtime.worker.hosting import is_async


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
