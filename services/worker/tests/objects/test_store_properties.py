"""Every history of a node's object store: writers, owners and readers, moves that end or fail, deaths, a full store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shoal_core.protocol.errors import (
    AlreadyExistsError,
    DeclaredDeadError,
    NotFoundError,
    ObjectStoreFullError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.ids import JobId, ObjectKey, ProcessId, durable_id
from shoal_core.protocol.messages import Done, Message
from shoal_core.protocol.places import is_part, located
from shoal_core.protocol.records import SegmentSealed
from shoal_core.protocol.storage import (
    PUT_HOLDER,
    AllocateSegment,
    ObjectRestored,
    PersistSegment,
    PinSegment,
    RestoreObject,
    SegmentGranted,
    SegmentPinned,
)
from shoal_core.testing.builders import node_id, process_id
from shoal_worker.objects.files import (
    CreateFile,
    DropDurable,
    DurableFound,
    FileCreated,
    FileFilled,
    FileSpilled,
    FillFile,
    FindDurable,
    RemoveFile,
    ShelveFile,
    SpillFile,
    StoreCommand,
)
from shoal_worker.objects.store import NEVER, REFUSED_SECONDS, STALL_SECONDS, ObjectStore

JOB = JobId("00000001")
CAPACITY = 64 * 1024
SHARED_BYTES = 16 * 1024
SIZES = [4096, 5000, 9000, 20_000, 40_000]
PROCESSES = [process_id(number) for number in range(1, 5)]
DURABLE = "d" * 48
PART = ".part"

Order = CreateFile | FillFile | SpillFile | FindDurable


@dataclass
class Tier:
    """The durable tier: what each object holds, and who holds it."""

    contents: dict[str, str] = field(default_factory=dict)
    holders: dict[str, set[str]] = field(default_factory=dict)

    def put(self, object_id: str, contents: str, holder: str) -> None:
        self.contents.setdefault(object_id, contents)
        self.holders.setdefault(object_id, set()).add(holder)

    def drop(self, object_id: str, holder: str) -> None:
        left = {name for name in self.holders.get(object_id, ()) if not name.startswith(holder)}
        if left:
            self.holders[object_id] = left
        else:
            self.holders.pop(object_id, None)
            self.contents.pop(object_id, None)


class World:
    """A store's core, the files and the tier as they really are, and what was ordered and is not done."""

    def __init__(self) -> None:
        self.now = 100.0
        self.store = ObjectStore(node_id(1), CAPACITY, CAPACITY // 4, SHARED_BYTES)
        self.places: dict[str, str] = {}
        self.haunted: set[str] = set()
        self.files: dict[str, str | None] = {}
        self.tier = Tier()
        self.tier.put(DURABLE, "durable", "put")
        self.orders: list[Order] = []
        self.drops: list[DropDurable] = []
        self.asked: dict[int, Message] = {}
        self.tokens = 0
        self.serials = 0
        self.living = list(PROCESSES)
        self.writing: dict[str, ProcessId] = {}
        self.sealed: dict[str, tuple[ProcessId, str, str]] = {}
        self.freed: set[str] = set()
        self.mapped: dict[tuple[ProcessId, int], str] = {}
        self.pinning: set[tuple[ProcessId, int]] = set()
        self.ahead: set[str] = set()
        """What was promised ahead and is not written yet."""
        self.recalled: list[tuple[ProcessId, str]] = []
        self.unheard: dict[tuple[ProcessId, int], str] = {}
        """What processes have mapped and locked without that the store has heard of it."""

    # ---------------------------------------------------------------------------- what the store orders

    def after(self) -> None:
        """Perform what the last input led to."""
        for command in self.store.take_commands():
            self.perform(command)
        self.recalled += self.store.recalls
        self.store.recalls = []
        replies, self.store.replies = self.store.replies, []
        for token, answer in replies:
            self.answered(self.asked.pop(token), answer)  # KeyError: a second reply

    def perform(self, command: StoreCommand) -> None:
        match command:
            case CreateFile(name, _, reused, filled, part):
                path = part or name + PART * filled
                assert path not in self.haunted
                assert not reused or reused not in self.mapped_places(), "nobody maps a file that is used again"
                if reused:
                    assert reused == part or not part
                    del self.files[reused]
                assert path not in self.files
                self.files[path] = None
                self.orders.append(command)
            case RemoveFile(place):
                parts = [path for path in self.files if located(path)[0] == place and is_part(path)]
                assert parts or place not in self.haunted, "what the dead may still use goes with its slab only"
                for path in [place, place + PART, *parts]:
                    assert path not in self.mapped_places(), "what is mapped keeps its pages"
                    self.files.pop(path, None)
                    self.haunted.discard(path)
                    self.writing = {name: who for name, who in self.writing.items() if self.places[name] != path}
            case ShelveFile(name, shelf):
                assert name not in self.mapped_places(), "what is mapped keeps its file"
                assert shelf not in self.files
                self.files[shelf] = self.files.pop(name)
            case FillFile() | SpillFile() | FindDurable():
                self.orders.append(command)
            case DropDurable():
                self.drops.append(command)

    def answered(self, request: Message, answer: Message | ShoalError) -> None:
        match request, answer:
            case AllocateSegment(ahead=True), SegmentGranted(segment=""):
                pass
            case AllocateSegment(), SegmentGranted():
                assert request.process in self.living, "nothing is promised to the dead"
                assert answer.capacity_bytes >= request.size_bytes
                assert answer.place in self.files
                self.places[answer.segment] = answer.place
                self.writing[answer.segment] = request.process
                if request.ahead:
                    self.ahead.add(answer.segment)
            case PinSegment(), SegmentPinned():
                self.map(request, answer.place)
            case RestoreObject(), ObjectRestored():
                assert self.files[answer.segment] == "durable", "a restored object is whole"
                self.places[answer.segment] = answer.segment
                self.sealed[answer.segment] = (request.process, DURABLE, "durable")
            case AllocateSegment(), ObjectStoreFullError() | DeclaredDeadError():
                pass
            case PersistSegment(), Done():
                held = self.tier.holders[durable_id(request.process, request.key)]
                assert PUT_HOLDER in held, "what is acknowledged as durable is in the tier"
            case PersistSegment(), ShoalError():
                pass
            case PinSegment() | RestoreObject(), ObjectStoreFullError() | NotFoundError() | ServiceError():
                pass
            case RestoreObject(), DeclaredDeadError():
                pass
            case _:
                raise AssertionError(f"{request!r} was answered with {answer!r}")

    def mapped_places(self) -> set[str]:
        return {self.places[name] for name in self.mapped.values()}

    def map(self, request: PinSegment, at: str) -> None:
        place = (request.process, request.serial)
        if place in self.pinning:
            self.pinning.remove(place)
            if request.process in self.living:
                _, _, contents = self.sealed[request.segment]
                assert self.files[at] == contents, "a pin never sees half an object"
                self.places[request.segment] = at
                self.mapped[place] = request.segment

    def ask(self, message: Message) -> None:
        self.tokens += 1
        self.asked[self.tokens] = message
        try:
            if isinstance(message, AllocateSegment):
                self.store.allocate(message, self.tokens, JOB, self.now)
            elif isinstance(message, PinSegment):
                self.store.pin(message, self.tokens, self.now)
            elif isinstance(message, PersistSegment):
                self.store.persist(message, self.tokens, JOB)
            else:
                assert isinstance(message, RestoreObject)
                self.store.restore(message, self.tokens, JOB)
        except ShoalError as error:
            self.answered(self.asked.pop(self.tokens), error)
        self.after()

    # ---------------------------------------------------------------------------- what comes of orders

    def finish(self, order: Order, fate: str = "done") -> None:
        self.orders.remove(order)
        match order:
            case CreateFile(name, _, _, filled, part):
                if fate != "done":
                    self.files.pop(part or name + PART * filled)
                self.store.take(FileCreated(name, "" if fate == "done" else "no room"), self.now)
            case FillFile():
                self.fill(order, fate)
            case SpillFile():
                self.spill(order, fate)
            case FindDurable(restoration):
                there = fate == "done" and DURABLE in self.tier.contents
                found = (
                    DurableFound(restoration, 9000) if there else DurableFound(restoration, 0, NotFoundError("none"))
                )
                self.store.take(found, self.now)
        self.after()

    def fill(self, order: FillFile, fate: str) -> None:
        error: ShoalError | None = None
        contents = self.tier.contents.get(order.object_id)
        part = order.name + PART
        if fate == "done" and contents is not None and part in self.files:
            del self.files[part]
            self.files[order.name] = contents
        else:
            self.files.pop(part, None)
            error = ServiceError("the tier is away") if contents is not None else NotFoundError("deleted")
        self.store.take(FileFilled(order.name, error), self.now)

    def spill(self, order: SpillFile, fate: str) -> None:
        error: ShoalError | None = None
        contents = self.files.get(order.place)
        if order.holder == PUT_HOLDER:
            contents = order.name
        assert contents is not None, "only what is whole is spilled"
        if fate == "full":
            error = ObjectStoreFullError("the tier is full")
        elif fate == "failed":
            error = ServiceError("the tier is away")
        elif self.tier.contents.get(order.object_id, contents) != contents:
            error = AlreadyExistsError("other contents")
        else:
            self.tier.put(order.object_id, contents, order.holder)
        self.store.take(FileSpilled(order.name, order.holder, error), self.now)

    def drop(self, command: DropDurable) -> None:
        self.drops.remove(command)
        self.tier.drop(command.object_id, command.holder)

    # ---------------------------------------------------------------------------- processes

    def allocate(self, process: ProcessId, size_bytes: int, ahead: bool = False) -> None:
        self.serials += 1
        self.ask(AllocateSegment(process=process, size_bytes=size_bytes, serial=self.serials, ahead=ahead))

    def give_back(self, name: str) -> None:
        """A process does not want what it was promised."""
        self.ahead.remove(name)
        place = self.places[name]
        self.store.freed(self.writing.pop(name), name, self.now)
        self.after()
        assert place not in self.files or not self.store.segments.get(name), "it is warm, or used again, or gone"

    def seal(self, name: str, owner: ProcessId, key: int, freed: bool) -> None:
        writer = self.writing.pop(name)
        self.ahead.discard(name)
        object_id = durable_id(owner, ObjectKey(key))
        contents = name
        self.files[self.places[name]] = contents
        self.sealed[name] = (owner, object_id, contents)
        if freed:
            self.free(name)
        self.store.sealed(writer, SegmentSealed(name, owner, ObjectKey(key)), self.now)
        if owner not in self.living:
            self.free(name)
        self.after()

    def pin(self, process: ProcessId, name: str) -> None:
        self.serials += 1
        self.pinning.add((process, self.serials))
        self.ask(PinSegment(process=process, segment=name, serial=self.serials))

    def map_unasked(self, process: ProcessId, name: str) -> None:
        if self.files.get(name) == self.sealed[name][2]:
            self.serials += 1
            self.unheard[process, self.serials] = name

    def hear(self, process: ProcessId, serial: int) -> None:
        """The store hears of a pin, on whatever has become of the segment by now."""
        name = self.unheard.pop((process, serial))
        segment = self.store.segments.get(name)
        self.store.mapped(process, name, serial)
        if name not in self.freed and segment is not None and segment.in_memory():
            self.places[name] = segment.place
            self.mapped[process, serial] = name
        self.after()

    def unpin(self, process: ProcessId, serial: int) -> None:
        self.pinning.discard((process, serial))
        name = self.mapped.pop((process, serial), None)
        names = [name] if name is not None else list(self.sealed)
        self.store.unpinned(process, [(one, serial) for one in names], self.now)
        self.after()

    def free(self, name: str) -> None:
        self.freed.add(name)
        self.store.freed(self.sealed[name][0], name, self.now)
        self.after()

    def die(self, process: ProcessId, reaped: bool = True) -> None:
        self.living.remove(process)
        if not reaped:
            used = [name for (who, _), name in self.mapped.items() if who == process]
            used += [name for name, who in self.writing.items() if who == process]
            self.haunted |= {self.places[name] for name in used if is_part(self.places[name])}
        for place in [place for place in self.mapped if place[0] == process]:
            del self.mapped[place]
        self.pinning = {place for place in self.pinning if place[0] != process}
        self.unheard = {place: name for place, name in self.unheard.items() if place[0] != process}
        self.writing = {name: writer for name, writer in self.writing.items() if writer != process}
        self.freed |= {name for name, (owner, _, _) in self.sealed.items() if owner == process}
        self.store.process_died(process, reaped, self.now)
        self.after()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.store.pump(self.now)
        self.after()

    # ---------------------------------------------------------------------------- invariants

    def check(self) -> None:
        self.store.sanity_check()
        assert self.store.segments.used_bytes <= CAPACITY
        for name, (_, object_id, contents) in self.sealed.items():
            if name in self.freed or self.store.segments.get(name) is None:
                continue
            segment = self.store.segments.get(name)
            assert segment is not None
            in_memory = self.files.get(segment.place) == contents
            copied = segment.holder in self.tier.holders.get(object_id, ())
            dropped = any(drop.object_id == object_id and segment.holder.startswith(drop.holder) for drop in self.drops)
            assert in_memory or (copied and self.tier.contents[object_id] == contents and not dropped), "it is lost"
        for name in self.mapped.values():
            assert self.files[self.places[name]] == self.sealed[name][2], "what is mapped stays as it is"
        assert self.haunted <= {*self.files}, "and what the dead may still use"
        if self.asked:
            assert self.orders or self.store.wake_at < NEVER, "who waits will be answered"

    def settle(self) -> None:
        """End everything, and see that nothing is left."""
        for place in list(self.unheard):
            self.hear(*place)
        for place in list(self.mapped):
            self.unpin(*place)
        for process in list(self.living):
            self.die(process)
        for _ in range(100):
            if not self.orders and not self.asked:
                break
            for order in list(self.orders):
                self.finish(order)
            self.pass_time(STALL_SECONDS + 1)
        assert not self.orders
        assert not self.asked, "every request has one reply"
        for drop in list(self.drops):
            self.drop(drop)
        table = self.store.segments
        assert len(table) == 0
        assert table.used_bytes == 0
        assert not any(name.endswith(PART) for name in self.files)
        kept = [holders for holders in self.tier.holders.values() if holders != {PUT_HOLDER}]
        assert not kept, "nothing durable is left but what was put as durable"
        while table.warm_bytes:
            table._cool_largest()
        self.after()
        assert self.files == {}, "no file is left"


pick = st.integers(0, 1000)
FATES = ["done", "done", "done", "failed", "full"]


class StoreMachine(RuleBasedStateMachine):
    """Any history of one store."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def living(self, which: int) -> ProcessId | None:
        living = self.world.living
        return living[which % len(living)] if living else None

    @rule(which=pick, size=st.sampled_from(SIZES))
    def allocate(self, which: int, size: int) -> None:
        process = self.living(which)
        if process is not None:
            self.world.allocate(process, size)

    @rule(which=pick, size=st.sampled_from(SIZES))
    def allocate_ahead(self, which: int, size: int) -> None:
        process = self.living(which)
        if process is not None:
            self.world.allocate(process, size, ahead=True)

    @rule(which=pick)
    def a_process_gives_back(self, which: int) -> None:
        world = self.world
        names = sorted(world.ahead & {*world.writing})
        if names:
            world.give_back(names[which % len(names)])

    @rule(which=pick)
    def a_process_hears_that_it_is_to_give_back(self, which: int) -> None:
        world = self.world
        if world.recalled:
            process, name = world.recalled.pop(which % len(world.recalled))
            if name in world.ahead and world.writing.get(name) == process:
                world.give_back(name)

    @rule(which=pick)
    def a_request_comes_twice(self, which: int) -> None:
        asked = list(self.world.asked.values())
        if asked:
            request = asked[which % len(asked)]
            if request.process in self.world.living:  # type: ignore[attr-defined]
                self.world.ask(request)

    @rule(which=pick, owner=pick, key=st.sampled_from([7, 8, 9, 10, 11]), freed=st.sampled_from([False] * 5 + [True]))
    def seal(self, which: int, owner: int, key: int, freed: bool) -> None:
        names = list(self.world.writing)
        if names:
            self.world.seal(names[which % len(names)], PROCESSES[owner % len(PROCESSES)], key, freed)

    @rule(which=pick, process=pick)
    def pin(self, which: int, process: int) -> None:
        reader, names = self.living(process), [name for name in self.world.sealed if name not in self.world.freed]
        if reader is not None and names:
            self.world.pin(reader, names[which % len(names)])

    @rule(which=pick, process=pick)
    def map_unasked(self, which: int, process: int) -> None:
        reader, names = self.living(process), list(self.world.sealed)
        if reader is not None and names:
            self.world.map_unasked(reader, names[which % len(names)])

    @rule(which=pick)
    def the_store_hears_of_a_pin(self, which: int) -> None:
        unheard = list(self.world.unheard)
        if unheard:
            self.world.hear(*unheard[which % len(unheard)])

    @rule(which=pick)
    def unpin(self, which: int) -> None:
        places = [*self.world.mapped, *sorted(self.world.pinning)]
        if places:
            self.world.unpin(*places[which % len(places)])

    @rule(which=pick)
    def free(self, which: int) -> None:
        names = [name for name in self.world.sealed if name not in self.world.freed]
        if names:
            self.world.free(names[which % len(names)])

    @rule(which=pick, reaped=st.booleans())
    def die(self, which: int, reaped: bool) -> None:
        process = self.living(which)
        if process is not None:
            self.world.die(process, reaped)

    @rule(which=pick, fate=st.sampled_from(FATES))
    def an_order_ends(self, which: int, fate: str) -> None:
        orders = self.world.orders
        if orders:
            self.world.finish(orders[which % len(orders)], fate)

    @rule()
    def all_orders_end(self) -> None:
        for order in list(self.world.orders):
            self.world.finish(order)

    @rule(which=pick)
    def what_is_durable_goes(self, which: int) -> None:
        drops = self.world.drops
        if drops:
            self.world.drop(drops[which % len(drops)])

    @rule(which=pick)
    def persist(self, which: int) -> None:
        writing = list(self.world.writing.items())
        if writing:
            name, process = writing[which % len(writing)]
            self.world.ask(PersistSegment(process=process, segment=name, key=ObjectKey(1000 + int(name[1:]))))

    @rule(process=pick)
    def restore(self, process: int) -> None:
        asker = self.living(process)
        if asker is not None:
            self.world.serials += 1
            self.world.ask(RestoreObject(process=asker, object_id=DURABLE, serial=self.world.serials))

    @rule(seconds=st.sampled_from([0.1, REFUSED_SECONDS, STALL_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @invariant()
    def all_is_in_order(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(60))
def test_long_histories_in_which_much_is_going_on(seed: int) -> None:
    """Walk at random, deaths being rarer than work; hypothesis finds small cases, this finds crowded ones."""
    random = Random(seed)

    def which() -> int:
        return random.randrange(1000)

    machine = StoreMachine()
    actions: dict[Callable[[], None], float] = {
        lambda: machine.allocate(which(), random.choice(SIZES)): 5,
        lambda: machine.allocate_ahead(which(), random.choice(SIZES)): 1,
        lambda: machine.a_process_gives_back(which()): 0.3,
        lambda: machine.a_process_hears_that_it_is_to_give_back(which()): 2,
        lambda: machine.a_request_comes_twice(which()): 1,
        lambda: machine.seal(which(), which(), random.randrange(7, 40), random.random() < 0.1): 6,
        lambda: machine.pin(which(), which()): 5,
        lambda: machine.map_unasked(which(), which()): 1,
        lambda: machine.the_store_hears_of_a_pin(which()): 1,
        lambda: machine.unpin(which()): 6,
        lambda: machine.free(which()): 1,
        lambda: machine.die(which(), random.random() < 0.5): 0.1,
        lambda: machine.an_order_ends(which(), random.choice(FATES)): 8,
        lambda: machine.all_orders_end(): 2,
        lambda: machine.what_is_durable_goes(which()): 1,
        lambda: machine.restore(which()): 0.5,
        lambda: machine.persist(which()): 0.5,
        lambda: machine.time_passes(random.choice([0.1, REFUSED_SECONDS, STALL_SECONDS])): 1,
    }
    for action in random.choices([*actions], [*actions.values()], k=600):
        action()
        machine.all_is_in_order()
    counts = machine.world.store.counts
    assert counts.spilled, "something was spilled in this history"
    machine.teardown()


# ------------------------------------------------------------------------------------ step by step

SIZE = 8192
A, B = PROCESSES[:2]


class Calm(World):
    """A store whose files are made at once; ``taken`` copies are taken by the durable tier, then it is full."""

    def __init__(self, taken: int = 1000) -> None:
        super().__init__()
        self.taken = taken
        self.refusals: list[ShoalError] = []

    def proceed(self) -> None:
        while self.orders:
            order = self.orders[0]
            full = isinstance(order, SpillFile) and self.taken <= 0
            self.taken -= isinstance(order, SpillFile)
            self.finish(order, "full" if full else "done")

    def answered(self, request: Message, answer: Message | ShoalError) -> None:
        super().answered(request, answer)
        if isinstance(answer, ShoalError):
            self.refusals.append(answer)

    def put(self, size_bytes: int = SIZE) -> str | None:
        """Write an object; return its segment, None where there is no room now."""
        self.allocate(A, size_bytes)
        self.proceed()
        writing = [name for name in self.writing if name not in self.ahead]
        if not writing:
            return None
        (name,) = writing
        self.seal(name, A, 100 + int(name[1:]), freed=False)
        return name

    def fill_up(self) -> list[str]:
        """Put objects until one finds no room."""
        names = []
        while (name := self.put()) is not None:
            names.append(name)
        return names

    def map_one(self, name: str) -> bool:
        """Map a segment; tell whether that was possible at once."""
        self.pin(B, name)
        self.proceed()
        return name in self.mapped.values()

    def unmap_all(self) -> None:
        for place in list(self.mapped):
            self.unpin(*place)


def test_the_least_recently_used_go_first() -> None:
    world = Calm()
    names = [world.put() for _ in range(CAPACITY // SIZE)]
    assert names[0] is not None
    assert world.map_one(names[0])
    world.unmap_all()
    world.put()
    spilled = [segment.name for segment in world.store.segments if not segment.has_file()]
    assert spilled == names[1:2]
    world.settle()


def test_what_comes_back_is_spilled_again_without_being_copied() -> None:
    world = Calm()
    names = [world.put() for _ in range(12)]
    for name in names:
        assert name is not None
        assert world.map_one(name)
        world.unmap_all()
    copied = world.store.counts.spilled
    assert copied <= 12
    for name in names:
        assert name is not None
        assert world.map_one(name)
        world.unmap_all()
    assert world.store.counts.spilled == copied
    world.settle()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_durable_tier_that_is_full_never_makes_what_it_holds_unreadable(taken: int) -> None:
    world = Calm(taken)
    names = world.fill_up()
    assert len(names) >= CAPACITY // SIZE
    (refusal,) = world.refusals
    assert isinstance(refusal, ObjectStoreFullError)
    for part in ("the tier is full", f"process {A} holds", "give the node a larger object_store_memory"):
        assert part in str(refusal)
    for name in names:
        assert world.map_one(name)
        world.unmap_all()
    world.settle()


def test_where_all_is_mapped_whoever_waits_is_told_in_the_end_what_is_mapped() -> None:
    world = Calm()
    names = [world.put() for _ in range(CAPACITY // SIZE)]
    for name in names:
        assert name is not None
        assert world.map_one(name)
    world.allocate(A, SIZE)
    world.pass_time(STALL_SECONDS - 1)
    assert not world.refusals
    world.pass_time(2)
    (refusal,) = world.refusals
    assert f"{CAPACITY:,} bytes are mapped by processes" in str(refusal)
    world.allocate(A, SIZE)
    world.unmap_all()
    world.proceed()
    assert len(world.writing) == 1, "who waits is served as soon as something is unmapped"
    world.settle()


def test_what_never_fits_is_refused_at_once() -> None:
    world = Calm()
    world.allocate(A, CAPACITY + 1)
    (refusal,) = world.refusals
    assert "larger than the node's whole shared memory" in str(refusal)
    world.settle()


def test_the_copy_that_is_refused_is_tried_again_after_a_while() -> None:
    world = Calm(0)
    world.fill_up()
    world.taken = 1000
    assert world.put() is None, "the tier has just refused"
    world.pass_time(REFUSED_SECONDS)
    assert world.put() is not None
    world.settle()


def test_what_was_promised_ahead_is_asked_back_as_soon_as_somebody_wants_the_room() -> None:
    world = Calm()
    world.allocate(A, SIZE, ahead=True)
    world.proceed()
    (ahead,) = world.ahead
    world.taken = 0
    world.fill_up()
    assert world.recalled == [(A, ahead)], "once"
    assert not world.refusals, "it may come back yet"
    world.give_back(ahead)
    world.proceed()
    assert world.writing, "who waits has its room"
    world.settle()


def test_nothing_is_promised_ahead_where_room_is_scarce_or_somebody_waits() -> None:
    world = Calm()
    while world.store.segments.used_bytes + SIZE <= CAPACITY // 2:
        world.put()
    world.allocate(A, SIZE, ahead=True)
    assert not world.ahead
    assert not world.asked
    world.settle()


def test_what_was_promised_ahead_and_is_given_back_is_warm() -> None:
    world = Calm()
    world.allocate(A, SIZE, ahead=True)
    world.proceed()
    (ahead,) = world.ahead
    world.give_back(ahead)
    assert world.store.segments.warm_bytes == SIZE
    assert world.files
    world.settle()
