"""Values in shared memory: what is pinned for a reader is let go again, whatever goes wrong."""

from __future__ import annotations

import pickle
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy
import pytest

from shoal_core.protocol.errors import RequestTimeoutError
from shoal_core.protocol.messages import Done
from shoal_core.protocol.records import SegmentUnpinned, Stored
from shoal_core.runtime import segments
from shoal_core.runtime.commands import Say
from shoal_core.runtime.serialization import Codec, Serialized, as_inline, written
from shoal_core.runtime.values import Values
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.runtimes import lone_runtime

LOCAL = process_id(1)


@pytest.mark.parametrize("pin_is_answered", [True, False])
async def test_a_pin_ends_where_the_segment_cannot_be_mapped(tmp_path: Path, pin_is_answered: bool) -> None:
    def call(coroutine: Coroutine[Any, Any, Any]) -> Any:
        coroutine.close()
        if not pin_is_answered:
            raise RequestTimeoutError("no answer")
        return Done()

    async with lone_runtime(LOCAL) as lone:
        runtime = lone.runtime
        values = Values(runtime.bus, runtime.subjects, LOCAL, tmp_path, runtime.codec, runtime.reactor, call)
        with pytest.raises((FileNotFoundError, RequestTimeoutError)):
            values.read(Stored(node_id(1), "o1", 1_000_000))
        assert list(runtime.reactor.commands) == [Say(node_id(1), SegmentUnpinned("o1", 1))]


@pytest.mark.parametrize("populate_bytes", [4096, 1 << 20])
def test_a_segment_is_written_whole_however_its_pages_are_populated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, populate_bytes: int
) -> None:
    monkeypatch.setattr(segments, "POPULATE_BYTES", populate_bytes)
    contents = bytes(range(256)) * 400
    with open(tmp_path / "o1", "wb") as file:
        file.truncate(200_000)
    serialized = Serialized(b"", (memoryview(contents),), raw=True)
    size = segments.write(tmp_path, "o1", serialized)
    assert (tmp_path / "o1").read_bytes()[:size] == written(serialized)
    value, mapping = segments.read(tmp_path, "o1", size, lambda segment: None)
    assert value == contents
    mapping.close()


def test_a_value_in_a_segment_is_the_same_inline() -> None:
    codec = Codec(lambda ref: None)
    for value in ({"a": [1, 2]}, b"x" * 200_000, bytearray(b"y" * 1000), numpy.arange(1000)):
        inline = as_inline(written(codec.dump(value)))
        assert pickle.dumps(codec.load(inline)) == pickle.dumps(value)
