"""Ids, object keys and the subjects of channels."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.protocol.ids import (
    MAX_RETURNS,
    NO_NODE,
    ProcessId,
    TaskNumber,
    index_of,
    new_node_id,
    new_process_id,
    new_service_id,
    node_of,
    object_id_bytes,
    object_key,
    task_id_bytes,
    task_of,
)
from shoal_core.protocol.subjects import Role, Subjects, parse_channel

TASKS = st.integers(0, 2**40).map(TaskNumber)
INDEXES = st.integers(0, MAX_RETURNS)
OWNER = ProcessId("00112233445566778899aabb")


def test_an_id_is_drawn_anew_each_time_and_is_one_token() -> None:
    for draw, length in ((new_node_id, 16), (new_process_id, 24), (new_service_id, 16)):
        drawn = {draw() for _ in range(100)}
        assert len(drawn) == 100
        assert all(re.fullmatch(rf"[0-9a-f]{{{length}}}", one) for one in drawn)


def test_a_process_id_names_its_node() -> None:
    node = new_node_id()
    assert node_of(new_process_id(node)) == node
    assert node_of(new_process_id()) == NO_NODE


@given(TASKS, INDEXES)
def test_a_key_tells_the_task_and_the_return(task: TaskNumber, index: int) -> None:
    key = object_key(task, index)
    assert (task_of(key), index_of(key)) == (task, index)


@given(st.tuples(TASKS, INDEXES), st.tuples(TASKS, INDEXES))
def test_different_objects_have_different_names(one: tuple[TaskNumber, int], two: tuple[TaskNumber, int]) -> None:
    names = [object_id_bytes(OWNER, object_key(*made)) for made in (one, two)]
    assert (names[0] == names[1]) == (one == two)
    assert all(len(name) == 24 for name in names)


@given(TASKS, INDEXES)
def test_an_objects_name_begins_with_its_tasks(task: TaskNumber, index: int) -> None:
    name = object_id_bytes(OWNER, object_key(task, index))
    assert name[:20] == task_id_bytes(OWNER, task)
    assert name[:12].hex() == OWNER
    assert int.from_bytes(name[20:], "big") == index


@pytest.mark.parametrize("role", [Role.NODE, Role.PROCESS])
@given(cluster=st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
def test_a_channels_subject_says_who_sends(role: Role, cluster: str) -> None:
    sender = new_process_id() if role is Role.PROCESS else new_node_id()
    to = new_process_id()
    subject = Subjects(cluster).channel(to, role, sender)
    assert parse_channel(subject) == (role, sender)
    pattern = Subjects(cluster).channels_to(to).split(".")
    assert len(pattern) == len(subject.split("."))
    assert all(token in ("*", found) for token, found in zip(pattern, subject.split("."), strict=True))


def test_a_subject_of_a_role_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="stranger"):
        parse_channel("shoal.test.channel.to.stranger.from")
