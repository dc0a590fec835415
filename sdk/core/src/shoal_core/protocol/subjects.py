"""Every subject of a cluster, and which role may use it. No other module spells a subject.

A subject carries its audience and its sender, so that the broker's permissions alone decide who can say
what: user code (role ``process``) cannot forge a node's grant, a scheduler's request or a death.

======================================================  =====================  ==========================
subject (below ``shoal.<cluster>``)                     published by           heard by
======================================================  =====================  ==========================
``gcs.public.<verb>`` of a verb that only reads         every role             one gcs (queue group)
``gcs.public.<verb>`` of any other                      all but observer       one gcs
``gcs.node.<verb>``                                     node                   one gcs
``gcs.scheduler.<verb>``                                scheduler              one gcs
``gcs.replica.<id>.<verb>``                             scheduler              that gcs
``objectstore.<verb>``                                  process, node          one objectstore
``scheduler.demand.<owner>``                            process, gcs           every scheduler
``scheduler.public.<verb>``                             every role             one scheduler
``node.<node>.public.<verb>``                           every role             that node
``node.<node>.scheduler.<verb>``                        scheduler              that node
``node.<node>.process.<verb>``                          process, node          that node
``node.<node>.node.<verb>``                             node                   that node
``channel.<to>.node.<from>``                            node                   process or node ``to``
``channel.<to>.process.<from>``                         process                process or node ``to``
``transfer.<to>.node.<from>``                           node                   process or node ``to``
``transfer.<to>.process.<from>``                        process                process or node ``to``
``chunk.node.<from>.<stream>``                          node                   process, node
``chunk.process.<from>.<stream>``                       process                process, node
``event.<role>.<source>.<kind>[.<detail>]``             that role              anyone
``inbox.<role>.<id>.>``                                 whoever was asked      that id
``obj.<cluster>.<object>.manifest`` (not below shoal)   objectstore            JetStream
``obj.<cluster>.<object>.<upload>.<index>`` (nor this)  objectstore, node      JetStream
======================================================  =====================  ==========================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from shoal_core.protocol.ids import ActorId, JobId, NodeId, PeerId, ProcessId
from shoal_core.protocol.verbs import GCS_READING


class Role(StrEnum):
    """Who a connection speaks for; the broker has one user for each."""

    PROCESS = "process"
    NODE = "node"
    GCS = "gcs"
    SCHEDULER = "scheduler"
    OBJECTSTORE = "objectstore"
    OBSERVER = "observer"


GCS_QUEUE = "gcs"
SCHEDULER_QUEUE = "scheduler"
OBJECTSTORE_QUEUE = "objectstore"


@dataclass(frozen=True)
class Subjects:
    """The subjects of one cluster."""

    cluster: str

    @cached_property
    def root(self) -> str:
        """What every subject of this cluster begins with."""
        return f"shoal.{self.cluster}"

    def gcs(self, verb: str) -> str:
        """Return where any role asks the control store; an observer only by verbs of ``GCS_READING``."""
        return f"{self.root}.gcs.public.{verb}"

    def gcs_from_node(self, verb: str) -> str:
        """Return where a node, and only a node, asks the control store."""
        return f"{self.root}.gcs.node.{verb}"

    def gcs_from_scheduler(self, verb: str) -> str:
        """Return where a scheduler, and only a scheduler, asks the control store."""
        return f"{self.root}.gcs.scheduler.{verb}"

    def gcs_replica_from_scheduler(self, replica: str, verb: str) -> str:
        """Return where a scheduler, and only a scheduler, asks one replica of the control store."""
        return f"{self.root}.gcs.replica.{replica}.{verb}"

    def objectstore(self, verb: str) -> str:
        """Return where the durable tier is asked."""
        return f"{self.root}.objectstore.{verb}"

    def demand(self, owner: str) -> str:
        """Return where an owner (``*`` for all) states the leases it wants."""
        return f"{self.root}.scheduler.demand.{owner}"

    def scheduler(self, verb: str) -> str:
        """Return where any role asks a scheduler."""
        return f"{self.root}.scheduler.public.{verb}"

    def node(self, node: NodeId, verb: str) -> str:
        """Return where any role asks a node."""
        return f"{self.root}.node.{node}.public.{verb}"

    def node_from_scheduler(self, node: NodeId, verb: str) -> str:
        """Return where a scheduler asks a node."""
        return f"{self.root}.node.{node}.scheduler.{verb}"

    def node_from_process(self, node: NodeId, verb: str) -> str:
        """Return where a process, or another node, asks a node."""
        return f"{self.root}.node.{node}.process.{verb}"

    def node_from_node(self, node: NodeId, verb: str) -> str:
        """Return where who holds the credential of nodes, and nobody else, asks a node."""
        return f"{self.root}.node.{node}.node.{verb}"

    def channel(self, to: PeerId, role: Role, sender: PeerId) -> str:
        """Return where the frames of the channel ``sender`` → ``to`` go."""
        return f"{self.root}.channel.{to}.{role}.{sender}"

    def channels_to(self, to: PeerId) -> str:
        """Return the pattern of all channels that end at ``to``."""
        return f"{self.root}.channel.{to}.*.*"

    def transfer(self, to: PeerId, role: Role, sender: PeerId) -> str:
        """Return where ``sender`` speaks with ``to`` about transfers between them."""
        return f"{self.root}.transfer.{to}.{role}.{sender}"

    def transfers_to(self, to: PeerId) -> str:
        """Return the pattern of all that is said to ``to`` about transfers."""
        return f"{self.root}.transfer.{to}.*.*"

    def chunks(self, role: Role, source: PeerId, stream: str) -> str:
        """Return where ``source`` publishes the chunks of an object, once for all who pull it."""
        return f"{self.root}.chunk.{role}.{source}.{stream}"

    def event(self, role: Role, source: str, kind: str) -> str:
        """Return where ``source`` (``*`` for all) tells of events of one kind."""
        return f"{self.root}.event.{role}.{source}.{kind}"

    def log(self, node: str, job: JobId) -> str:
        """Return where a node (``*`` for all) publishes what a job's workers print."""
        return self.event(Role.NODE, node, f"log.{job}")

    def job_stop(self, process: str, job: JobId) -> str:
        """Return where a process (``*`` for all) tells the supervisor of a submitted job that it is to stop."""
        return self.event(Role.PROCESS, process, f"stop.{job}")

    def actor_changed(self, replica: str, actor: ActorId) -> str:
        """Return where a replica (``*`` for all) of the control store tells that an actor's record has changed."""
        return self.event(Role.GCS, replica, f"actor.{actor}")

    def groups_changed(self, replica: str, creator: str) -> str:
        """Return where a replica of the control store tells that records of groups which a process made have changed.

        ``*`` for all of either.
        """
        return self.event(Role.GCS, replica, f"group.{creator}")

    def notice(self, scheduler: str, owner: ProcessId) -> str:
        """Return where a scheduler (``*`` for all) tells an owner about its demand."""
        return self.event(Role.SCHEDULER, scheduler, f"notice.{owner}")

    def inbox(self, role: Role, identity: str) -> str:
        """Return the prefix of one connection's replies."""
        return f"{self.root}.inbox.{role}.{identity}"

    def control_bucket(self) -> str:
        """Return the name of the control store's JetStream key-value bucket."""
        return f"shoal-{self.cluster}-gcs"

    def function_bucket(self) -> str:
        """Return the name of the bucket of exported functions, which nobody watches."""
        return f"shoal-{self.cluster}-functions"

    def object_stream(self) -> str:
        """Return the name of the durable tier's JetStream stream."""
        return f"shoal-{self.cluster}-objects"

    def object_prefix(self) -> str:
        """Return what the subjects of all durable objects begin with."""
        return f"obj.{self.cluster}."

    def object_chunk(self, object_id: str, upload: int, index: int) -> str:
        """Return where one chunk of a durable object is stored."""
        return f"{self.object_prefix()}{object_id}.{upload}.{index}"


def parse_channel(subject: str) -> tuple[Role, str]:
    """Return the role and the id of the sender that the subject of a channel, or of a transfer, names."""
    tokens = subject.rsplit(".", 2)
    return Role(tokens[1]), tokens[2]


def all_inboxes(inbox: str) -> str:
    """Return what the inboxes of all connections of a cluster begin with, given that of one."""
    return inbox.rsplit(".", 2)[0] + "."


@dataclass(frozen=True)
class Permissions:
    """The subject patterns a role may publish to and subscribe to."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def _stream_api(stream: str) -> tuple[str, ...]:
    """Return where one reaches JetStream's API for one stream, and no other, and answers its flow control."""
    return (
        f"$JS.API.STREAM.*.{stream}",
        f"$JS.API.STREAM.MSG.*.{stream}",
        f"$JS.API.CONSUMER.*.{stream}",
        f"$JS.API.CONSUMER.*.{stream}.>",
        f"$JS.API.DIRECT.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}.>",
        f"$JS.FC.{stream}.>",
    )


def permissions(cluster: str, role: Role) -> Permissions:
    """Return what the broker allows ``role`` in ``cluster``; everything else is refused."""
    root = f"shoal.{cluster}"
    reading = (f"{root}.scheduler.public.*", f"{root}.node.*.public.*")
    anyone = (f"{root}.gcs.public.*", *reading)
    replies = (f"{root}.inbox.>",)
    own_inbox = (f"{root}.inbox.{role}.>",)
    events = (f"{root}.event.>",)
    own_events = (f"{root}.event.{role}.>",)
    service = ("$SRV.>",)
    transfers = (f"{root}.transfer.*.*.*", f"{root}.chunk.*.*.*")
    buckets = (Subjects(cluster).control_bucket(), Subjects(cluster).function_bucket())
    records = tuple(pattern for bucket in buckets for pattern in (*_stream_api(f"KV_{bucket}"), f"$KV.{bucket}.>"))
    discovery = ("$SRV.PING.>", "$SRV.INFO.>", "$SRV.STATS.>", "$SRV.PING", "$SRV.INFO", "$SRV.STATS")
    table = {
        Role.PROCESS: Permissions(
            publish=(
                *anyone,
                f"{root}.objectstore.*",
                f"{root}.scheduler.demand.*",
                f"{root}.node.*.process.*",
                f"{root}.channel.*.process.*",
                f"{root}.transfer.*.process.*",
                f"{root}.chunk.process.*.*",
                *own_events,
            ),
            subscribe=(*own_inbox, *events, f"{root}.channel.*.*.*", *transfers),
        ),
        Role.NODE: Permissions(
            publish=(
                *anyone,
                *replies,
                f"{root}.gcs.node.*",
                f"{root}.objectstore.*",
                f"{root}.node.*.process.*",
                f"{root}.node.*.node.*",
                f"{root}.channel.*.node.*",
                f"{root}.transfer.*.node.*",
                f"{root}.chunk.node.*.*",
                *own_events,
                f"obj.{cluster}.*.*.*",
                f"$JS.API.DIRECT.GET.{Subjects(cluster).object_stream()}.obj.{cluster}.*.*.*",
            ),
            subscribe=(*own_inbox, *events, *service, f"{root}.channel.*.*.*", f"{root}.node.>", *transfers),
        ),
        Role.GCS: Permissions(
            publish=(*anyone, *replies, *own_events, *records, f"{root}.scheduler.demand.*"),
            subscribe=(*own_inbox, *events, *service, f"{root}.gcs.>"),
        ),
        Role.SCHEDULER: Permissions(
            publish=(
                *anyone,
                *replies,
                f"{root}.gcs.scheduler.*",
                f"{root}.gcs.replica.*.*",
                f"{root}.node.*.scheduler.*",
                *own_events,
            ),
            subscribe=(*own_inbox, *events, *service, f"{root}.scheduler.>"),
        ),
        Role.OBJECTSTORE: Permissions(
            publish=(
                *anyone,
                *replies,
                *own_events,
                *_stream_api(Subjects(cluster).object_stream()),
                f"obj.{cluster}.>",
            ),
            subscribe=(*own_inbox, *events, *service, f"{root}.objectstore.*"),
        ),
        Role.OBSERVER: Permissions(
            publish=(*map(Subjects(cluster).gcs, GCS_READING), *reading, *discovery),
            subscribe=(*own_inbox, *events),
        ),
    }
    return table[role]
