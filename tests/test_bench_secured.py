"""The benchmark's clusters with and without TLS and authentication."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.measuring import Effort
from bench.secured import CLUSTER, USUAL_STORE_BYTES, secured, standing
from shoal_core.bus import connect
from shoal_core.bus.credentials import TlsFiles
from shoal_core.protocol.errors import AuthenticationError
from shoal_core.protocol.subjects import Role


def test_a_row_is_measured_on_both() -> None:
    measured = secured("put_small")("shoal", Effort(repetitions=1, seconds=0.01))
    assert measured.samples == [measured.details["open"] / measured.details["secured"]]


def test_nobody_gets_into_the_one_without_a_credential(tmp_path: Path) -> None:
    async def join(driver: dict[str, str]) -> None:
        tls = TlsFiles(ca_file=driver["SHOAL_CA_FILE"])
        async with connect(driver["SHOAL_ADDRESS"], role=Role.PROCESS, identity="p", cluster=CLUSTER, tls=tls):
            pass

    stores = [str(tmp_path), str(tmp_path)]
    with standing(tmp_path, protected=True, store_bytes=USUAL_STORE_BYTES, stores=stores) as driver:
        assert driver["SHOAL_ADDRESS"].startswith("tls://")
        with pytest.raises(AuthenticationError):
            asyncio.run(join(driver))
