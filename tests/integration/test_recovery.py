"""Nodes that die with the only copies of objects on them, and what becomes of the objects."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.cluster_utils import Cluster, ClusterNode
from shoal.exceptions import (
    ObjectLostError,
    ObjectReconstructionFailedMaxAttemptsExceededError,
    ObjectReconstructionFailedPutError,
    ObjectReconstructionFailedRetriesDisabledError,
    ObjectReconstructionFailedTaskCancelledError,
)
from shoal_core.protocol.ids import NodeId
from shoal_core.runtime.runtime import Runtime
from tests.integration.waiting import get, until

LARGE = 300_000


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head, where the driver is; the tests add nodes with "data" to it, and kill them."""
    one = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"head": 1}})
    try:
        one.connect()
        yield one
    finally:
        one.shutdown()


def data_node(cluster: Cluster, **resources: float) -> ClusterNode:
    return cluster.add_node(num_cpus=2, resources={"data": 100, **resources})


def kill(cluster: Cluster, node: ClusterNode) -> None:
    """Kill a node at once, and with it all copies that lie there."""
    cluster.remove_node(node, allow_graceful=False)


def is_known_dead(node: ClusterNode) -> bool:
    """Tell whether this driver knows that a node is dead."""
    assert Runtime.current is not None
    return Runtime.current.reactor.is_dead(NodeId(node.node_id))


@pytest.fixture
def runs(tmp_path: Path) -> Callable[[], list[str]]:
    """Return who has run, as noted with ``note``."""
    (tmp_path / "runs").touch()
    return lambda: (tmp_path / "runs").read_text().split()


@pytest.fixture
def log(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


def note(log: str, what: str) -> None:
    with open(log, "a") as file:
        file.write(f"{what}\n")


@shoal.remote(resources={"data": 1}, num_cpus=0)
def make(log: str, name: str, *given: bytes) -> bytes:
    """Make a large object of a name and the first bytes of others."""
    note(log, name)
    return f"{name}({','.join(value[:200].split(b';')[0].decode() for value in given)});".encode() + b"x" * LARGE


def head_of(value: bytes) -> str:
    return value[:200].split(b";")[0].decode()


def nothing_is_left() -> bool:
    runtime = Runtime.current
    assert runtime is not None
    reactor = runtime.reactor
    return reactor.recovery.is_quiet() and not (reactor.tasks or reactor.streams or runtime.objects.owned)


def made(refs: Any) -> None:
    """Wait until objects are made, without reading them."""
    refs = refs if isinstance(refs, list) else [refs]
    ready, _ = shoal.wait(refs, num_returns=len(refs), timeout=40)
    assert len(ready) == len(refs)


def test_a_lost_result_is_made_again_by_its_task(cluster: Cluster, log: str, runs: Callable[[], list[str]]) -> None:
    node = data_node(cluster)
    ref = make.remote(log, "a")
    made(ref)
    kill(cluster, node)
    data_node(cluster)
    assert head_of(get(ref)) == "a()"
    assert runs() == ["a", "a"]
    assert head_of(get(ref)) == "a()"
    assert runs() == ["a", "a"], "what is there is not made again"
    del ref
    until(nothing_is_left, "nothing of the objects is left")


def test_nobody_makes_again_what_nobody_needs(cluster: Cluster, log: str, runs: Callable[[], list[str]]) -> None:
    node = data_node(cluster)
    needed, unneeded = make.remote(log, "needed"), make.remote(log, "unneeded")
    made([needed, unneeded])
    kill(cluster, node)
    data_node(cluster)
    assert head_of(get(needed)) == "needed()"
    assert sorted(runs()) == ["needed", "needed", "unneeded"]
    ready, waiting = shoal.wait([unneeded], timeout=40)
    assert (ready, waiting) == ([unneeded], []), "to wait for it is to need it"
    assert sorted(runs()) == ["needed", "needed", "unneeded", "unneeded"]


def test_a_chain_is_made_again_from_where_it_was_freed(
    cluster: Cluster, log: str, runs: Callable[[], list[str]]
) -> None:
    node = data_node(cluster)
    first = make.remote(log, "a")
    middle = make.remote(log, "b", first)
    last = make.remote(log, "c", middle)
    made(last)
    del first, middle
    kill(cluster, node)
    data_node(cluster)
    assert head_of(get(last)) == "c(b(a()))"
    assert sorted(runs()) == ["a", "a", "b", "b", "c", "c"]
    del last
    until(nothing_is_left, "nothing of the chain is left")


def test_what_two_need_is_made_again_once(cluster: Cluster, log: str, runs: Callable[[], list[str]]) -> None:
    node = data_node(cluster)
    root = make.remote(log, "a")
    left, right = make.remote(log, "b", root), make.remote(log, "c", root)
    top = make.remote(log, "d", left, right)
    made(top)
    del root, left, right
    kill(cluster, node)
    data_node(cluster)
    assert head_of(get(top)) == "d(b(a()),c(a()))"
    assert sorted(runs()) == 2 * ["a"] + 2 * ["b"] + 2 * ["c"] + 2 * ["d"] or sorted(runs()) == [*"aabbccdd"], (
        "each once more"
    )


def test_an_argument_that_is_lost_while_its_task_is_queued(
    cluster: Cluster, log: str, runs: Callable[[], list[str]]
) -> None:
    node = data_node(cluster)
    argument = make.remote(log, "a")
    made(argument)
    later = make.options(resources={"later": 1}).remote(log, "b", argument)
    kill(cluster, node)
    cluster.wait_for_nodes()
    data_node(cluster, later=1)
    assert head_of(get(later)) == "b(a())"
    assert sorted(runs()) == ["a", "a", "b"], "the consumer was not run in vain"
    del argument, later
    until(nothing_is_left, "nothing of the objects is left")


@shoal.remote(num_cpus=0)
def slow(log: str, release: str, *given: bytes) -> bytes:
    note(log, "begun")
    while not os.path.exists(release):
        time.sleep(0.02)
    return b"slow;" + b"x" * LARGE


def test_an_argument_that_is_lost_while_its_task_runs(
    cluster: Cluster, log: str, runs: Callable[[], list[str]], tmp_path: Path
) -> None:
    home, _other = data_node(cluster, home=1), data_node(cluster, other=1)
    argument = make.options(resources={"home": 1}).remote(log, "a")
    consumer = slow.options(resources={"other": 1}).remote(log, str(tmp_path / "go"), argument)
    until(lambda: "begun" in runs(), "the consumer runs")
    kill(cluster, home)
    cluster.wait_for_nodes()
    (tmp_path / "go").touch()
    assert head_of(get(consumer)) == "slow"
    assert runs() == ["a", "begun"], "it had its argument"
    data_node(cluster, home=1)
    assert head_of(get(argument)) == "a()"


class ReaderClass:
    """An actor that borrows references and reads them when it is told to."""

    def keep(self, refs: list[Any]) -> str:
        (self.ref,) = refs
        return head_of(shoal.get(self.ref))

    def read(self) -> str:
        return head_of(shoal.get(self.ref))

    def head(self, value: bytes) -> str:
        return head_of(value)


Reader: Any = shoal.remote(num_cpus=0)(ReaderClass)


def test_a_borrower_gets_what_its_owner_makes_again(cluster: Cluster, log: str, runs: Callable[[], list[str]]) -> None:
    node = data_node(cluster)
    cluster.add_node(num_cpus=1, resources={"elsewhere": 1})
    reader = Reader.options(resources={"elsewhere": 1}).remote()
    ref = make.remote(log, "a")
    assert get(reader.keep.remote([ref])) == "a()"
    kill(cluster, node)
    data_node(cluster)
    # Until its node has heard of the death, it reads the copy that was pulled there.
    until(lambda: get(reader.read.remote()) == "a()" and len(runs()) > 1, "the task has run again")
    assert runs() == ["a", "a"]
    assert get(reader.head.remote(ref)) == "a()"
    assert runs() == ["a", "a"]


class Keeper:
    """Owns objects, which tasks on another node make of objects of other owners."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def make(self, log: str, name: str, given: list[Any]) -> list[Any]:
        self.kept.append(make.remote(log, name, *given))
        made(self.kept[-1])
        return self.kept[-1:]


def test_a_chain_through_several_owners_is_made_again_by_each_of_them(
    cluster: Cluster, log: str, runs: Callable[[], list[str]]
) -> None:
    node = data_node(cluster)
    keeper: Any = shoal.remote(resources={"head": 0.1}, num_cpus=0)(Keeper)
    keepers = [keeper.remote(), keeper.remote()]
    first = get(keepers[0].make.remote(log, "a", []))
    second = [make.remote(log, "b", *first)]
    third = get(keepers[1].make.remote(log, "c", second))
    fourth = make.remote(log, "d", *third)
    made(fourth)
    kill(cluster, node)
    data_node(cluster)
    assert head_of(get(fourth)) == "d(c(b(a())))"
    assert runs() == [*"abcd", *"abcd"]


def test_a_call_of_an_actor_waits_for_its_argument(cluster: Cluster, log: str, runs: Callable[[], list[str]]) -> None:
    node = data_node(cluster)
    reader = Reader.options(resources={"head": 1}).remote()
    get(reader.__ray_ready__.remote())
    ref = make.remote(log, "a")
    made(ref)
    kill(cluster, node)
    answers = [reader.head.remote(ref), reader.head.remote(b"b;")]
    cluster.wait_for_nodes()
    data_node(cluster)
    assert get(answers) == ["a()", "b"]
    assert runs() == ["a", "a"]


def test_without_retries_nothing_is_made_again(cluster: Cluster, log: str, runs: Callable[[], list[str]]) -> None:
    node = data_node(cluster)
    ref = make.options(max_retries=0).remote(log, "a")
    user = make.remote(log, "b", ref)
    made(user)
    kill(cluster, node)
    data_node(cluster)
    with pytest.raises(ObjectReconstructionFailedRetriesDisabledError, match=r"make\(\).*max_retries") as caught:
        get(ref)
    assert isinstance(caught.value, ObjectLostError)
    assert caught.value.reason == "RETRIES_DISABLED"
    assert ref.hex() in str(caught.value)
    with pytest.raises(ObjectReconstructionFailedRetriesDisabledError, match="what it is made from"):
        get(user)
    assert runs() == ["a", "b"]


def test_large_arguments_by_value_are_not_there_for_another_run(cluster: Cluster, log: str) -> None:
    node = data_node(cluster)
    ref = make.remote(log, "a", b"value;" + b"x" * LARGE)
    made(ref)
    kill(cluster, node)
    with pytest.raises(ObjectReconstructionFailedPutError, match="durable=True") as caught:
        get(ref)
    assert caught.value.reason == "PUT"


def test_each_time_costs_a_retry(cluster: Cluster, log: str, runs: Callable[[], list[str]]) -> None:
    ref = None
    for _ in range(2):
        node = data_node(cluster)
        ref = make.options(max_retries=1).remote(log, "a") if ref is None else ref
        assert head_of(get(ref)) == "a()"
        kill(cluster, node)
        until(partial(is_known_dead, node), "the copies of its objects elsewhere are not read any more")
    data_node(cluster)
    with pytest.raises(ObjectReconstructionFailedMaxAttemptsExceededError, match=r"make\(\)"):
        get(ref)
    assert runs() == ["a", "a"]


def test_a_task_that_is_cancelled_makes_nothing_again(
    cluster: Cluster, log: str, runs: Callable[[], list[str]]
) -> None:
    node = data_node(cluster)
    ref = make.remote(log, "a")
    made(ref)
    kill(cluster, node)
    until(partial(is_known_dead, node), "this driver knows it")
    assert shoal.wait([ref], timeout=0.5) == ([], [ref]), "its task waits for a node"
    shoal.cancel(ref)
    with pytest.raises(ObjectReconstructionFailedTaskCancelledError):
        get(ref)
    assert runs() == ["a"]
    del ref
    until(nothing_is_left, "nothing of the object is left")


def test_many_objects_of_a_killed_node(cluster: Cluster, log: str, runs: Callable[[], list[str]]) -> None:
    node = data_node(cluster)
    refs = [make.remote(log, str(i)) for i in range(200)]
    total = make.remote(log, "all", *refs)
    made([*refs, total])
    kill(cluster, node)
    data_node(cluster)
    assert [head_of(value) for value in get(refs)] == [f"{i}()" for i in range(200)]
    assert head_of(get(total)).startswith("all(0(),1(),2()")
    counts = {name: runs().count(name) for name in set(runs())}
    again = {name: count for name, count in counts.items() if count != 2}
    # On a busy machine single tasks were seen to run once more: their values are right, their number is not promised.
    assert set(again.values()) <= {3}
    assert len(again) <= 5, again
    assert len(set(runs())) == 201
    del refs, total
    until(nothing_is_left, "nothing of the objects is left")


def test_nodes_that_are_killed_during_recovery(cluster: Cluster, log: str, runs: Callable[[], list[str]]) -> None:
    node = data_node(cluster)
    last = make.options(max_retries=-1).remote(log, "0")
    for i in range(1, 5):
        last = make.options(max_retries=-1).remote(log, str(i), last)
    made(last)
    for _ in range(3):
        kill(cluster, node)
        before = len(runs())
        node = data_node(cluster)
        until(partial(is_needed_and_runs, last, runs, before), "something runs again")
    assert head_of(get(last)) == "4(3(2(1(0()))))"
    del last
    until(nothing_is_left, "nothing of the chain is left")


def is_needed_and_runs(ref: Any, runs: Callable[[], list[str]], before: int) -> bool:
    shoal.wait([ref], timeout=0)  # asks for it, once the death is known here
    return len(runs()) > before


def test_items_of_a_generator_come_again(cluster: Cluster, log: str, runs: Callable[[], list[str]]) -> None:
    @shoal.remote(resources={"data": 1}, num_cpus=0)
    def items(log: str) -> Iterator[bytes]:
        note(log, "run")
        for i in range(5):
            yield f"item{i};".encode() + b"x" * LARGE

    node = data_node(cluster)
    refs = list(items.remote(log))
    made(refs)
    kill(cluster, node)
    data_node(cluster)
    kept = [refs[1], refs[3]]
    del refs
    assert [head_of(value) for value in get(kept)] == ["item1", "item3"]
    assert runs() == ["run", "run"]
    del kept
    until(nothing_is_left, "nothing of the generator is left")


class MakerClass:
    """An actor whose results lie where it does."""

    def make(self, log: str, name: str) -> bytes:
        note(log, name)
        return f"{name};".encode() + b"x" * LARGE


Maker: Any = shoal.remote(resources={"data": 1}, num_cpus=0)(MakerClass)


def test_results_of_an_actor_come_again_where_its_calls_may_be_made_again(
    cluster: Cluster, log: str, runs: Callable[[], list[str]]
) -> None:
    node = data_node(cluster)
    maker = Maker.options(max_restarts=-1).remote()
    again = maker.make.options(max_task_retries=2).remote(log, "again")
    once = maker.make.remote(log, "once")
    made([again, once])
    kill(cluster, node)
    data_node(cluster)
    assert head_of(get(again)) == "again"
    with pytest.raises(ObjectReconstructionFailedRetriesDisabledError, match="max_task_retries"):
        get(once)
    assert sorted(runs()) == ["again", "again", "once"]
