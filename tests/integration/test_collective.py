"""Collective operations among actors and tasks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shoal
from shoal import exceptions
from shoal.util import collective
from shoal.util.collective import types
from shoal.util.collective.types import Backend, ReduceOp
from tests.integration.waiting import get, until

SIZE = 3


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with shoal.init(num_cpus=2, log_to_driver=False):
        yield


class Tensor:
    """As much of a tensor of PyTorch as is looked at."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def detach(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.array


class RankClass:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def join(self, group: str = "default", size: int = SIZE, **options: Any) -> tuple[int, int]:
        collective.init_collective_group(size, self.rank, **({"backend": "gloo", "group_name": group} | options))
        return collective.get_rank(group), collective.get_collective_group_size(group)

    def leave(self, group: str = "default") -> tuple[int, int, bool]:
        collective.destroy_collective_group(group)
        return (
            collective.get_rank(group),
            collective.get_collective_group_size(group),
            collective.is_group_initialized(group),
        )

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call an operation with copies of the arrays among its arguments, and return the first of these."""
        given = [np.array(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        if name in ("allgather", "reducescatter"):
            at = 0 if name == "allgather" else 1
            given[at] = [np.array(one) for one in given[at]]
        getattr(collective, name)(*given, **kwargs)
        return given[0] if given else None

    def add_tensors(self) -> list[float]:
        """Reduce what offers its memory as a CPU tensor of PyTorch does."""
        tensor = Tensor(of(self.rank))
        collective.allreduce(tensor)
        return [float(one) for one in tensor.array]

    def pass_on(self, data: bytes) -> bytes:
        """Hand what rank 0 has to rank 1, in three parts."""
        for part in range(3):
            array = np.frombuffer(data, np.uint8).copy() + part
            if self.rank == 0:
                collective.send(array, 1)
            elif self.rank == 1:
                got = np.zeros_like(array)
                collective.recv(got, 0)
                assert (got == array).all()
        return data


Rank = shoal.remote(num_cpus=0)(RankClass)


def ranks(group: str = "default", size: int = SIZE, **options: Any) -> list[Any]:
    actors = [Rank.remote(rank) for rank in range(size)]
    assert get([actor.join.remote(group, size, **options) for actor in actors]) == [
        (rank, size) for rank in range(size)
    ]
    return actors


@pytest.fixture(scope="module")
def group(cluster: None) -> list[Any]:
    return ranks()


def of(rank: int, size: int = 4) -> np.ndarray[Any, Any]:
    return np.full(size, rank + 1.0)


@pytest.mark.parametrize(
    ("op", "expected"), [(ReduceOp.SUM, 6), (ReduceOp.PRODUCT, 6), (ReduceOp.MIN, 1), (ReduceOp.MAX, 3)]
)
@pytest.mark.parametrize("size", [4, 500_000])
def test_allreduce(group: list[Any], op: ReduceOp, expected: int, size: int) -> None:
    reduced = get([actor.call.remote("allreduce", of(rank, size), op=op) for rank, actor in enumerate(group)])
    assert all((one == np.full(size, expected)).all() for one in reduced)


def test_tensors_share_their_memory(group: list[Any]) -> None:
    assert get([actor.add_tensors.remote() for actor in group]) == [[6.0] * 4] * SIZE


def test_reduce_fills_the_tensor_of_one(group: list[Any]) -> None:
    made = get([actor.call.remote("reduce", of(rank), dst_rank=1) for rank, actor in enumerate(group)])
    assert [one[0] for one in made] == [1, 6, 3]


def test_broadcast(group: list[Any]) -> None:
    made = get([actor.call.remote("broadcast", of(rank), src_rank=2) for rank, actor in enumerate(group)])
    assert [one.tolist() for one in made] == [of(2).tolist()] * SIZE


def test_allgather(group: list[Any]) -> None:
    places = [np.zeros(4)] * SIZE
    made = get([actor.call.remote("allgather", places, of(rank)) for rank, actor in enumerate(group)])
    assert [[one[0] for one in places] for places in made] == [[1, 2, 3]] * SIZE


def test_reducescatter(group: list[Any]) -> None:
    parts = [np.full(2, 10.0 * part) for part in range(SIZE)]
    made = get([actor.call.remote("reducescatter", np.zeros(2), parts) for actor in group])
    assert [one.tolist() for one in made] == [[0, 0], [30, 30], [60, 60]]


def test_send_and_recv_keep_their_order(group: list[Any]) -> None:
    get([actor.pass_on.remote(b"abc") for actor in group])
    get([actor.pass_on.remote(bytes(300_000)) for actor in group])


def test_barrier(group: list[Any]) -> None:
    early = [actor.call.remote("barrier") for actor in group[:2]]
    assert shoal.wait(early, num_returns=1, timeout=0.3)[0] == []
    get([*early, group[2].call.remote("barrier")])


def test_ranks_that_disagree_are_all_told() -> None:
    one, other = ranks("odd", 2)
    refs = [one.call.remote("allreduce", of(0), "odd"), other.call.remote("barrier", "odd")]
    for ref in refs:
        with pytest.raises(RuntimeError, match="Ranks disagree"):
            get(ref)
    with pytest.raises(ValueError, match="differ in shape or type"):
        get([one.call.remote("allreduce", of(0), "odd"), other.call.remote("allreduce", of(0, 5), "odd")])
    get([actor.call.remote("barrier", "odd") for actor in (one, other)])


def test_who_waits_is_told_which_ranks_are_missing() -> None:
    one, other = ranks("lame", 2, gloo_timeout=300)
    with pytest.raises(TimeoutError, match=r"barrier has waited 0\.3 s for ranks \[1\]"):
        get(one.call.remote("barrier", "lame"))
    with pytest.raises(TimeoutError, match=r"recv from rank 0 has waited 0\.3 s"):
        get(other.call.remote("recv", of(0), 0, "lame"))
    with pytest.raises(TimeoutError, match=r"send to rank 1 has waited"):
        get(one.call.remote("send", of(0), 1, "lame"))


def test_actors_that_were_declared_join_with_their_first_operation() -> None:
    actors = [Rank.remote(rank) for rank in range(2)]
    collective.create_collective_group(actors, 2, [1, 0], Backend.GLOO, "declared")
    with pytest.raises(RuntimeError, match="declared already"):
        collective.create_collective_group(actors, 2, [1, 0], "gloo", "declared")
    made = get([actor.call.remote("broadcast", of(number), 1, "declared") for number, actor in enumerate(actors)])
    assert [one[0] for one in made] == [1, 1]
    collective.destroy_collective_group("declared")
    with pytest.raises(exceptions.ActorDiedError):
        get(actors[0].call.remote("barrier", "declared"))


def test_a_group_that_all_have_left_is_gone_and_its_name_free() -> None:
    def hubs() -> list[str]:
        return [name for name in shoal.util.list_named_actors() if name == "collective group short"]

    for _ in range(2):
        actors = ranks("short", 2)
        assert len(hubs()) == 1
        assert get([actor.leave.remote("short") for actor in actors]) == [(-1, -1, False)] * 2
        until(lambda: hubs() == [], "the group is gone")
    actors = ranks("short", 2)
    for _ in range(3):
        get([actor.leave.remote("short") for actor in actors])
        get([actor.join.remote("short", 2) for actor in actors])
        get([actor.call.remote("barrier", "short") for actor in actors])


def test_tasks_can_be_ranks() -> None:
    @shoal.remote(num_cpus=0.5)
    def add(rank: int) -> float:
        collective.init_collective_group(2, rank, backend="gloo", group_name="tasks")
        array = of(rank)
        collective.allreduce(array, "tasks")
        collective.destroy_collective_group("tasks")
        return float(array[0])

    assert get([add.remote(rank) for rank in range(2)]) == [3, 3]


def test_what_is_wrong_is_said_at_the_call(group: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="not the driver"):
        collective.init_collective_group(2, 0, backend="gloo")
    with pytest.raises(RuntimeError, match="not the driver"):
        collective.barrier()
    assert (collective.get_rank(), collective.get_collective_group_size()) == (-1, -1)
    lone = Rank.remote(0)
    with pytest.raises(RuntimeError, match="not initialized in this process"):
        get(lone.call.remote("barrier", "unknown"))
    with pytest.raises(RuntimeError, match="Rank 0 of the group is taken"):
        get(lone.join.remote())
    with pytest.raises(RuntimeError, match="in the collective group 'default' already"):
        get(group[0].join.remote())
    for options, text in (
        ({"backend": "nccl"}, "There is no NCCL here"),
        ({"backend": "mpi"}, "mpi"),
        ({"size": 0}, "world_size must be at least 1"),
        ({"group_name": ""}, "group_name must be"),
        ({"gloo_timeout": 0}, "gloo_timeout must be positive"),
    ):
        with pytest.raises(ValueError, match=text):
            get(lone.join.remote("wrong", **options))
    with pytest.raises(ValueError, match="The group has 3 ranks, not 2"):
        get(lone.join.remote("default", 2))
    for call, text in (
        (("broadcast", of(0), 7), "A rank is from 0 to 2, got 7"),
        (("allgather", [np.zeros(4)], of(0)), "a tensor for each of the 3 ranks, got 1"),
        (("reducescatter", of(0), [np.zeros(4)]), "a tensor for each of the 3 ranks, got 1"),
    ):
        with pytest.raises(ValueError, match=text):
            get(group[0].call.remote(*call))
    with pytest.raises(RuntimeError, match="Rank 0 is this process"):
        get(group[0].call.remote("send", of(0), 0))
    with pytest.raises(TypeError, match="NumPy array or a CPU tensor of PyTorch, got str"):
        get(group[0].call.remote("allreduce", "text"))
    with pytest.raises(ValueError, match="that many actors"):
        collective.create_collective_group([lone], 2, [0, 1], "gloo", "wrong")


def test_the_names_are_rays() -> None:
    assert types.Backend("gloo") == "gloo"
    assert [op.name for op in types.ReduceOp] == ["SUM", "PRODUCT", "MIN", "MAX"]
    assert sys.modules["shoal.util.collective.types"] is types
