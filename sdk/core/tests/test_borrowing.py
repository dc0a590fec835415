"""Distributed reference counting among four processes, in every order that channels allow.

The model runs the real ``Borrowing`` in each process and around it what a process does with it: it restores the
references inside what arrives, holds them, and notices later that the last one was dropped. Channels keep the order of
each pair of processes and of nothing else. Two things must hold. An object is never freed while a live process can
reach it; and when everybody has dropped everything, nobody remembers anything.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal_core.protocol.ids import ObjectKey, ProcessId, TaskNumber, object_key
from shoal_core.protocol.records import (
    Borrow,
    Borrowed,
    Fetch,
    Fetched,
    Held,
    Record,
    Reference,
    Task,
    TaskDone,
    TasksReturned,
    Transfer,
    Unborrow,
    contained_in,
)
from shoal_core.runtime.ownership.borrowing import Borrowing
from shoal_core.testing.builders import inline, process_id, put_key, task, task_done


class Hold:
    """References that something in a process holds; dropping it releases them, as dropping an ``ObjectRef`` does."""

    def __init__(self, process: Process, references: Sequence[Reference]) -> None:
        self.process = process
        self.references = list(references)
        for reference in references:
            process.holds[reference] += 1
            process.states.setdefault(reference, State())

    def __del__(self) -> None:
        self.process.released.extend(self.references)


@dataclass
class State:
    """What a process knows of an object: what its value contains, once it is here, and who asked for it before."""

    contents: Hold | None = None
    waiting: list[ProcessId] = field(default_factory=list)


@dataclass
class Pending:
    """A task that was submitted and has not ended."""

    record: Task
    worker: ProcessId
    arguments: Hold


@dataclass
class Running:
    """A task at its worker."""

    record: Task
    owner: ProcessId
    references: Hold


class Process:
    """A process: the protocol's core, and its runtime as far as references go."""

    def __init__(self, number: int, world: World) -> None:
        self.id = process_id(number)
        self.world = world

        self.states: dict[Reference, State] = {}
        self.holds: Counter[Reference] = Counter()
        self.released: deque[Reference] = deque()
        self.variables: list[Hold] = []
        self.pending: dict[TaskNumber, Pending] = {}
        self.running: list[Running] = []
        self.forgotten: set[ProcessId] = set()
        self.borrowing = Borrowing(self.id)
        self.numbers = 0

    # ------------------------------------------------------------------------------- what user code does

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def put(self, contents: Sequence[Reference]) -> None:
        """Make an object that contains references."""
        reference = Reference(self.id, put_key(self.next_number()))
        self.variables.append(Hold(self, [reference]))
        self.states[reference].contents = Hold(self, self.world.without_cycles(reference, contents))

    def submit(self, worker: ProcessId, arguments: Sequence[Reference]) -> None:
        """Submit a task with references inside its arguments."""
        record = task(self.next_number(), arguments=inline(contained=arguments))
        self.variables.append(Hold(self, [Reference(self.id, object_key(record.number, 1))]))
        self.pending[record.number] = Pending(record, worker, Hold(self, arguments))
        self.send(worker, record)

    def end_task(self, index: int, keep: Sequence[Reference], result: Sequence[Reference]) -> None:
        """End a task: ``keep`` of its arguments stay in a global variable, ``result`` is inside what it returns."""
        running = self.running.pop(index)
        self.variables += [Hold(self, [reference]) for reference in keep]
        result = self.world.without_cycles(Reference(running.owner, object_key(running.record.number, 1)), result)
        results = Hold(self, result)
        arguments, owner, record = running.references.references, running.owner, running.record
        del running
        self.turn()
        kept = [reference for reference in dict.fromkeys(arguments) if self.holds[reference]]
        foreign = [reference for reference in kept if reference.owner != owner]
        own = [reference for reference in kept if reference.owner == owner]
        self.borrowing.ensure(foreign, partial(self._send_done, record, owner, own, Hold(self, kept), results))
        self.flush()

    def _send_done(self, record: Task, owner: ProcessId, own: list[Reference], holds: Hold, results: Hold) -> None:
        if results.references:
            self.borrowing.send(results.references, results, owner)
            self.flush()
        for reference in own:
            self.borrowing.keep(reference)
        value = inline(contained=results.references)
        self.send(owner, task_done(record.number, values=[value], kept=own))

    def give_back(self, index: int) -> None:
        """Return a task that was not begun."""
        running = self.running.pop(index)
        self.send(running.owner, TasksReturned(running.record.lease, [running.record.number], False))

    def visible(self) -> list[Reference]:
        """The references user code can name here, in a fixed order."""
        held = [r for hold in self.variables for r in hold.references]
        held += [r for running in self.running for r in running.references.references]
        held += [r for reference in held for r in self.inside(reference)]
        return list(dict.fromkeys(held))

    def inside(self, reference: Reference) -> Sequence[Reference]:
        state = self.states.get(reference)
        return state.contents.references if state is not None and state.contents is not None else ()

    # ------------------------------------------------------------------------------- what arrives

    def receive(self, sender: ProcessId, record: Record) -> None:
        match record:
            case Task():
                references = Hold(self, contained_in(record.arguments))
                self.borrowing.ensure([r for r in references.references if r.owner != sender], lambda: None)
                self.running.append(Running(record, sender, references))
            case TaskDone():
                self._task_done(sender, record)
            case TasksReturned():
                for number in record.numbers:
                    self.world.place_again(self, number)
            case Fetch():
                self._fetch(sender, record.key)
            case Fetched():
                contents = self._adopt(contained_in(record.value), sender)
                state = self.states.get(Reference(sender, record.key))
                if state is not None:
                    state.contents = contents
            case Borrow():
                self.borrowing.asked(record.key, sender)
            case Borrowed():
                self.borrowing.counted(record.key, sender)
                if Reference(sender, record.key) not in self.states:
                    self.borrowing.let_go(Reference(sender, record.key))
            case Unborrow():
                if self.borrowing.taken_back(record.key, sender, record.count):
                    self._free_if_unused(record.key)
            case Transfer():
                self.borrowing.transferred(record, sender, Hold(self, record.references))
            case Held():
                self.borrowing.held(record.transfer)
            case _:
                raise AssertionError(f"nobody sends {record} here")
        self.flush()

    def _task_done(self, worker: ProcessId, record: TaskDone) -> None:
        for reference in record.kept:
            self.borrowing.lend(reference.key, worker)
        contents = self._adopt(contained_in(record.values[0]), worker)
        reference = Reference(self.id, object_key(record.number, 1))
        state = self.states.get(reference)
        if state is not None:
            self._settle(reference, state, contents)
        del self.pending[record.number]

    def fail(self, number: TaskNumber) -> None:
        """End a task that no live process can run."""
        reference = Reference(self.id, object_key(number, 1))
        if (state := self.states.get(reference)) is not None:
            self._settle(reference, state, Hold(self, []))
        del self.pending[number]

    def _settle(self, reference: Reference, state: State, contents: Hold) -> None:
        state.contents = contents
        waiting, state.waiting = state.waiting, []
        for borrower in waiting:
            self._tell(reference, contents, borrower)

    def _fetch(self, borrower: ProcessId, key: ObjectKey) -> None:
        reference = Reference(self.id, key)
        state = self.states.get(reference)
        if state is None:
            assert reference in self.world.excused, "a live borrower asks for an object that was freed"
        elif state.contents is None:
            state.waiting.append(borrower)
        else:
            self._tell(reference, state.contents, borrower)

    def _tell(self, reference: Reference, contents: Hold, borrower: ProcessId) -> None:
        if contents.references:
            self.borrowing.send(contents.references, contents, borrower)
            self.flush()
        self.send(borrower, Fetched(reference.key, inline(contained=contents.references)))

    def _adopt(self, references: Sequence[Reference], sender: ProcessId) -> Hold:
        hold = Hold(self, references)
        self.borrowing.received(references, sender)
        return hold

    # ------------------------------------------------------------------------------- what is dropped

    def turn(self) -> None:
        """Notice what was dropped since the last turn."""
        while self.released:
            reference = self.released.popleft()
            self.holds[reference] -= 1
            assert self.holds[reference] >= 0
            if not self.holds[reference]:
                del self.holds[reference]
                if reference.owner != self.id:
                    del self.states[reference]
                    if not self.borrowing.is_asked(reference):
                        self.borrowing.let_go(reference)
                else:
                    self._free_if_unused(reference.key)
        self.flush()

    def _free_if_unused(self, key: ObjectKey) -> None:
        reference = Reference(self.id, key)
        if not self.holds[reference] and key not in self.borrowing.lent:
            self.states.pop(reference, None)

    def reachable(self) -> set[Reference]:
        """What somebody here holds: all that is counted and not on its way to be noticed as dropped."""
        return set(self.holds - Counter(self.released))

    # ------------------------------------------------------------------------------- channels and deaths

    def send(self, peer: ProcessId, record: Record) -> None:
        if peer not in self.forgotten:
            self.world.channels.setdefault((self.id, peer), deque()).append(record)

    def flush(self) -> None:
        outgoing = self.borrowing.outgoing
        for peer, record in outgoing:
            assert peer != self.id
            self.send(ProcessId(peer), record)
        outgoing.clear()

    def hear_of_death(self, process: ProcessId) -> None:
        self.forgotten.add(process)
        self.world.channels.pop((process, self.id), None)
        for key in self.borrowing.process_died(process):
            self._free_if_unused(key)
        self.running = [running for running in self.running if running.owner != process]
        for number in [number for number, pending in self.pending.items() if pending.worker == process]:
            self.world.place_again(self, number)
        self.flush()


class World:
    """The processes, and the channels between them."""

    def __init__(self, count: int) -> None:
        self.channels: dict[tuple[ProcessId, ProcessId], deque[Record]] = {}
        self.excused: set[Reference] = set()
        """References that a process was passing on when it died: whether they arrived in time is nobody's fault."""
        self.processes = {process.id: process for process in (Process(n + 1, self) for n in range(count))}
        self.dead: dict[ProcessId, Process] = {}
        self.edges: dict[Reference, set[Reference]] = {}

    def without_cycles(self, container: Reference, contents: Sequence[Reference]) -> list[Reference]:
        """Leave out what contains the container itself: counting never frees cycles, and does not promise to."""
        chosen = [reference for reference in contents if not self._leads_to(reference, container)]
        self.edges.setdefault(container, set()).update(chosen)
        return chosen

    def _leads_to(self, start: Reference, end: Reference) -> bool:
        seen, open_ = {start}, [start]
        while open_:
            new = self.edges.get(open_.pop(), set()) - seen
            seen |= new
            open_ += new
        return end in seen

    def busy_channels(self) -> list[tuple[ProcessId, ProcessId]]:
        return sorted(pair for pair, queue in self.channels.items() if queue and pair[1] in self.processes)

    def deliver(self, pair: tuple[ProcessId, ProcessId]) -> None:
        record = self.channels[pair].popleft()
        self.processes[pair[1]].receive(pair[0], record)

    def place_again(self, owner: Process, number: TaskNumber) -> None:
        """Send a task to another worker, or fail it if there is none."""
        pending = owner.pending[number]
        others = [id for id in self.processes if id != owner.id and id not in owner.forgotten]
        if not others:
            owner.fail(number)
            return
        pending.worker = others[number % len(others)]
        owner.send(pending.worker, pending.record)

    def kill(self, process: Process) -> None:
        del self.processes[process.id]
        self.dead[process.id] = process
        for (sender, _), queue in self.channels.items():
            if sender == process.id:
                self.excused.update(reference for record in queue for reference in carried(record))
        self.excused.update(reference for p in process.pending.values() for reference in p.arguments.references)
        self.excused.update(r for _, hold in process.borrowing._transfers.values() for r in hold.references)

    def check(self) -> None:
        """No object is gone that a live process holds, or that is on its way between live processes."""
        for process in self.processes.values():
            self._check_alive(process.reachable(), f"{process.id} holds")
        for (sender, receiver), queue in self.channels.items():
            if sender in self.processes and receiver in self.processes:
                for record in queue:
                    self._check_alive(carried(record), f"{record} carries")

    def _check_alive(self, references: Iterable[Reference], who: str) -> None:
        for reference in references:
            owner = self.processes.get(reference.owner)
            if owner is not None and reference not in self.excused:
                assert reference in owner.states, f"{who} {reference}, which its owner has freed"

    def settle(self) -> None:
        """Have everybody drop everything, and let all of it be noticed and told."""
        for _ in range(1000):
            for process in list(self.processes.values()):
                for dead in set(self.dead) - process.forgotten:
                    process.hear_of_death(dead)
                process.variables.clear()
                while process.running:
                    process.end_task(0, [], [])
                process.turn()
            busy = self.busy_channels()
            if not busy and not any(process.released for process in self.processes.values()):
                return
            for pair in busy:
                while self.channels[pair]:
                    self.deliver(pair)
                self.check()
        raise AssertionError("the processes never came to rest")

    def check_empty(self) -> None:
        for process in self.processes.values():
            assert not process.pending, "every task ends"
            assert not process.states, "no object is left"
            assert process.borrowing.is_quiet(), "nothing is remembered of any"


def carried(record: Record) -> Sequence[Reference]:
    """The references that a record brings to its receiver."""
    match record:
        case Task():
            return contained_in(record.arguments)
        case TaskDone():
            return [*contained_in(record.values[0]), *record.kept]
        case Fetched():
            return contained_in(record.value)
        case Transfer():
            return record.references
    return ()


picks = st.lists(st.integers(0, 100), max_size=3)
index = st.integers(0, 100)


def pick(references: Sequence[Reference], numbers: Sequence[int]) -> list[Reference]:
    return list(dict.fromkeys(references[n % len(references)] for n in numbers)) if references else []


class BorrowingMachine(RuleBasedStateMachine):
    """Every order of puts, tasks, results, fetches, drops, deliveries and deaths."""

    @initialize(count=st.integers(3, 4))
    def start(self, count: int) -> None:
        self.world = World(count)

    def process(self, number: int) -> Process:
        processes = list(self.world.processes.values())
        return processes[number % len(processes)]

    @rule(at=index, contents=picks)
    def put(self, at: int, contents: list[int]) -> None:
        process = self.process(at)
        process.put(pick(process.visible(), contents))

    @rule(at=index, worker=index, arguments=picks)
    def submit(self, at: int, worker: int, arguments: list[int]) -> None:
        process = self.process(at)
        others = [id for id in self.world.processes if id != process.id and id not in process.forgotten]
        if others:
            process.submit(others[worker % len(others)], pick(process.visible(), arguments))

    @rule(at=index, which=index, keep=picks, result=picks)
    def end_task(self, at: int, which: int, keep: list[int], result: list[int]) -> None:
        process = self.process(at)
        if process.running:
            which %= len(process.running)
            arguments = process.running[which].references.references
            process.end_task(which, pick(arguments, keep), pick(process.visible(), result))

    @rule(at=index, which=index)
    def give_back(self, at: int, which: int) -> None:
        process = self.process(at)
        if process.running:
            process.give_back(which % len(process.running))

    @rule(at=index, which=index)
    def fetch(self, at: int, which: int) -> None:
        process = self.process(at)
        foreign = [r for r in process.visible() if r.owner != process.id and r.owner not in process.forgotten]
        if foreign:
            reference = foreign[which % len(foreign)]
            process.send(reference.owner, Fetch(reference.key))

    @rule(at=index, which=index)
    def drop(self, at: int, which: int) -> None:
        variables = self.process(at).variables
        if variables:
            variables.pop(which % len(variables))

    @rule(at=index)
    def turn(self, at: int) -> None:
        self.process(at).turn()

    @rule(which=index, count=st.integers(1, 4))
    def deliver(self, which: int, count: int) -> None:
        for _ in range(count):
            busy = self.world.busy_channels()
            if busy:
                self.world.deliver(busy[which % len(busy)])
                self.world.check()

    @precondition(lambda self: len(self.world.processes) > 2)
    @rule(at=index, sure=st.sampled_from([False, False, True]))
    def die(self, at: int, sure: bool) -> None:
        if sure:
            self.world.kill(self.process(at))

    @rule(at=index)
    def hear_of_deaths(self, at: int) -> None:
        process = self.process(at)
        for dead in sorted(set(self.world.dead) - process.forgotten):
            process.hear_of_death(dead)

    @invariant()
    def nothing_in_use_is_freed(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()
            self.world.check_empty()


BorrowingMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestBorrowingMachine = BorrowingMachine.TestCase


class Script:
    """Three processes; ``carry`` delivers on one channel, and what is not carried is late."""

    def __init__(self) -> None:
        self.world = World(3)
        self.owner, self.sender, self.receiver = self.world.processes.values()

    def carry(self, *ways: tuple[Process, Process]) -> None:
        for source, target in ways:
            while self.world.channels.get((source.id, target.id)):
                self.world.deliver((source.id, target.id))
        self.world.check()

    def lend_to_sender(self) -> Reference:
        """Have the sender be the only holder of an object of the owner."""
        owner, sender = self.owner, self.sender
        owner.put([])
        [reference] = owner.visible()
        owner.submit(sender.id, [reference])
        self.carry((owner, sender))
        sender.end_task(0, [reference], [])
        self.carry((sender, owner))
        self.drop_all(owner)
        assert reference in owner.states
        return reference

    def drop_all(self, process: Process) -> None:
        process.variables.clear()
        process.turn()
        self.world.check()

    def finish(self) -> None:
        self.world.settle()
        self.world.check_empty()


def test_a_task_that_keeps_a_third_partys_reference_ends_when_its_owner_has_counted_it() -> None:
    script = Script()
    owner, sender, receiver = script.owner, script.sender, script.receiver
    reference = script.lend_to_sender()
    sender.submit(receiver.id, [reference])
    script.carry((sender, receiver))
    receiver.end_task(0, [reference], [])
    script.drop_all(sender)
    script.carry((receiver, sender), (sender, owner))
    assert sender.pending, "the end waits for the owner"
    assert reference in owner.states
    script.carry((receiver, owner), (owner, receiver), (receiver, sender), (sender, owner))
    assert not sender.pending
    assert reference in owner.states
    script.finish()


def test_what_is_passed_on_is_held_until_the_receiver_is_counted() -> None:
    script = Script()
    owner, sender, receiver = script.owner, script.sender, script.receiver
    reference = script.lend_to_sender()
    sender.put([reference])
    container = sender.visible()[-1]
    sender.submit(receiver.id, [container])
    script.carry((sender, receiver))
    receiver.send(sender.id, Fetch(container.key))
    script.carry((receiver, sender), (sender, receiver))
    receiver.variables.append(Hold(receiver, [reference]))
    receiver.end_task(0, [], [])
    script.drop_all(sender)
    script.carry((receiver, sender))
    sender.turn()
    script.carry((sender, owner))
    assert reference in owner.states, "the sender still holds it"
    script.carry((receiver, owner), (owner, receiver), (receiver, sender), (sender, owner))
    sender.turn()
    script.carry((sender, owner))
    assert reference in owner.states
    assert owner.borrowing.lent[reference.key] == {receiver.id: 1}
    script.finish()


def test_a_release_that_crosses_a_new_loan_takes_back_only_what_it_knew() -> None:
    script = Script()
    owner, receiver = script.owner, script.sender
    owner.put([])
    [reference] = owner.visible()
    owner.put([reference])
    container = owner.visible()[-1]
    owner.submit(receiver.id, [reference, container])
    script.carry((owner, receiver))
    receiver.end_task(0, [reference, container], [])
    script.carry((receiver, owner))
    receiver.send(owner.id, Fetch(container.key))
    script.carry((receiver, owner))
    receiver.variables = [hold for hold in receiver.variables if hold.references != [reference]]
    receiver.turn()
    script.drop_all(owner)
    script.carry((receiver, owner), (owner, receiver))
    receiver.variables.append(Hold(receiver, [reference]))
    receiver.variables = [hold for hold in receiver.variables if hold.references != [container]]
    receiver.turn()
    script.carry((receiver, owner))
    owner.turn()
    assert container not in owner.states
    assert reference in owner.states
    script.finish()


@pytest.mark.parametrize("seed", range(40))
def test_long_lives_over_channels_of_unequal_speed(seed: int) -> None:
    """Some channels are slow for a while: what goes around them arrives first."""
    draw = random.Random(seed)
    machine = BorrowingMachine()
    machine.start(4)
    world = machine.world
    pairs = [(a, b) for a in world.processes for b in world.processes if a != b]

    def number() -> int:
        return draw.randrange(101)

    def numbers(most: int) -> list[int]:
        return [number() for _ in range(draw.randrange(most + 1))]

    for step in range(800):
        if step % 40 == 0:
            slow = set(draw.sample(pairs, 3))
        action = draw.randrange(12)
        if action == 0:
            machine.put(at=number(), contents=numbers(2))
        elif action == 1:
            machine.submit(at=number(), worker=number(), arguments=numbers(2))
        elif action == 2:
            machine.end_task(at=number(), which=number(), keep=numbers(1), result=numbers(2))
        elif action == 3:
            machine.fetch(at=number(), which=number())
        elif action in (4, 5):
            for _ in range(6):  # few holders each, so that the last one goes often
                machine.drop(at=number(), which=number())
        elif action in (8, 9):
            machine.turn(at=number())
        else:
            for _ in range(8):
                busy = [pair for pair in world.busy_channels() if pair not in slow or draw.random() < 0.01]
                if busy:
                    world.deliver(draw.choice(busy))
        world.check()
    world.settle()
    world.check_empty()
