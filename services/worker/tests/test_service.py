"""The node service's hands on files and processes, and the service as a whole over the in-memory broker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.worker.tests.nvml import Gpu, Library, installed
from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.bus.requests import ask
from shoal_core.machine import CUDA_VISIBLE, store_name
from shoal_core.protocol.ids import JobId, SlotId
from shoal_core.protocol.labels import as_value
from shoal_core.protocol.messages import (
    Done,
    GetNode,
    NodeAnnouncement,
    NodeDescription,
    NodeDied,
    NodeRecord,
    NodeState,
    ProcessDied,
    RetireNode,
)
from shoal_core.protocol.places import part_of
from shoal_core.protocol.resources import to_amounts
from shoal_core.protocol.scheduling import LeaseAnswer, LeaseRequest
from shoal_core.protocol.storage import DurableDelete
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import decode, encode
from shoal_core.runtime.data.segments import Reader
from shoal_core.service import Engine
from shoal_core.service.settings import SettingsError, read_settings
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.buses import until
from shoal_worker import machine
from shoal_worker.inputs import DriverEnded, UnwatchDriver, WatchDriver
from shoal_worker.liveness import REREAD_SECONDS
from shoal_worker.objects.durable import DurableTier
from shoal_worker.objects.files import (
    SLAB_BYTES,
    CreateFile,
    DropDurable,
    FileCreated,
    FileLinked,
    LinkFile,
    RemoveFile,
)
from shoal_worker.objects.storage import LARGE_BYTES, Storage
from shoal_worker.service import Hands, LeaveError, WorkerSettings, serve
from shoal_worker.workers.log_files import LogFiles
from shoal_worker.workers.logs import Logs
from shoal_worker.workers.output import Outputs

NODE, THERE = node_id(1), node_id(2)
DRIVER = process_id(9)
CLUSTER = "test"
SUBJECTS = Subjects(CLUSTER)


class RecordedEngine:
    """An engine that keeps what it is told."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []

    def inject(self, message: Any) -> None:
        self.inputs.append(message)


def no_connection() -> contextlib.AbstractAsyncContextManager[Bus]:
    raise AssertionError("nothing is moved here")


@asynccontextmanager
async def hands(folder: Path) -> AsyncIterator[tuple[Hands, list[Any]]]:
    async with MemoryBroker().connect(role=Role.NODE, identity=NODE, cluster=CLUSTER) as bus:
        durable = DurableTier(no_connection, SUBJECTS)
        logs = Logs(LogFiles(folder, WorkerSettings().log_limits()))
        outputs = Outputs(bus, SUBJECTS, NODE, logs)
        one = Hands(bus, WorkerSettings(cluster=CLUSTER), NODE, folder, outputs, durable, CUDA_VISIBLE, folder)
        engine = RecordedEngine()
        one.engine = engine  # type: ignore[assignment]
        try:
            yield one, engine.inputs
        finally:
            one.close()
            logs.close()


@contextlib.contextmanager
def program() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as process:
        try:
            yield process
        finally:
            process.kill()


# ------------------------------------------------------------------------------- files


async def test_a_new_file_has_all_its_pages(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, inputs):
        one.perform(CreateFile("o1", 100_000))
        status = (tmp_path / "o1").stat()
        assert (status.st_size, status.st_mode & 0o777) == (100_000, 0o600)
        assert status.st_blocks * 512 >= 100_000
        assert inputs == [FileCreated("o1")]


async def test_a_warm_file_is_used_again_under_a_new_name(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, inputs):
        one.perform(CreateFile("o1", 4096))
        inode = (tmp_path / "o1").stat().st_ino
        one.perform(CreateFile("o2", 4096, reused="o1"))
        assert os.listdir(tmp_path) == ["o2"]
        assert (tmp_path / "o2").stat().st_ino == inode
        assert inputs == [FileCreated("o1"), FileCreated("o2")]


async def test_a_warm_file_that_a_process_still_maps_is_left_as_it_is(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, inputs):
        one.perform(CreateFile("o1", 8192))
        (tmp_path / "o1").write_bytes(b"value" + bytes(8187))
        memory = Reader(tmp_path, lambda *_: None, lambda *_: None).map_unasked("o1", 8192, 1)
        one.perform(CreateFile("o2", 8192, "o1"))
        assert inputs == [FileCreated("o1"), FileCreated("o2", busy="o1")]
        (tmp_path / "o2").write_bytes(b"other" + bytes(8187))
        assert memory is not None
        assert bytes(memory[:5]) == b"value"
        del memory
        one.perform(CreateFile("o3", 8192, "o1"))
        assert inputs[-1] == FileCreated("o3")
        assert sorted(os.listdir(tmp_path)) == ["o2", "o3"]


@pytest.mark.parametrize("size", [8192, LARGE_BYTES])
async def test_a_warm_file_that_another_node_has_linked_is_left_as_it_is(tmp_path: Path, size: int) -> None:
    async with hands(tmp_path) as (one, inputs):
        await performed(one, CreateFile("o1", size))
        os.link(tmp_path / "o1", tmp_path / "linked")
        await performed(one, CreateFile("o2", size, "o1"))
        assert inputs == [FileCreated("o1"), FileCreated("o2", busy="o1")]
        assert (tmp_path / "o1").samefile(tmp_path / "linked")
        assert not (tmp_path / "o2").samefile(tmp_path / "linked")
        (tmp_path / "linked").unlink()
        await performed(one, CreateFile("o3", size, "o1"))
        assert inputs[-1] == FileCreated("o3")
        assert sorted(os.listdir(tmp_path)) == ["o2", "o3"]


async def test_a_file_of_a_node_beside_gets_a_name_here(tmp_path: Path) -> None:
    home, folder = (tmp_path / store_name(pid, node) for pid, node in ((1, THERE), (2, NODE)))
    home.mkdir()
    folder.mkdir()
    (home / "o7").write_bytes(b"value")
    async with hands(folder) as (one, inputs):
        one.perform(LinkFile("o1", THERE, "o7"))
        assert inputs == [], "first what was ordered together with it"
        await asyncio.sleep(0)
        assert inputs == [FileLinked("o1")]
        assert (folder / "o1").samefile(home / "o7")
        one.perform(RemoveFile("o1"))
        assert (home / "o7").read_bytes() == b"value"


async def test_nothing_of_another_user_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, folder = (tmp_path / store_name(pid, node) for pid, node in ((1, THERE), (2, NODE)))
    home.mkdir()
    folder.mkdir()
    (home / "o7").write_bytes(b"value")
    (tmp_path / store_name(3, node_id(3))).symlink_to(home)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    async with hands(folder) as (one, inputs):
        one.perform(LinkFile("o1", THERE, "o7"))
        monkeypatch.undo()
        one.perform(LinkFile("o2", node_id(3), "o7"))
        await asyncio.sleep(0)
        assert all("does not lie beside" in linked.error for linked in inputs)
        assert os.listdir(folder) == []


async def test_what_cannot_be_linked_is_told_with_the_reason(tmp_path: Path) -> None:
    home, folder = (tmp_path / store_name(pid, node) for pid, node in ((1, THERE), (2, NODE)))
    home.mkdir()
    folder.mkdir()
    async with hands(folder) as (one, inputs):
        one.perform(LinkFile("o1", THERE, "o7"))
        one.perform(LinkFile("o2", node_id(9), "o7"))
        await asyncio.sleep(0)
        missing, elsewhere = inputs
        assert (missing.name, elsewhere.name) == ("o1", "o2")
        assert "No such file" in missing.error
        assert "does not lie beside" in elsewhere.error
        assert os.listdir(folder) == []


async def test_a_file_that_cannot_be_made_is_told_with_the_reason_and_leaves_nothing(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, inputs):
        await performed(one, CreateFile("o1", 1 << 62))
        (created,) = inputs
        assert created.name == "o1"
        assert f"{1 << 62:,} bytes of shared memory are not to be had: " in created.error
        assert os.listdir(tmp_path) == []


async def test_a_warm_file_that_is_gone_is_made_anew(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, inputs):
        one.perform(CreateFile("o2", 4096, reused="gone"))
        assert inputs == [FileCreated("o2")]
        assert (tmp_path / "o2").stat().st_size == 4096


async def performed(one: Hands, command: Any) -> None:
    """Have a command carried out, and wait for the part of it that takes time."""
    work = one.perform(command)
    if work is not None:
        await work


async def test_large_files_are_made_and_removed_beside_the_event_loop(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, inputs):
        making = one.perform(CreateFile("o1", LARGE_BYTES))
        assert making is not None
        assert inputs == []
        await making
        assert inputs == [FileCreated("o1")]
        assert (tmp_path / "o1").stat().st_blocks * 512 >= LARGE_BYTES
        removing = one.perform(RemoveFile("o1"))
        assert removing is not None
        assert "o1" not in os.listdir(tmp_path), "its name may be used again at once"
        await removing
        assert os.listdir(tmp_path) == []


async def test_a_file_that_is_to_be_filled_is_not_found_under_its_name(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, _):
        one.perform(CreateFile("o1", 4096, filled=True))
        assert os.listdir(tmp_path) == ["o1.part"]
        one.perform(RemoveFile("o1"))
        assert os.listdir(tmp_path) == []


async def test_copies_are_dropped_one_after_the_other_however_many_are_ordered_at_once(tmp_path: Path) -> None:
    broker = MemoryBroker()
    asked: list[str] = []
    async with (
        broker.connect(role=Role.OBJECTSTORE, identity="tier", cluster=CLUSTER) as tier,
        broker.connect(role=Role.NODE, identity=NODE, cluster=CLUSTER) as bus,
    ):

        def answer(message: Message) -> None:
            asked.append(decode(DurableDelete, message.data).object_id)
            tier.publish(message.reply, encode(Done()))

        tier.subscribe(SUBJECTS.objectstore("delete"), answer)
        storage = Storage(bus, SUBJECTS, tmp_path, DurableTier(no_connection, SUBJECTS), lambda message: None)
        names = [f"object{number}" for number in range(5)]
        for _ in range(2):
            work = [storage.perform(DropDurable(name, "node:")) for name in names]
            assert [one is not None for one in work] == [True, *[False] * 4]
            assert work[0] is not None
            await work[0]
        assert asked == 2 * names


async def test_a_file_is_removed_also_where_it_is_gone(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, _):
        one.perform(CreateFile("o1", 4096))
        one.perform(RemoveFile("o1"))
        one.perform(RemoveFile("o1"))
        assert os.listdir(tmp_path) == []


async def test_a_part_of_a_file_has_pages_only_while_it_is_in_use(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, inputs):
        first, second = part_of("s1", 0), part_of("s1", 1024 * 1024)
        one.perform(CreateFile("o1", 1024 * 1024, part=first))
        one.perform(CreateFile("o2", 1024 * 1024, part=second))
        assert inputs == [FileCreated("o1"), FileCreated("o2")]
        assert os.listdir(tmp_path) == ["s1"]
        assert (tmp_path / "s1").stat().st_size == SLAB_BYTES
        assert (tmp_path / "s1").stat().st_blocks == 2 * 2048
        descriptor = os.open(tmp_path / "s1", os.O_RDWR)
        os.pwrite(descriptor, b"kept", 1024 * 1024)
        os.close(descriptor)
        one.perform(RemoveFile(first, 1024 * 1024))
        assert (tmp_path / "s1").stat().st_blocks == 2048
        one.perform(CreateFile("o3", 1024 * 1024, reused=second, part=second))
        assert inputs[-1] == FileCreated("o3")
        assert (tmp_path / "s1").read_bytes()[1024 * 1024 :][:4] == b"kept"
        removing = one.perform(RemoveFile("s1"))
        assert removing is not None
        await removing
        one.perform(RemoveFile(second, 1024 * 1024))
        assert os.listdir(tmp_path) == []


async def test_a_part_for_which_there_is_no_room_is_refused(tmp_path: Path) -> None:
    async with hands(tmp_path / "gone") as (one, inputs):
        one.perform(CreateFile("o1", 4096, part=part_of("s1", 0)))
        assert isinstance(inputs[0], FileCreated)
        assert "4,096 bytes of shared memory are not to be had" in inputs[0].error


# ------------------------------------------------------------------------------- drivers


async def test_the_death_of_a_driver_is_told_once(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, inputs):
        with program() as process:
            one.perform(WatchDriver(DRIVER, process.pid))
            await asyncio.sleep(0)
            assert inputs == []
        await until(lambda: bool(inputs))
        one.perform(UnwatchDriver(DRIVER))
        assert inputs == [DriverEnded(DRIVER)]


async def test_a_driver_that_was_dead_already_is_told_after_the_decision_to_watch_it(tmp_path: Path) -> None:
    with program() as process:
        pass
    async with hands(tmp_path) as (one, inputs):
        one.perform(WatchDriver(DRIVER, process.pid))
        assert inputs == []
        await until(lambda: bool(inputs))
        assert inputs == [DriverEnded(DRIVER)]


async def test_a_driver_whose_job_has_ended_is_watched_no_more(tmp_path: Path) -> None:
    async with hands(tmp_path) as (one, inputs):
        with program() as process:
            before = len(os.listdir("/proc/self/fd"))
            one.perform(WatchDriver(DRIVER, process.pid))
            one.perform(UnwatchDriver(DRIVER))
            assert len(os.listdir("/proc/self/fd")) == before
        await asyncio.sleep(0)
        assert inputs == []


# ------------------------------------------------------------------------------- the whole


class ControlStore:
    """As much of a control store as a node needs, and what the node told."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.registered: list[NodeDescription] = []
        self.retired: list[RetireNode] = []
        self.announced: list[NodeAnnouncement] = []
        self.died: list[ProcessDied] = []
        bus.subscribe(SUBJECTS.gcs_from_node("register_node"), self._register)
        bus.subscribe(SUBJECTS.gcs_from_node("retire_node"), self._retire)
        bus.subscribe(SUBJECTS.gcs("get_node"), self._get_node)
        bus.subscribe(SUBJECTS.event(Role.NODE, "*", "announce"), self._announce)
        bus.subscribe(SUBJECTS.event(Role.NODE, "*", "process_died"), self._process_died)

    def _record(self) -> bytes:
        return encode(NodeRecord(description=self.registered[0], state=NodeState.ALIVE))

    def _register(self, message: Message) -> None:
        self.registered.append(decode(NodeDescription, message.data))
        self.bus.publish(message.reply, self._record())

    def _retire(self, message: Message) -> None:
        self.retired.append(decode(RetireNode, message.data))
        self.bus.publish(message.reply, encode(Done()))

    def _get_node(self, message: Message) -> None:
        assert decode(GetNode, message.data).node_id == NODE
        self.bus.publish(message.reply, self._record())

    def _announce(self, message: Message) -> None:
        self.announced.append(decode(NodeAnnouncement, message.data))

    def _process_died(self, message: Message) -> None:
        self.died.append(decode(ProcessDied, message.data))


@asynccontextmanager
async def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Bus, ControlStore, Bus]]:
    """A broker with a control store: the bus of a node, the store, and the bus of a scheduler."""
    monkeypatch.setattr(machine, "SHARED_MEMORY", folder)
    broker = MemoryBroker()
    async with (
        broker.connect(role=Role.GCS, identity="store", cluster=CLUSTER) as store,
        broker.connect(role=Role.SCHEDULER, identity="scheduler", cluster=CLUSTER) as scheduler,
        broker.connect(role=Role.NODE, identity=NODE, cluster=CLUSTER) as node,
    ):
        yield node, ControlStore(store), scheduler


def settings(**more: Any) -> WorkerSettings:
    given = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 1 << 20, "prestart": 0, **more}
    return WorkerSettings(cluster=CLUSTER, address="nats://127.0.0.1:1", **given)


async def test_a_node_registers_grants_tells_of_deaths_and_leaves_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, monkeypatch) as (bus, store, scheduler):
        async with serve(bus, settings()):
            (description,) = store.registered
            assert Path(description.shared_memory_path).parent == tmp_path
            request = LeaseRequest(
                scheduler="s",
                owner=process_id(1, node=2),
                job_id=JobId("00000001"),
                key=1,
                slots=[SlotId(1)],
                resources={"CPU": 10_000},
            )
            answer = await ask(scheduler, SUBJECTS.node_from_scheduler(NODE, "lease"), request)
            assert isinstance(answer, LeaseAnswer)
            assert answer.granted == [SlotId(1)]
            await until(lambda: any(announced.free["CPU"] == 10_000 for announced in store.announced))
            await until(lambda: store.announced[-1].worker_processes == 1)
        assert [retired.node_id for retired in store.retired] == [NODE]
        assert os.listdir(tmp_path) == []


async def test_a_node_that_hears_of_its_own_death_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(tmp_path, monkeypatch) as (bus, store, _):

        async def serve_until_it_ends() -> None:
            async with serve(bus, settings()):
                died = NodeDied(node_id=NODE, reason="it was silent")
                store.bus.publish(SUBJECTS.event(Role.GCS, "store", "node_died"), encode(died))
                await asyncio.Event().wait()

        with pytest.raises(BaseExceptionGroup) as failure:
            await asyncio.wait_for(serve_until_it_ends(), REREAD_SECONDS / 2)
        assert failure.group_contains(LeaveError, match="declared dead")
        assert store.retired == [], "the dead do not leave in order"
        assert os.listdir(tmp_path) == []


async def test_a_clock_that_is_set_back_does_not_silence_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset_seconds = 0.0
    defaults = Engine.__init__.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "clock", lambda: time.time() + offset_seconds)
    async with cluster(tmp_path, monkeypatch) as (bus, store, _), serve(bus, settings()):
        offset_seconds = -3600.0
        heard = len(store.announced)
        await until(lambda: len(store.announced) >= heard + 2)
        sequences = [announcement.sequence for announcement in store.announced]
        assert sequences == sorted(set(sequences))


async def test_a_node_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels_file = tmp_path / "labels.json"
    labels_file.write_text('{"zone": "file", "disk": "ssd"}')
    store_folder = tmp_path / "store"
    store_folder.mkdir()
    told = settings(
        num_gpus=None,
        labels={"zone": "a"},
        labels_file=str(labels_file),
        resources={"licence": 2, "accelerator_type:A100": 3},
        node_name="the first",
        node_address="10.0.0.7",
        is_head=True,
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    async with cluster(store_folder, monkeypatch) as (bus, store, _):
        with installed(Library([Gpu("GPU-a"), Gpu("GPU-b")])):
            async with serve(bus, told) as engine:
                (description,) = store.registered
                assert "shoal_gpu_leased_ratio" in engine.metrics.names()
    assert description.labels == {
        "ray.io/node-id": NODE,
        "ray.io/accelerator-type": "A100",
        "shoal.io/hostname": as_value(description.hostname),
        "zone": "a",
        "disk": "ssd",
    }
    assert (description.name, description.address) == ("the first", "10.0.0.7")
    offered = to_amounts(description.total)
    assert offered["GPU"] == 1
    assert offered["licence"] == 2
    assert offered["accelerator_type:A100"] == 3, "what was given goes before what was found"
    assert offered["node:10.0.0.7"] == offered["node:__internal_head__"] == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a b": "c"}', '{"ray.io/node-id": "c"}'])
def test_a_file_of_labels_that_cannot_be_used_is_a_wrong_setting(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    for wrong in (path, tmp_path / "none.json"):
        with pytest.raises(SettingsError, match="--labels-file"):
            read_settings(WorkerSettings, "shoal-worker", ["--labels-file", str(wrong)])


def test_labels_that_a_node_may_not_have_are_a_wrong_setting() -> None:
    with pytest.raises(ValidationError, match="reserved prefix"):
        settings(labels={"ray.io/node-id": "a"})
