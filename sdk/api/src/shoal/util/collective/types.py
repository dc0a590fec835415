"""What collective operations are told: by which means, and how values are combined."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Backend(StrEnum):
    """By which means a group communicates. Here that is always the object store, which GLOO stands for.

    NCCL is known by name only: it is refused where a group is made. ``Backend("gloo")`` returns the member.
    """

    NCCL = "nccl"
    GLOO = "gloo"


class ReduceOp(IntEnum):
    """How the elements of all ranks' tensors become one."""

    SUM = 0
    PRODUCT = 1
    MIN = 2
    MAX = 3
