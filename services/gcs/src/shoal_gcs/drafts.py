"""Records of placement groups as they were encoded to be stored.

What a replica has written itself comes back as the outcome of the write, or first through its watch. It need not be
decoded again, which takes as long as all the rest.
"""

from __future__ import annotations

from shoal_core.protocol.groups import GroupRecord

MOST_DRAFTS = 1024
"""Those of writes that failed stay until so many came after them."""


class Drafts:
    """The newest records that were encoded here, by what they look like in the store."""

    def __init__(self, most: int = MOST_DRAFTS) -> None:
        self._most = most
        self._records: dict[bytes, GroupRecord] = {}

    def __len__(self) -> int:
        return len(self._records)

    def encode(self, record: GroupRecord) -> bytes:
        """Return a record as the store keeps it, and remember what that means."""
        value = record.__pydantic_serializer__.to_json(record)
        self._records[value] = record
        if len(self._records) > self._most:
            del self._records[next(iter(self._records))]
        return value

    def decode(self, value: bytes) -> GroupRecord:
        """Return the record that the store has kept as ``value``."""
        record = self._records.pop(value, None)
        return GroupRecord.model_validate_json(value) if record is None else record
