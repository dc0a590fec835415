"""The data plane's records: msgspec structs in msgpack, which travel in batches over channels.

User bytes inside them are opaque to everyone but the processes that run user code. Records are arrays on
the wire, so the order of fields is part of the protocol: new fields go last and have a default.

Those that there are of every task are kept from the garbage collector (``gc=False``), which would go through all of
them again and again while many tasks wait. They hold bytes, text and one another, so no cycle leads through them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal_core.protocol.ids import (
    ActorId,
    FunctionId,
    JobId,
    LeaseId,
    NodeId,
    ObjectKey,
    PlacementGroupId,
    ProcessId,
    SlotId,
    TaskNumber,
)
from shoal_core.protocol.measures import Kind


class Reference(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Names an object anywhere: who owns it and the owner's key for it."""

    owner: ProcessId
    key: ObjectKey


class Inline(msgspec.Struct, array_like=True, tag=0, gc=False):
    """A value that travels in the record: its pickle, and the pickle's out-of-band buffers."""

    data: bytes
    buffers: tuple[bytes, ...] = ()
    contained: tuple[Reference, ...] = ()


class Stored(msgspec.Struct, array_like=True, tag=1, gc=False):
    """A value in a segment of a node's shared memory."""

    node: NodeId
    segment: str
    size_bytes: int
    contained: tuple[Reference, ...] = ()


class Failed(msgspec.Struct, array_like=True, tag=2, gc=False):
    """An error in place of a value: its wire code, its text, its pickle where it has one, and the actor it befell.

    ``kept_from``: the task that was not run, since this error stood in the place of one of its arguments.
    """

    code: str
    text: str
    data: bytes = b""
    contained: tuple[Reference, ...] = ()
    actor: str = ""
    kept_from: str = ""


Value = Inline | Stored | Failed


def contained_in(value: Value) -> Sequence[Reference]:
    """Return the references inside a value, or inside the exception that stands in its place."""
    return value.contained


class InGroup(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The placement group that a task or an actor is in.

    ``captures``: what it submits is placed there too, unless that says otherwise.
    """

    group: PlacementGroupId
    captures: bool


class Task(msgspec.Struct, array_like=True, tag=1, gc=False):
    """Owner → worker: run this. Tasks of one lease run in the order of their positions.

    ``returns`` is -1 for a generator, whose items go to the owner as they are made, at most ``ahead`` of them (0: any
    number) before they are taken. A call of an actor's method is a task of lease 0: ``function`` is then the method's
    name and ``group`` the concurrency group it runs in, if the caller chose one. Calls of one caller come in its order.
    ``origins`` names the objects whose values the dependencies are, where a call needs that to ask for one again.
    ``trace`` is what its run belongs to (see ``traces``), ``priority`` what it submits has if nothing else is said.
    It was submitted at ``created_at``, in seconds since the epoch, by the task ``parent`` of ``parent_owner``; where
    that is an actor's id, by the actor outside of any call, and where it is empty, by the driver.
    """

    number: TaskNumber
    attempt: int
    lease: LeaseId
    position: int
    function: FunctionId
    name: str
    returns: int
    arguments: Value
    dependencies: tuple[Value, ...] = ()
    retry_on: bytes = b""
    trace: str = ""
    depth: int = 0
    group: str = ""
    ahead: int = 0
    origins: tuple[Reference, ...] = ()
    in_group: InGroup | None = None
    priority: int = 0
    created_at: float = 0.0
    parent: TaskNumber = TaskNumber(0)
    parent_owner: str = ""


class TaskDone(msgspec.Struct, array_like=True, tag=2, gc=False):
    """Worker → owner: a task has ended. ``kept`` are references of its arguments that the worker still holds.

    Where ``missing`` is not empty, the task was not run: these are those of its arguments that could not be read.
    ``seconds`` is how long it ran, ``fetch_seconds`` how much of that it waited for large arguments (0: it had none).
    ``last``: the worker runs nothing more.
    """

    number: TaskNumber
    attempt: int
    lease: LeaseId
    values: tuple[Value, ...]
    seconds: float
    retryable: bool = False
    kept: tuple[Reference, ...] = ()
    missing: tuple[Stored, ...] = ()
    fetch_seconds: float = 0.0
    last: bool = False


class TasksReturned(msgspec.Struct, array_like=True, tag=3):
    """Worker → owner: these tasks were never begun here and never will be."""

    lease: LeaseId
    numbers: list[TaskNumber]
    blocked: bool


class WorkerBlocked(msgspec.Struct, array_like=True, tag=4):
    """Worker → its node and its owner: the task waits in get or wait (or no longer does)."""

    lease: LeaseId
    blocked: bool


class LeaseAssigned(msgspec.Struct, array_like=True, tag=5):
    """Node → worker: serve this lease; tasks of it may already be here.

    ``config`` is the job's ``JobConfig`` as JSON, if the node has it; ``environment`` is the digest of the runtime
    environment of all that this process will ever run.
    """

    lease: LeaseId
    owner: ProcessId
    job: JobId
    resources: dict[str, int]
    gpus: list[str] = []
    config: bytes = b""
    environment: str = ""


class LeaseGranted(msgspec.Struct, array_like=True, tag=6):
    """Node → owner: the worker process is yours until you return the lease."""

    lease: LeaseId
    key: int
    slot: SlotId
    worker: ProcessId


class LeaseReturned(msgspec.Struct, array_like=True, tag=7):
    """Owner → node: the lease is over; ``kill`` where the process must not be used again.

    ``spent``: the process runs nothing more by itself, and ends when nobody refers to its objects.
    """

    lease: LeaseId
    kill: bool = False
    spent: bool = False


class LeaseRecalled(msgspec.Struct, array_like=True, tag=8):
    """Node → owner: others wait; push nothing more on this lease and return it when it is idle."""

    lease: LeaseId


class WorkerLost(msgspec.Struct, array_like=True, tag=9):
    """Node → owner: the worker process of a lease is gone. Positions above ``begun`` were never begun.

    ``group_removed``: it was killed since the placement group that the lease was out of was removed.
    """

    lease: LeaseId
    begun: int
    reason: str
    out_of_memory: bool = False
    group_removed: bool = False


class WorkerReady(msgspec.Struct, array_like=True, tag=10):
    """Worker → node: the process is up and hears its channels."""

    pid: int


class Fetch(msgspec.Struct, array_like=True, tag=11):
    """Borrower → owner: tell me the value of this object as soon as it is ready."""

    key: ObjectKey


class Fetched(msgspec.Struct, array_like=True, tag=12):
    """Owner → borrower: the answer to ``Fetch``."""

    key: ObjectKey
    value: Value


class Borrow(msgspec.Struct, array_like=True, tag=13):
    """Borrower → owner: count me as a holder of this object."""

    key: ObjectKey


class Borrowed(msgspec.Struct, array_like=True, tag=14):
    """Owner → borrower: you are counted."""

    key: ObjectKey


class Unborrow(msgspec.Struct, array_like=True, tag=15):
    """Borrower → owner: I hold this object no more; it takes back so many times of having been counted."""

    key: ObjectKey
    count: int


class Held(msgspec.Struct, array_like=True, tag=16):
    """Receiver → sender: the references you sent me in this transfer are counted by their owners now."""

    transfer: int


class Transfer(msgspec.Struct, array_like=True, tag=17):
    """Sender → receiver: the next record carries these foreign references; say ``Held`` when they are counted."""

    transfer: int
    references: list[Reference]


class SegmentFreed(msgspec.Struct, array_like=True, tag=18):
    """Owner → node: nobody refers to the object in this segment any more. Node → nodes that have copies: likewise."""

    segment: str


class SegmentUnpinned(msgspec.Struct, array_like=True, tag=19):
    """Process → node: the process no longer maps this segment; ``serial`` is that of the pin that ends.

    ``home`` is there where the process does not know the name of its node's copy: ``segment`` is the home's name then.
    Puller → home: the loan of this serial has ended.
    """

    segment: str
    serial: int
    home: NodeId = NodeId("")


class SegmentsUnpinned(msgspec.Struct, array_like=True, tag=37):
    """Process → node: these pins on the node's own segments have ended; each is a segment and the pin's serial."""

    pins: list[tuple[str, int]]


class SegmentMapped(msgspec.Struct, array_like=True, tag=42):
    """Process → node: the process has mapped this segment without having asked, and holds it by the pin of this serial.

    Its lock on the file keeps the node from using that again before it has heard of the pin.
    """

    segment: str
    serial: int


class SegmentRecalled(msgspec.Struct, array_like=True, tag=43):
    """Node → process: free this segment, which you were granted ahead, unless you have begun to write it."""

    segment: str


class SegmentSealed(msgspec.Struct, array_like=True, tag=20):
    """Writer → node: the segment is written; ``owner`` will free it, or its death will.

    ``key`` is the owner's key of the object: with it the node knows under which name to keep it in the durable tier.
    The arguments of a task are its object 0.
    """

    segment: str
    owner: ProcessId
    key: ObjectKey = ObjectKey(0)


class ObjectUnavailable(msgspec.Struct, array_like=True, tag=21):
    """Reader → owner: the copy of this object in that segment could not be read: it, or its node, is gone."""

    key: ObjectKey
    node: NodeId
    segment: str = ""


class ProcessUnneeded(msgspec.Struct, array_like=True, tag=22):
    """Node → worker: no lease will come any more; end as soon as nobody refers to an object you own."""


class ActorAssigned(msgspec.Struct, array_like=True, tag=23):
    """Node → worker: make this actor's instance; the process serves nothing else in its life.

    ``record`` is the ``ActorRecord`` as JSON, ``spec`` what its creator said of how to make it. What every process
    needs of the record stands beside it, since to decode it takes a new process longer than to make most instances.
    """

    lease: LeaseAssigned
    actor: ActorId
    incarnation: int
    class_name: str
    detached: bool
    record: bytes
    spec: bytes


class ActorReady(msgspec.Struct, array_like=True, tag=24):
    """Worker → node: the instance is made; ``repr_name`` is what its class's own ``__repr__`` returned, if any."""

    actor: ActorId
    incarnation: int
    pid: int
    repr_name: str = ""


class ActorLeft(msgspec.Struct, array_like=True, tag=25):
    """Worker → node: the actor has ended by its own will, or its ``__init__`` raised ``error`` (a pickle).

    All that it had answered was received. The process ends when nobody refers to an object that it owns.
    """

    actor: ActorId
    incarnation: int
    reason: str
    error: bytes = b""


class ActorDismissed(msgspec.Struct, array_like=True, tag=26):
    """Node → worker: nobody has a handle of the actor any more; end in good order."""

    actor: ActorId
    reason: str


class Item(msgspec.Struct, array_like=True, tag=27):
    """Worker → owner: a generator has yielded; indices count from 1 and come in order."""

    number: TaskNumber
    attempt: int
    index: int
    value: Value


class StreamAdvanced(msgspec.Struct, array_like=True, tag=28):
    """Owner → worker: so many items of a generator were taken."""

    number: TaskNumber
    taken: int


class StreamClosed(msgspec.Struct, array_like=True, tag=29):
    """Owner → worker: nobody wants more items of a generator."""

    number: TaskNumber


class CancelTask(msgspec.Struct, array_like=True, tag=30):
    """Owner → worker: end this attempt of a task; it is not tried again.

    What was not begun never will be. What runs is interrupted, or with ``force`` killed with its process; with
    ``recursive`` the tasks that it submitted are cancelled as well.
    """

    number: TaskNumber
    attempt: int
    force: bool
    recursive: bool


class CancelObject(msgspec.Struct, array_like=True, tag=31):
    """Borrower → owner: cancel the task that makes this object."""

    key: ObjectKey
    force: bool
    recursive: bool


class ReportObjects(msgspec.Struct, array_like=True, tag=32):
    """Node → process: tell which objects you know, the ``most`` largest of them, under this number."""

    inquiry: int
    most: int


class KnownObject(msgspec.Struct, array_like=True, frozen=True):
    """One object in ``ObjectsReported``.

    ``size_bytes`` is -1 where it is not known; ``status`` is that of the task that makes it; ``reasons`` say why the
    process keeps it, and ``borrowers`` how many others do. A large value lies in a ``segment`` of a ``node``.
    """

    owner: ProcessId
    key: ObjectKey
    size_bytes: int
    status: str
    reasons: list[str]
    borrowers: int = 0
    node: str = ""
    segment: str = ""


class ObjectsReported(msgspec.Struct, array_like=True, tag=33):
    """Process → node: the answer to ``ReportObjects``. ``count`` and ``inline_bytes`` are of all that it knows."""

    inquiry: int
    pid: int
    job: JobId
    count: int
    inline_bytes: int
    objects: list[KnownObject]


class CopyDropped(msgspec.Struct, array_like=True, tag=34):
    """Node → home of a segment: there is no copy of it here any more. ``serial`` is that of its loan."""

    segment: str
    serial: int


class SegmentWanted(msgspec.Struct, array_like=True, tag=35):
    """Process → its node: a task that waits here will read this segment of another node; pull it, if there is room."""

    home: NodeId
    segment: str
    size_bytes: int


class Measured(msgspec.Struct, array_like=True, frozen=True):
    """One series in ``MetricsReported``: how it has moved since the report before.

    ``value`` is by how much a counter rose, what a gauge is now, or what the values add up to that came to a histogram;
    of these there are ``counts`` more in its buckets, whose upper ends are ``bounds``.
    """

    name: str
    kind: Kind
    text: str
    labels: tuple[tuple[str, str], ...]
    value: float
    bounds: tuple[float, ...] = ()
    counts: list[int] = []


class MetricsReported(msgspec.Struct, array_like=True, tag=36):
    """Process → node: what the process has counted since its last report.

    Counters and histograms are increments, so that they stay right when the process ends; gauges end with it.
    ``dropped`` is how many series it had no room for, since then.
    """

    measured: list[Measured]
    dropped: int = 0


class ReportTask(msgspec.Struct, array_like=True, tag=38):
    """Node → process: tell how far a task of yours is, under this number."""

    inquiry: int
    task: TaskNumber


class TaskReported(msgspec.Struct, array_like=True, tag=39):
    """Process → node: the answer to ``ReportTask``; ``TaskStanding`` has the meaning of its fields."""

    inquiry: int
    state: str
    name: str = ""
    key: int = -1
    before: int = 0
    leases: int = 0
    process: str = ""
    actor: str = ""
    missing: list[tuple[ProcessId, ObjectKey]] = []
    missing_count: int = 0


class ReportTasks(msgspec.Struct, array_like=True, tag=40):
    """Node → process: tell which tasks you know, at most ``most`` of them, under this number.

    Number 0: what you have run; you will be killed.
    """

    inquiry: int
    most: int


class KnownTask(msgspec.Struct, array_like=True, frozen=True):
    """One task in ``TasksReported``: one that the process owns, or one that it runs or has run.

    ``owner`` is empty for the process's own; ``number`` is 0 for the making of the process's actor, ``attempt`` then
    the incarnation. All times are in seconds since the epoch: ``began_at`` is 0 where the process has not begun it,
    ``ended_at`` where it has not ended. ``code`` and ``text`` are of its error, ``function`` is the name of what it
    calls where ``name`` is another. ``parent`` is the id of the task that submitted it, empty for the driver. Calls of
    actors say nothing of ``resources``.
    """

    owner: ProcessId
    number: TaskNumber
    attempt: int
    name: str
    state: str
    actor: ActorId
    began_at: float = 0.0
    ended_at: float = 0.0
    code: str = ""
    text: str = ""
    function: str = ""
    created_at: float = 0.0
    parent: str = ""
    resources: dict[str, int] = {}
    group: str = ""


class TasksReported(msgspec.Struct, array_like=True, tag=41):
    """Process → node: the answer to ``ReportTasks``; with number 0, what a process that leaves has run, and owned."""

    inquiry: int
    pid: int
    job: JobId
    tasks: list[KnownTask]


Record = (
    Task
    | TaskDone
    | TasksReturned
    | WorkerBlocked
    | LeaseAssigned
    | LeaseGranted
    | LeaseReturned
    | LeaseRecalled
    | WorkerLost
    | WorkerReady
    | Fetch
    | Fetched
    | Borrow
    | Borrowed
    | Unborrow
    | Held
    | Transfer
    | SegmentFreed
    | SegmentMapped
    | SegmentRecalled
    | SegmentUnpinned
    | SegmentsUnpinned
    | SegmentSealed
    | ObjectUnavailable
    | ProcessUnneeded
    | ActorAssigned
    | ActorReady
    | ActorLeft
    | ActorDismissed
    | Item
    | StreamAdvanced
    | StreamClosed
    | CancelTask
    | CancelObject
    | ReportObjects
    | ObjectsReported
    | CopyDropped
    | SegmentWanted
    | MetricsReported
    | ReportTask
    | TaskReported
    | ReportTasks
    | TasksReported
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Record])

encode = _encoder.encode
"""Turn a list of records into bytes."""
decode = _decoder.decode
"""Turn bytes into a list of records; ``msgspec.ValidationError`` if they are not records."""
