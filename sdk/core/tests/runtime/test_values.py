"""Values in shared memory: what is pinned for a reader is let go again, whatever goes wrong."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from shoal_core.protocol.errors import RequestTimeoutError
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.messages import SegmentPinned
from shoal_core.protocol.records import SegmentUnpinned, Stored
from shoal_core.runtime.commands import Say
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
        return SegmentPinned(segment="o1")

    async with lone_runtime(LOCAL) as lone:
        runtime = lone.runtime
        values = Values(runtime.bus, runtime.subjects, LOCAL, tmp_path, None, runtime.codec, runtime.reactor, call)
        with pytest.raises((FileNotFoundError, RequestTimeoutError)):
            values.read(Stored(node_id(1), "o1", 1_000_000))
        home = NodeId("") if pin_is_answered else node_id(1)
        assert list(runtime.reactor.commands) == [Say(node_id(1), SegmentUnpinned("o1", 1, home))]
