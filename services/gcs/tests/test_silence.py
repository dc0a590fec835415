"""Only real silence counts: on the counter itself, and on the deaths that follow from it."""

from __future__ import annotations

from services.gcs.tests.builders import description, job_request
from services.gcs.tests.simulation import Replica, World, announcement
from shoal_core.protocol.effects import Connected, Effect, Event, Publish, Store
from shoal_core.protocol.messages import DriverAlive, Echo, JobState, NodeState
from shoal_core.testing.builders import node_id, process_id
from shoal_gcs.core import ControlStore
from shoal_gcs.records import StoredJob, StoredNode, job_id
from shoal_gcs.silence import LONGEST_STEP_SECONDS, Silence

ALIVE = NodeState.ALIVE
RUNNING = JobState.RUNNING


def test_whoever_is_not_heard_is_silent_for_as_long_as_the_ticks_say() -> None:
    silence = Silence()
    for second in range(4):
        silence.heard("talks")
        silence.pass_time(float(second), ["talks", "silent"], echoed=True)
    assert silence.longer_than(2.9) == ["silent"]
    assert silence.longer_than(3.0) == []


def test_time_without_an_echo_counts_against_nobody() -> None:
    silence = Silence()
    silence.pass_time(0.0, ["node"], echoed=True)
    for second in range(1, 100):
        silence.pass_time(float(second), ["node"], echoed=False)
    assert silence.longer_than(0.0) == []


def test_what_was_heard_before_an_echo_that_came_late_still_counts() -> None:
    silence = Silence()
    silence.pass_time(0.0, ["node"], echoed=True)
    silence.heard("node")
    silence.pass_time(1.0, ["node"], echoed=False)
    silence.pass_time(2.0, ["node"], echoed=True)
    assert silence.longer_than(0.0) == []


def test_a_watcher_that_was_stopped_for_an_hour_counts_one_step() -> None:
    silence = Silence()
    silence.pass_time(0.0, ["node"], echoed=True)
    silence.pass_time(3600.0, ["node"], echoed=True)
    assert silence.longer_than(LONGEST_STEP_SECONDS) == []
    assert silence.longer_than(LONGEST_STEP_SECONDS - 0.1) == ["node"]


def test_a_clock_that_goes_back_takes_nothing_away_and_adds_nothing() -> None:
    silence = Silence()
    silence.pass_time(100.0, ["node"], echoed=True)
    silence.pass_time(101.0, ["node"], echoed=True)
    silence.pass_time(50.0, ["node"], echoed=True)
    assert (silence.longer_than(0.9), silence.longer_than(1.0)) == (["node"], [])
    silence.pass_time(51.0, ["node"], echoed=True)
    assert silence.longer_than(1.9) == ["node"]


def test_whoever_is_seen_for_the_first_time_or_after_a_reset_begins_at_zero() -> None:
    silence = Silence()
    for second in range(5):
        silence.pass_time(float(second), ["old"], echoed=True)
    silence.pass_time(5.0, ["old", "new"], echoed=True)
    assert silence.longer_than(0.0) == ["old"]
    silence.reset()
    silence.pass_time(6.0, ["old", "new"], echoed=True)
    assert silence.longer_than(0.0) == []


# ------------------------------------------------------------------------------------ deaths


def replica_with_a_node_and_a_job() -> tuple[World, Replica]:
    world = World()
    replica = world.start()
    world.settled(replica, description(1))
    world.settled(replica, job_request(1))
    return world, replica


def node(world: World) -> StoredNode:
    return world.store.nodes()[f"node.{node_id(1)}"]


def job(world: World) -> StoredJob:
    return world.store.jobs()[f"job.{job_id(1)}"]


def test_a_node_that_is_silent_for_five_seconds_is_declared_dead_and_told_once() -> None:
    world, _ = replica_with_a_node_and_a_job()
    for _ in range(7):
        world.second()
    assert node(world).record.state is ALIVE
    world.second()
    assert node(world).record.state is NodeState.DEAD
    assert "nothing was heard" in node(world).record.death_reason
    assert node(world).record.ended_at == world.now
    assert (node_id(1) in world.died, node(world).told) == (True, True)
    world.died.clear()
    for _ in range(10):
        world.second()
    assert not world.died


def test_a_node_that_announces_itself_lives() -> None:
    world, _ = replica_with_a_node_and_a_job()
    for _ in range(30):
        world.second([node_id(1)])
    assert node(world).record.state is ALIVE


def test_a_job_whose_driver_is_silent_for_ten_seconds_fails() -> None:
    world, _ = replica_with_a_node_and_a_job()
    for _ in range(12):
        world.second()
    assert job(world).record.state is RUNNING
    world.second()
    assert job(world).record.state is JobState.FAILED
    assert job_id(1) in world.finished


def test_a_job_whose_driver_speaks_goes_on() -> None:
    world, _ = replica_with_a_node_and_a_job()
    for _ in range(30):
        world.broadcast(DriverAlive(job_id=job_id(1), driver=process_id(1)), process_id(1))
        world.second()
    assert job(world).record.state is RUNNING


def test_nobody_dies_while_the_echo_does_not_return() -> None:
    world, replica = replica_with_a_node_and_a_job()
    for _ in range(60):
        world.now += 1.0
        replica.tick()
        replica.running.clear()  # nothing that it says gets out
    assert (node(world).record.state, job(world).record.state) == (ALIVE, RUNNING)


def test_the_echo_of_another_replica_is_no_echo() -> None:
    world, replica = replica_with_a_node_and_a_job()
    for number in range(1, 60):
        world.now += 1.0
        replica.tick()
        replica.running.clear()
        replica.handle(Event(Echo(number=number), "replica-2"))
    world.run()
    assert node(world).record.state is ALIVE


def test_a_replica_that_was_stopped_hears_what_was_said_before_it_declares_anyone_dead() -> None:
    world, replica = replica_with_a_node_and_a_job()
    for _ in range(4):
        world.second()
    world.now += 60.0
    replica.tick()  # the node may have spoken all the time: this tick counts little, and the next ones hear it
    world.run()
    assert node(world).record.state is ALIVE
    for _ in range(10):
        world.second([node_id(1)])
    assert node(world).record.state is ALIVE


def test_a_reconnect_gives_everyone_a_full_new_period() -> None:
    world, replica = replica_with_a_node_and_a_job()
    for _ in range(6):
        world.second()
    replica.handle(Connected(False))
    replica.handle(Connected(True))
    for _ in range(5):
        world.second()
    assert node(world).record.state is ALIVE


def kinds(effects: list[Effect]) -> list[type]:
    return [type(effect.message) if isinstance(effect, Publish) else type(effect) for effect in effects]


def told_core(**fields: bool) -> ControlStore:
    """Return the core of a replica that finds a node dead in the store."""
    world, replica = replica_with_a_node_and_a_job()
    world.second()
    replica.core.state.remember(
        f"node.{node_id(1)}",
        node(world)
        .model_copy(update={"record": node(world).record.model_copy(update={"state": NodeState.DEAD, "ended_at": 1.0})})
        .model_copy(update=fields)
        .model_dump_json()
        .encode(),
        99,
    )
    return replica.core


def test_a_death_that_nobody_was_told_of_is_not_told_without_a_connection() -> None:
    core = told_core(told=False)
    core.tick(10.0)  # its echo stays out
    for second in range(11, 30):
        assert Store not in kinds(core.tick(float(second)))


def test_a_dead_node_that_still_speaks_is_told_again_once_a_tick() -> None:
    core = told_core(told=True)
    speaks = Event(announcement(node_id(1)), node_id(1))
    assert len(core.handle(speaks, 10.0)) == 1
    assert core.handle(speaks, 10.1) == []
    core.tick(11.0)
    assert len(core.handle(speaks, 11.1)) == 1
