"""What a function or a class is sent as."""

from __future__ import annotations

import pickle
from typing import cast

from shoal.exports import Export
from shoal_core.protocol.ids import JobId
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.tasks.functions import Exported, digest

JOB = JobId("00000001")


class Exports:
    """A runtime that only notes what is exported."""

    def __init__(self) -> None:
        self.exported: list[Exported] = []

    def export(self, job: JobId, exported: Exported) -> None:
        self.exported.append(exported)


def test_a_small_pickle_goes_along_once_it_was_made_here() -> None:
    runtime = Exports()
    export = Export(Exports)
    assert export.carried(10**6) == b"", "there is none yet"
    name = export.to(cast("Runtime", runtime), JOB)
    data = export.carried(10**6)
    assert data == runtime.exported[0].data
    assert digest(data) == name
    assert pickle.loads(data)[0].__name__ == "Exports"
    assert export.carried(len(data)) == data
    assert export.carried(len(data) - 1) == b"", "it is too large"


def test_what_was_exported_elsewhere_is_fetched() -> None:
    function = digest(b"of another process")
    export = Export(Exports, known=(JOB, function))
    assert export.to(cast("Runtime", Exports()), JOB) == function
    assert export.carried(10**6) == b""
