"""Carrying out a core's stores and loads, through lost connections, with a certain outcome.

A compare-and-set whose answer was lost may or may not have happened. The key itself tells, read through the leader of
its stream: at the old revision still, it did not, and is tried again; with our value, it did; else others came between.
"""

from __future__ import annotations

import asyncio
import logging

from shoal_core.bus.keyvalue import Entry, KeyValue, came_too_late
from shoal_core.bus.streams import is_full
from shoal_core.protocol.effects import Conflict, Store, Stored, StoreRefused
from shoal_core.protocol.errors import (
    BusClosedError,
    BusError,
    JetStreamError,
    JetStreamUnavailableError,
    PayloadTooLargeError,
    RevisionConflict,
    ShoalError,
)

logger = logging.getLogger("shoal.service")

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 1.0


class Patience:
    """Pauses between attempts, each twice as long as the one before, up to a second."""

    def __init__(self) -> None:
        self._seconds = FIRST_PAUSE_SECONDS

    async def pause(self, what: str, error: Exception) -> None:
        """Wait before the next attempt; a long wait is logged."""
        if self._seconds >= LONGEST_PAUSE_SECONDS:
            logger.warning("%s still fails, trying on: %s", what, error)
        await asyncio.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, LONGEST_PAUSE_SECONDS)


async def see_store_through(bucket: KeyValue, store: Store, failure: Exception) -> Stored | Conflict | StoreRefused:
    """Go on with a store whose first attempt ended with ``failure``, until it is certain whether it took effect."""
    uncertain = not came_too_late(failure)
    if uncertain and isinstance(failure, ShoalError) and _is_final(failure):
        return StoreRefused(store.key, failure, store.context, store.bucket)
    patience = Patience()
    while True:
        try:
            if uncertain:
                outcome = await _resolve(bucket, store)
                if outcome is not None:
                    return outcome
            return await _attempt(bucket, store)
        except RevisionConflict as conflict:
            if not uncertain:
                return Conflict(store.key, conflict.value, conflict.revision, store.context, store.bucket)
        except BusClosedError:
            raise
        except (BusError, JetStreamUnavailableError) as error:
            if _is_final(error):
                return StoreRefused(store.key, error, store.context, store.bucket)
            uncertain = True
            await patience.pause(f"storing {store.key!r}", error)


def _is_final(error: Exception) -> bool:
    """Tell whether trying again would end the same way: a full store, too, refuses, and whoever asked is to know."""
    if isinstance(error, JetStreamError):
        return error.code < 500 or is_full(error)
    return isinstance(error, PayloadTooLargeError)


async def _attempt(bucket: KeyValue, store: Store) -> Stored:
    """Carry out a store once."""
    if store.value is None:
        await bucket.delete(store.key, revision=store.revision)
        return Stored(store.key, None, 0, store.context, store.bucket)
    revision = await bucket.put(store.key, store.value, revision=store.revision)
    return Stored(store.key, store.value, revision, store.context, store.bucket)


async def _resolve(bucket: KeyValue, store: Store) -> Stored | Conflict | None:
    """Find out whether a store whose answer was lost took effect; None: it did not, and may be tried again."""
    entry = await bucket.get(store.key)
    value, revision = (entry.value, entry.revision) if entry is not None else (None, 0)
    if revision == store.revision:
        return None
    if value == store.value:
        return Stored(store.key, value, revision, store.context, store.bucket)
    return Conflict(store.key, value, revision, store.context, store.bucket)


async def perform_load(bucket: KeyValue, key: str) -> Entry | None:
    """Read a key through its leader, as often as it takes."""
    patience = Patience()
    while True:
        try:
            return await bucket.get(key)
        except BusClosedError:
            raise
        except (BusError, JetStreamUnavailableError) as error:
            if _is_final(error):
                raise
            await patience.pause(f"reading {key!r}", error)
