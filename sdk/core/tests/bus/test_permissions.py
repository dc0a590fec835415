"""Every role against every subject of the catalogue, on a real broker.

The table below says by hand who may do what; ``protocol.subjects.permissions`` must agree with it, and the broker too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from shoal_core.bus.broker import launch_broker
from shoal_core.bus.connection import connect
from shoal_core.protocol.errors import PermissionViolationError
from shoal_core.protocol.ids import ActorId, JobId, NodeId, ProcessId
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.verbs import GCS_CHANGING, GCS_READING, NODE_PUBLIC, SCHEDULER_PUBLIC

CLUSTER = "c"
SUBJECTS = Subjects(CLUSTER)
NODE = NodeId("0123456789abcdef")
PROCESS = ProcessId("0123456789abcdef01234567")
ACTOR = ActorId(PROCESS + "00000001")
EVERYONE = set(Role)
SERVICES = {Role.NODE, Role.GCS, Role.SCHEDULER, Role.OBJECTSTORE}
NOBODY: set[Role] = set()
READING = {
    "gcs": {
        "cluster",
        "find_actor",
        "find_group",
        "get_actor",
        "get_function",
        "get_group",
        "get_job",
        "get_node",
        "kv_get",
        "kv_keys",
        "list_actors",
        "list_groups",
        "list_jobs",
        "list_nodes",
    },
    "scheduler": {"pending", "resources"},
    "node": {"log", "logs", "objects", "task", "tasks"},
}
"""Which verbs an observer may ask by. A new one that it may ask by belongs here, and has to change nothing."""


@dataclass
class Row:
    """A subject, who may publish to it, the pattern by which it is heard (by default itself), and who may hear it."""

    subject: str
    publishers: set[Role]
    hearers: set[Role]
    pattern: str = ""


def inbox_row(role: Role) -> Row:
    return Row(SUBJECTS.inbox(role, "x") + ".1", SERVICES, {role}, SUBJECTS.inbox(role, "x") + ".*")


def event_row(role: Role) -> Row:
    publishers = {role} - {Role.OBSERVER}
    return Row(SUBJECTS.event(role, "x", "kind"), publishers, EVERYONE, SUBJECTS.event(role, "*", "kind"))


def stream_rows(stream: str, owners: set[Role]) -> list[Row]:
    """Return the rows of JetStream's API for one stream."""
    verbs = ("STREAM.CREATE", "STREAM.INFO", "STREAM.PURGE", "STREAM.MSG.GET", "CONSUMER.CREATE", "DIRECT.GET")
    return [
        *(Row(f"$JS.API.{verb}.{stream}", owners, NOBODY) for verb in verbs),
        Row(f"$JS.API.CONSUMER.DELETE.{stream}.consumer", owners, NOBODY),
        Row(f"$JS.API.DIRECT.GET.{stream}.some.subject", owners, NOBODY),
        Row(f"$JS.FC.{stream}.consumer.x", owners, NOBODY),
    ]


def bucket_rows(bucket: str) -> list[Row]:
    return [Row(f"$KV.{bucket}.key", {Role.GCS}, NOBODY), *stream_rows(f"KV_{bucket}", {Role.GCS})]


CATALOGUE: dict[Callable[..., object], list[Row]] = {
    Subjects.gcs: [
        *(Row(SUBJECTS.gcs(verb), EVERYONE, {Role.GCS}) for verb in sorted(READING["gcs"])),
        *(Row(SUBJECTS.gcs(verb), EVERYONE - {Role.OBSERVER}, {Role.GCS}) for verb in [*GCS_CHANGING, "verb"]),
    ],
    Subjects.gcs_from_node: [Row(SUBJECTS.gcs_from_node("verb"), {Role.NODE}, {Role.GCS})],
    Subjects.gcs_from_scheduler: [Row(SUBJECTS.gcs_from_scheduler("verb"), {Role.SCHEDULER}, {Role.GCS})],
    Subjects.gcs_replica_from_scheduler: [
        Row(SUBJECTS.gcs_replica_from_scheduler("x", "verb"), {Role.SCHEDULER}, {Role.GCS})
    ],
    Subjects.objectstore: [Row(SUBJECTS.objectstore("verb"), {Role.PROCESS, Role.NODE}, {Role.OBJECTSTORE})],
    Subjects.demand: [
        Row(SUBJECTS.demand(PROCESS), {Role.PROCESS, Role.GCS}, {Role.SCHEDULER}, SUBJECTS.demand("*")),
    ],
    Subjects.scheduler: [Row(SUBJECTS.scheduler("verb"), EVERYONE, {Role.SCHEDULER})],
    Subjects.node: [Row(SUBJECTS.node(NODE, "verb"), EVERYONE, {Role.NODE})],
    Subjects.node_from_scheduler: [Row(SUBJECTS.node_from_scheduler(NODE, "verb"), {Role.SCHEDULER}, {Role.NODE})],
    Subjects.node_from_process: [
        Row(SUBJECTS.node_from_process(NODE, "verb"), {Role.PROCESS, Role.NODE}, {Role.NODE}),
    ],
    Subjects.node_from_node: [Row(SUBJECTS.node_from_node(NODE, "verb"), {Role.NODE}, {Role.NODE})],
    Subjects.channel: [
        Row(SUBJECTS.channel(PROCESS, Role.NODE, NODE), {Role.NODE}, {Role.PROCESS, Role.NODE}),
        Row(SUBJECTS.channel(PROCESS, Role.PROCESS, PROCESS), {Role.PROCESS}, {Role.PROCESS, Role.NODE}),
        Row(SUBJECTS.channel(PROCESS, Role.GCS, PROCESS), NOBODY, {Role.PROCESS, Role.NODE}),
    ],
    Subjects.channels_to: [
        Row(
            SUBJECTS.channel(NODE, Role.PROCESS, PROCESS),
            {Role.PROCESS},
            {Role.PROCESS, Role.NODE},
            SUBJECTS.channels_to(NODE),
        ),
    ],
    Subjects.transfer: [
        Row(SUBJECTS.transfer(NODE, Role.NODE, NODE), {Role.NODE}, {Role.PROCESS, Role.NODE}),
        Row(SUBJECTS.transfer(NODE, Role.PROCESS, PROCESS), {Role.PROCESS}, {Role.PROCESS, Role.NODE}),
        Row(SUBJECTS.transfer(NODE, Role.GCS, PROCESS), NOBODY, {Role.PROCESS, Role.NODE}),
    ],
    Subjects.transfers_to: [
        Row(
            SUBJECTS.transfer(PROCESS, Role.NODE, NODE),
            {Role.NODE},
            {Role.PROCESS, Role.NODE},
            SUBJECTS.transfers_to(PROCESS),
        ),
    ],
    Subjects.chunks: [
        Row(SUBJECTS.chunks(Role.NODE, NODE, "o1"), {Role.NODE}, {Role.PROCESS, Role.NODE}),
        Row(SUBJECTS.chunks(Role.PROCESS, PROCESS, "p1"), {Role.PROCESS}, {Role.PROCESS, Role.NODE}),
        Row(SUBJECTS.chunks(Role.GCS, PROCESS, "p1"), NOBODY, {Role.PROCESS, Role.NODE}),
    ],
    Subjects.event: [event_row(role) for role in Role],
    Subjects.log: [Row(SUBJECTS.log(NODE, JobId("1")), {Role.NODE}, EVERYONE, SUBJECTS.log("*", JobId("1")))],
    Subjects.job_stop: [
        Row(SUBJECTS.job_stop(PROCESS, JobId("1")), {Role.PROCESS}, EVERYONE, SUBJECTS.job_stop("*", JobId("1"))),
    ],
    Subjects.actor_changed: [
        Row(SUBJECTS.actor_changed("x", ACTOR), {Role.GCS}, EVERYONE, SUBJECTS.actor_changed("*", ACTOR)),
    ],
    Subjects.groups_changed: [
        Row(SUBJECTS.groups_changed("x", PROCESS), {Role.GCS}, EVERYONE, SUBJECTS.groups_changed("*", PROCESS)),
    ],
    Subjects.notice: [
        Row(SUBJECTS.notice("x", PROCESS), {Role.SCHEDULER}, EVERYONE, SUBJECTS.notice("*", PROCESS)),
    ],
    Subjects.inbox: [inbox_row(role) for role in Role],
    Subjects.control_bucket: bucket_rows(SUBJECTS.control_bucket()),
    Subjects.function_bucket: bucket_rows(SUBJECTS.function_bucket()),
    Subjects.object_stream: stream_rows(SUBJECTS.object_stream(), {Role.OBJECTSTORE}),
    Subjects.object_prefix: [Row(f"{SUBJECTS.object_prefix()}object.manifest", {Role.OBJECTSTORE}, NOBODY)],
    Subjects.object_chunk: [Row(SUBJECTS.object_chunk("object", 1, 0), {Role.OBJECTSTORE, Role.NODE}, NOBODY)],
}
OUTSIDE = [
    *(Row(f"$SRV.{verb}", {Role.OBSERVER}, SERVICES) for verb in ("PING", "INFO", "STATS", "PING.gcs", "INFO.gcs.x")),
    *stream_rows("somebody-elses", NOBODY),
    Row(
        f"$JS.API.DIRECT.GET.{SUBJECTS.object_stream()}.{SUBJECTS.object_chunk('object', 1, 0)}",
        {Role.OBJECTSTORE, Role.NODE},
        NOBODY,
    ),
    Row(
        f"$JS.API.DIRECT.GET.{SUBJECTS.object_stream()}.{SUBJECTS.object_prefix()}object.manifest",
        {Role.OBJECTSTORE},
        NOBODY,
    ),
    Row("$JS.API.STREAM.NAMES", NOBODY, NOBODY),
    Row("$SYS.REQ.SERVER.PING", NOBODY, NOBODY, "$SYS.>"),
    Row("_INBOX.x", NOBODY, NOBODY, "_INBOX.>"),
    Row(Subjects("other").gcs("verb"), NOBODY, NOBODY),
    Row("anything", NOBODY, NOBODY, ">"),
    Row(f"{SUBJECTS.root}.anything", NOBODY, NOBODY, f"{SUBJECTS.root}.>"),
]


def test_the_table_has_every_subject_of_the_catalogue() -> None:
    methods = {method for name, method in inspect.getmembers(Subjects, inspect.isfunction) if not name.startswith("_")}
    assert methods == set(CATALOGUE)


def test_who_only_observes_asks_by_verbs_that_change_nothing() -> None:
    assert {"gcs": set(GCS_READING), "scheduler": set(SCHEDULER_PUBLIC), "node": set(NODE_PUBLIC)} == READING


@pytest.mark.parametrize("role", Role)
async def test_the_broker_lets_a_role_do_what_the_table_says_and_nothing_else(role: Role) -> None:
    rows = [row for rows in CATALOGUE.values() for row in rows] + OUTSIDE
    errors: list[str] = []

    def note(error: BaseException) -> None:
        assert isinstance(error, PermissionViolationError)
        errors.append(str(error))

    async with (
        launch_broker(CLUSTER) as broker,
        connect(
            broker.address,
            role=role,
            identity="x",
            cluster=CLUSTER,
            credentials=broker.credentials[role],
            on_error=note,
        ) as bus,
    ):
        publishes, hears = {}, {}
        for row in rows:
            errors.clear()
            bus.publish(row.subject, b"")
            await bus.flush()
            publishes[row.subject] = not errors
            errors.clear()
            subscription = bus.subscribe(row.pattern or row.subject, lambda message: None)
            await bus.flush()
            subscription.unsubscribe()
            hears[row.pattern or row.subject] = not errors
    assert publishes == {row.subject: role in row.publishers for row in rows}
    assert hears == {row.pattern or row.subject: role in row.hearers for row in rows}
