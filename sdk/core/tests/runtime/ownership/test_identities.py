"""Ids as programs hold them."""

from __future__ import annotations

import copy
import pickle

import pytest

from shoal_core.runtime.ownership.identities import ActorID, BaseID, JobID, NodeID, TaskID, WorkerID


@pytest.mark.parametrize("kind", [ActorID, JobID, NodeID, TaskID, WorkerID])
def test_an_id_is_its_bytes_and_its_digits(kind: type[BaseID]) -> None:
    one = kind.from_random()
    assert one == kind(one.binary()) == kind.from_binary(one.binary()) == kind.from_hex(one.hex()) == kind(one.hex())
    assert (len(one.binary()), one.binary().hex()) == (kind.size(), one.hex())
    assert hash(one) == hash(kind(one.hex()))
    assert one != kind.from_random()
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    assert type(pickle.loads(pickle.dumps(one))) is kind
    assert repr(one) == f"{kind.__name__}({one.hex()})"


def test_the_id_of_nothing_is_one() -> None:
    assert JobID.nil() == JobID.nil() == JobID("ffffffff")
    assert JobID.nil().is_nil()
    assert not JobID("00000001").is_nil()
    assert JobID.from_int(1) == JobID("00000001")


@pytest.mark.parametrize(("made_of", "error"), [(b"123", ValueError), ("zz" * 4, ValueError), ("00", ValueError)])
def test_what_is_no_id_is_refused(made_of: bytes | str, error: type[Exception]) -> None:
    with pytest.raises(error, match="JobID"):
        JobID(made_of)
    with pytest.raises(TypeError, match="int"):
        JobID(1)  # type: ignore[arg-type]
