"""What one replica answers, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gcs.tests.builders import description, job_request
from services.gcs.tests.simulation import Replica, World
from shoal_core.bus.keyvalue import check_key
from shoal_core.protocol.effects import Load, Loaded, Reply, Request, Store, Stored, StoreRefused
from shoal_core.protocol.errors import (
    AlreadyExistsError,
    DeclaredDeadError,
    InvalidRequestError,
    NotFoundError,
    ServiceError,
    ShoalError,
    VersionMismatchError,
)
from shoal_core.protocol.ids import FunctionId, JobId, NodeId
from shoal_core.protocol.messages import (
    PROTOCOL_VERSION,
    ClusterInfo,
    Done,
    FinishJob,
    FunctionPart,
    GetCluster,
    GetFunctionPart,
    GetJob,
    GetNode,
    JobList,
    JobRecord,
    JobState,
    KvAdded,
    KvDelete,
    KvDeleted,
    KvGet,
    KvKeyList,
    KvKeys,
    KvPut,
    KvValue,
    ListJobs,
    ListNodes,
    Message,
    NodeList,
    NodeRecord,
    PutFunctionPart,
    RetireNode,
)
from shoal_core.protocol.wire import encode
from shoal_core.testing.builders import node_id
from shoal_gcs.records import (
    LIST_BYTES,
    MOST_WRITERS,
    NAME_BYTES,
    PART_BYTES,
    StoredKey,
    function_key,
    job_id,
    job_key,
    kv_key,
    node_key,
    parse_kv_key,
)

FUNCTION = FunctionId("f" * 32)


class Asker:
    """One replica, asked one thing after the other."""

    def __init__(self) -> None:
        self.world = World()
        self.replica: Replica = self.world.start()

    def __call__(self, message: Message) -> Message | ShoalError:
        return self.world.settled(self.replica, message)


@pytest.fixture
def ask() -> Asker:
    return Asker()


def part(number: int = 0, parts: int = 1, data: bytes = b"code", job: int = 1) -> PutFunctionPart:
    return PutFunctionPart(job_id=job_id(job), function_id=FUNCTION, part=number, parts=parts, data=data)


# ------------------------------------------------------------------------------------ the cluster, nodes, jobs


def test_all_are_told_the_same_session(ask: Asker) -> None:
    one = ask(GetCluster(version="0.1.0"))
    ask.replica = ask.world.start()
    two = ask(GetCluster(version="0.1.0"))
    assert isinstance(one, ClusterInfo)
    assert one == two
    assert one.session == "session-1"


def test_another_protocol_is_refused_with_both_versions(ask: Asker) -> None:
    refusal = ask(GetCluster(version="9.9.9", protocol=77))
    assert isinstance(refusal, VersionMismatchError)
    assert all(
        word in str(refusal)
        for word in ("9.9.9", "77", "0.1.0", f"protocol {PROTOCOL_VERSION}", "install the same version")
    )


def test_a_node_joins_once_and_may_ask_again(ask: Asker) -> None:
    first, again = ask(description(1)), ask(description(1))
    assert isinstance(first, NodeRecord)
    assert first == again == ask(GetNode(node_id=node_id(1)))


def test_a_dead_node_cannot_join_again(ask: Asker) -> None:
    ask(description(1))
    assert ask(RetireNode(node_id=node_id(1), reason="told to")) == Done()
    assert ask(RetireNode(node_id=node_id(1), reason="again")) == Done()
    refusal = ask(description(1))
    assert isinstance(refusal, DeclaredDeadError)
    assert "told to" in str(refusal)
    assert "new id" in str(refusal)


@pytest.mark.parametrize(
    "message",
    [
        GetNode(node_id=node_id(7)),
        RetireNode(node_id=node_id(7), reason="none"),
        GetJob(job_id=job_id(7)),
        FinishJob(job_id=job_id(7), state=JobState.FAILED),
        part(job=7),
        GetFunctionPart(job_id=job_id(7), function_id=FUNCTION, part=0),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_does_not_exist_is_not_found(ask: Asker, message: Message) -> None:
    assert isinstance(ask(message), NotFoundError)
    assert not ask.world.store.functions()


@pytest.mark.parametrize("bad", ["", "a.b", "*", ">", "a b", "x" * 65, "ä", "a\n"])
def test_what_is_no_id_is_refused_before_it_becomes_a_key(ask: Asker, bad: str) -> None:
    messages: list[Message] = [
        GetNode(node_id=NodeId(bad)),
        RetireNode(node_id=NodeId(bad), reason="bad"),
        description(1).model_copy(update={"node_id": NodeId(bad)}),
        GetJob(job_id=JobId(bad)),
        FinishJob(job_id=JobId(bad), state=JobState.FAILED),
        part().model_copy(update={"job_id": JobId(bad)}),
        part().model_copy(update={"function_id": FunctionId(bad)}),
        GetFunctionPart(job_id=JobId(bad), function_id=FUNCTION, part=0),
        GetFunctionPart(job_id=job_id(1), function_id=FunctionId(bad), part=0),
    ]
    for message in messages:
        assert isinstance(ask(message), InvalidRequestError), message


def test_a_job_ends_once(ask: Asker) -> None:
    opened = ask(job_request(1))
    assert isinstance(opened, JobRecord)
    assert opened.state is JobState.RUNNING
    running = ask(FinishJob(job_id=job_id(1), state=JobState.RUNNING))
    assert isinstance(running, InvalidRequestError)
    assert ask(FinishJob(job_id=job_id(1), state=JobState.SUCCEEDED)) == Done()
    assert ask(FinishJob(job_id=job_id(1), state=JobState.FAILED)) == Done()
    ended = ask(GetJob(job_id=job_id(1)))
    assert isinstance(ended, JobRecord)
    assert ended.state is JobState.SUCCEEDED
    assert ask(job_request(1)) == ended, "a driver has one job, also after it has ended"


def test_lists_are_complete_and_oldest_first(ask: Asker) -> None:
    for number in (2, 1, 3):
        ask(description(number))
        ask(job_request(number))
    ask(RetireNode(node_id=node_id(1), reason="told to"))
    nodes, jobs = ask(ListNodes()), ask(ListJobs())
    assert isinstance(nodes, NodeList)
    assert [record.description.node_id for record in nodes.nodes] == [node_id(1), node_id(2), node_id(3)]
    assert isinstance(jobs, JobList)
    assert [record.job_id for record in jobs.jobs] == [job_id(1), job_id(2), job_id(3)]


def test_a_list_too_long_for_one_answer_leaves_out_those_that_ended_longest_ago(ask: Asker) -> None:
    long = "x" * (LIST_BYTES // 10)
    for number in range(1, 21):
        ask.world.now = float(number)
        ask(job_request(number, entrypoint=long))
        if number > 2:
            ask(FinishJob(job_id=job_id(number), state=JobState.SUCCEEDED))
    jobs = ask(ListJobs())
    assert isinstance(jobs, JobList)
    assert [record.job_id for record in jobs.jobs] == [job_id(n) for n in (1, 2, 14, 15, 16, 17, 18, 19, 20)]
    assert len(encode(jobs)) <= LIST_BYTES


def test_a_request_of_another_service_is_refused(ask: Asker) -> None:
    assert isinstance(ask(Done()), InvalidRequestError)


# ------------------------------------------------------------------------------------ functions


def test_a_function_comes_back_in_its_parts(ask: Asker) -> None:
    ask(job_request(1))
    for number, data in enumerate((b"one\n", b"", b"\x00\xff")):
        assert ask(part(number, 3, data)) == Done()
        assert ask(part(number, 3, data)) == Done(), "the same again is no error"
    parts = [ask(GetFunctionPart(job_id=job_id(1), function_id=FUNCTION, part=number)) for number in range(3)]
    assert parts == [FunctionPart(parts=3, data=data) for data in (b"one\n", b"", b"\x00\xff")]
    assert isinstance(ask(GetFunctionPart(job_id=job_id(1), function_id=FUNCTION, part=3)), NotFoundError)
    assert isinstance(ask(part(0, 3, b"other")), AlreadyExistsError)


def test_a_part_that_was_seen_is_answered_at_once_until_its_job_has_ended(ask: Asker) -> None:
    ask(job_request(1))
    ask(part())
    core, wanted = ask.replica.core, GetFunctionPart(job_id=job_id(1), function_id=FUNCTION, part=0)
    (reply,) = core.handle(Request(wanted, 1), 0.0)
    assert isinstance(reply, Reply)
    assert reply.message == FunctionPart(parts=1, data=b"code")
    other = ask.world.start()
    assert isinstance(ask.world.settled(other, wanted), FunctionPart), "one that has not seen it reads it"
    ask(FinishJob(job_id=job_id(1), state=JobState.SUCCEEDED))
    assert isinstance(ask(wanted), NotFoundError)


@pytest.mark.parametrize(("number", "parts"), [(-1, 1), (1, 1), (0, 0)])
def test_a_part_that_cannot_be_one_is_refused(ask: Asker, number: int, parts: int) -> None:
    ask(job_request(1))
    assert isinstance(ask(part(number, parts)), InvalidRequestError)


def test_a_part_that_is_too_large_is_refused(ask: Asker) -> None:
    ask(job_request(1))
    assert ask(part(data=b"x" * PART_BYTES)) == Done()
    refusal = ask(part(data=b"x" * (PART_BYTES + 1)))
    assert isinstance(refusal, InvalidRequestError)
    assert str(PART_BYTES + 1) in str(refusal)


def test_a_job_that_ended_takes_no_functions_and_keeps_none(ask: Asker) -> None:
    ask(job_request(1))
    ask(part())
    ask(FinishJob(job_id=job_id(1), state=JobState.SUCCEEDED))
    assert ask.world.store.functions() == []
    assert isinstance(ask(part()), NotFoundError)
    assert ask.world.store.functions() == []


# ------------------------------------------------------------------------------------ internal KV


def test_keys_are_put_read_listed_and_deleted(ask: Asker) -> None:
    assert ask(KvGet(namespace="n", key="k")) == KvValue(value=None)
    assert ask(KvPut(namespace="n", key="k", value=b"1\n2")) == KvAdded(added=True)
    assert ask(KvPut(namespace="n", key="k", value=b"3", overwrite=False)) == KvAdded(added=False)
    assert ask(KvGet(namespace="n", key="k")) == KvValue(value=b"1\n2")
    assert ask(KvPut(namespace="n", key="k", value=b"")) == KvAdded(added=False)
    assert ask(KvGet(namespace="n", key="k")) == KvValue(value=b"")
    assert ask(KvDelete(namespace="n", key="k")) == KvDeleted(count=1)
    assert ask(KvDelete(namespace="n", key="k")) == KvDeleted(count=0)
    assert ask(KvGet(namespace="n", key="k")) == KvValue(value=None)
    assert ask(KvPut(namespace="n", key="k", value=b"4", overwrite=False)) == KvAdded(added=True)


def test_a_prefix_reaches_its_own_namespace_only(ask: Asker) -> None:
    for namespace, key in (("n", "a1"), ("n", "a2"), ("n", "b"), ("", "a3"), ("n.a", "a4")):
        ask(KvPut(namespace=namespace, key=key, value=b"x"))
    assert ask(KvKeys(namespace="n", prefix="a")) == KvKeyList(keys=["a1", "a2"])
    assert ask(KvDelete(namespace="n", key="a", prefix=True)) == KvDeleted(count=2)
    assert ask(KvDelete(namespace="n", key="a", prefix=True)) == KvDeleted(count=0)
    assert ask(KvKeys(namespace="n")) == KvKeyList(keys=["b"])
    assert ask(KvKeys(namespace="")) == KvKeyList(keys=["a3"])
    assert ask(KvKeys(namespace="n.a")) == KvKeyList(keys=["a4"])


def test_names_and_values_that_are_too_long_are_refused(ask: Asker) -> None:
    long = "k" * (NAME_BYTES - 1)
    assert ask(KvPut(namespace="n", key=long, value=b"x")) == KvAdded(added=True)
    for message in (
        KvPut(namespace="nn", key=long, value=b"x"),
        KvGet(namespace="nn", key=long),
        KvDelete(namespace="nn", key=long),
        KvPut(namespace="n", key="k", value=b"x" * (PART_BYTES + 1)),
    ):
        assert isinstance(ask(message), InvalidRequestError), message
    assert isinstance(ask(KvGet(namespace="", key="é" * NAME_BYTES)), InvalidRequestError), "bytes count, not letters"


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(namespace=NAMES, name=NAMES)
def test_any_name_is_a_key_and_comes_back(namespace: str, name: str) -> None:
    key = kv_key(namespace, name)
    check_key(key)
    assert parse_kv_key(key) == (namespace, name)


@given(one=st.tuples(NAMES, NAMES), two=st.tuples(NAMES, NAMES))
def test_different_names_are_different_keys(one: tuple[str, str], two: tuple[str, str]) -> None:
    assert (kv_key(*one) == kv_key(*two)) == (one == two)


@pytest.mark.parametrize("name", ["", "=", "a.b", "*", ">", "a b", "\n", "\x00", "日本", "~" * 100])
def test_odd_names_are_kept_apart(ask: Asker, name: str) -> None:
    assert ask(KvPut(namespace=name, key=name, value=b"x")) == KvAdded(added=True)
    assert ask(KvKeys(namespace=name)) == KvKeyList(keys=[name])
    assert ask(KvDelete(namespace=name, key="", prefix=True)) == KvDeleted(count=1)


def test_every_key_is_one_that_a_bucket_takes() -> None:
    for key in (node_key(node_id(1)), job_key(job_id(1)), function_key(job_id(1), FUNCTION, 0)):
        check_key(key)


def test_a_key_knows_its_last_writers_and_no_more() -> None:
    stored = StoredKey()
    for number in range(MOST_WRITERS + 3):
        stored = stored.changed(f"writer:{number}", b"\n\n")
    assert StoredKey.decode(stored.encode()) == stored
    assert stored.writers[0] == f"writer:{MOST_WRITERS + 2}"
    assert len(stored.writers) == MOST_WRITERS
    deleted = stored.changed("writer:x", None)
    assert StoredKey.decode(deleted.encode()) == deleted


def test_a_store_that_takes_no_writes_is_an_error_that_says_so(ask: Asker) -> None:
    core = ask.replica.core
    (store,) = core.handle(Request(KvPut(namespace="n", key="k", value=b"x"), 1), 0.0)
    assert isinstance(store, Store)
    (reply,) = core.handle(StoreRefused(store.key, ServiceError("the disk is full"), store.context), 0.0)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, ServiceError)
    assert "the disk is full" in str(reply.message)


def test_a_prefix_that_can_only_be_deleted_in_part_is_answered_once_with_the_error(ask: Asker) -> None:
    for key in ("a", "b", "c"):
        ask(KvPut(namespace="n", key=key, value=b"x"))
    core = ask.replica.core
    loads = core.handle(Request(KvDelete(namespace="n", key="", prefix=True), 1), 0.0)
    stores: list[Store] = []
    for load in loads:
        assert isinstance(load, Load)
        value, revision = ask.world.store.get((load.bucket, load.key))
        (store,) = core.handle(Loaded(load.key, value, revision, load.context), 0.0)
        assert isinstance(store, Store)
        stores.append(store)
    effects = [*core.handle(StoreRefused(stores[0].key, ServiceError("full"), stores[0].context), 0.0)]
    effects += core.handle(StoreRefused(stores[1].key, ServiceError("full"), stores[1].context), 0.0)
    assert effects == []
    last = stores[2]
    (reply,) = core.handle(Stored(last.key, last.value, 99, last.context), 0.0)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, ServiceError)
