"""Runtime environments, of jobs, tasks and actors, on one node and on several."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.cluster_utils import Cluster
from shoal.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    RuntimeEnvSetupError,
    TaskCancelledError,
    WorkerCrashedError,
)
from shoal.job_config import JobConfig
from shoal.runtime_env import RuntimeEnv
from shoal.util import state
from shoal.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.integration.waiting import get, is_gone, until


def write(folder: Path, **files: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return str(folder)


def mark() -> None:
    os.environ["SHOAL_T_HOOK"] = "called"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, and a job with an environment of its own."""
    folder = write(tmp_path_factory.mktemp("job"), of_the_job="WHO = 'the job'")
    one = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        one.add_node(num_cpus=2)
        shoal.init(one.address, job_config=config(folder))
        yield one
    finally:
        shoal.shutdown()
        one.shutdown()


def config(folder: str) -> JobConfig:
    return JobConfig(
        runtime_env={
            "env_vars": {"SHOAL_T_JOB": "job", "SHOAL_T_BOTH": "job"},
            "working_dir": folder,
            "worker_process_setup_hook": mark,
        }
    )


@contextlib.contextmanager
def left(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """Leave the cluster for the block, and join it again for the tests that follow."""
    shoal.shutdown()
    try:
        yield
    finally:
        shoal.shutdown()
        folder = write(tmp_path / "job", of_the_job="WHO = 'the job'")
        shoal.init(cluster.address, job_config=config(folder))


@shoal.remote
def look(*names: str) -> dict[str, str | None]:
    return {name: os.environ.get(f"SHOAL_T_{name}") for name in names}


@shoal.remote
def who(module: str) -> tuple[str, str, int]:
    """Return what a module says of itself, the working directory, and the process."""
    import importlib

    return importlib.import_module(module).WHO, os.getcwd(), os.getpid()


class LookerClass:
    def look(self, *names: str) -> dict[str, str | None]:
        return {name: os.environ.get(f"SHOAL_T_{name}") for name in names}

    def where(self) -> tuple[int, str]:
        return os.getpid(), os.getcwd()

    def below(self) -> dict[str, str | None]:
        child = look.options(runtime_env={"env_vars": {"BOTH": "unused", "SHOAL_T_BOTH": "child"}})
        return shoal.get(child.remote("JOB", "BOTH", "ACTOR"))

    def environment(self) -> dict[str, Any]:
        return dict(shoal.get_runtime_context().runtime_env)


Looker = shoal.remote(LookerClass)


def test_all_processes_of_a_job_have_its_environment(cluster: Cluster) -> None:
    for node in cluster.list_all_nodes():
        on = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        assert get(look.options(scheduling_strategy=on).remote("JOB", "HOOK")) == {"JOB": "job", "HOOK": "called"}
        said, folder, _ = get(who.options(scheduling_strategy=on).remote("of_the_job"))
        assert said == "the job"
        assert os.path.exists(os.path.join(folder, "of_the_job.py"))
    assert "SHOAL_T_JOB" not in os.environ


@pytest.mark.usefixtures("cluster")
def test_what_a_task_says_is_added_to_what_its_parent_has() -> None:
    own = look.options(runtime_env={"env_vars": {"SHOAL_T_BOTH": "task", "SHOAL_T_OLD": "${SHOAL_T_OLD}+"}})
    assert get(own.remote("JOB", "BOTH", "OLD")) == {"JOB": "job", "BOTH": "task", "OLD": "+"}
    assert get(look.remote("BOTH", "OLD")) == {"BOTH": "job", "OLD": None}, "other processes are not touched"
    actor = Looker.options(runtime_env=RuntimeEnv(env_vars={"SHOAL_T_ACTOR": "actor"})).remote()
    assert get(actor.look.remote("JOB", "BOTH", "ACTOR")) == {"JOB": "job", "BOTH": "job", "ACTOR": "actor"}
    assert get(actor.below.remote()) == {"JOB": "job", "BOTH": "child", "ACTOR": "actor"}
    environment = get(actor.environment.remote())
    assert environment["env_vars"]["SHOAL_T_ACTOR"] == "actor"
    assert environment["working_dir"].startswith("gcs://")
    again = look.options(runtime_env=environment)
    assert get(again.remote("JOB", "ACTOR", "HOOK")) == {"JOB": "job", "ACTOR": "actor", "HOOK": "called"}


@pytest.mark.usefixtures("cluster")
def test_processes_are_used_again_by_the_same_environment_only() -> None:
    red = look_pid.options(runtime_env={"env_vars": {"SHOAL_T_COLOUR": "red"}})
    blue = look_pid.options(runtime_env={"env_vars": {"SHOAL_T_COLOUR": "blue"}})
    seen: dict[int, str] = {}
    for _ in range(3):
        for pid, colour in get([red.remote(), blue.remote(), look_pid.remote(), red.remote()]):
            assert seen.setdefault(pid, colour) == colour


@shoal.remote
def look_pid() -> tuple[int, str]:
    return os.getpid(), os.environ.get("SHOAL_T_COLOUR", "")


@pytest.mark.usefixtures("cluster")
def test_folders_files_and_modules_travel(tmp_path: Path) -> None:
    package = write(tmp_path / "shoal_t_package", __init__="WHO = 'a package'")
    single = str(Path(write(tmp_path / "x", shoal_t_single="WHO = 'a file'")) / "shoal_t_single.py")
    work = write(tmp_path / "work", shoal_t_work="WHO = 'a folder'", left_out="")
    own = who.options(runtime_env={"working_dir": work, "py_modules": [package, single], "excludes": ["left_out.py"]})
    for module, said in (("shoal_t_package", "a package"), ("shoal_t_single", "a file"), ("shoal_t_work", "a folder")):
        (answer, folder, _) = get(own.remote(module))
        assert answer == said
        assert os.listdir(folder) == ["shoal_t_work.py"]
        assert folder != work


@pytest.mark.usefixtures("cluster")
def test_a_zip_file_is_a_working_directory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        archive.writestr("shoal_t_zipped.py", "WHO = 'zipped'")
    assert (
        get(who.options(runtime_env={"working_dir": str(tmp_path / "code.zip")}).remote("shoal_t_zipped"))[0]
        == "zipped"
    )


@pytest.mark.usefixtures("cluster")
def test_what_cannot_be_set_up_is_the_error_of_each_task_and_call() -> None:
    def fail() -> None:
        raise ValueError("no such luck")

    broken = {"worker_process_setup_hook": fail}
    refs = [look.options(runtime_env=broken).remote("JOB") for _ in range(3)]
    for ref in refs:
        with pytest.raises(RuntimeEnvSetupError, match=r"worker_process_setup_hook.*no such luck"):
            get(ref)
    actor = Looker.options(runtime_env=broken).remote()
    with pytest.raises(RuntimeEnvSetupError, match="no such luck"):
        get(actor.look.remote("JOB"))
    with pytest.raises(RuntimeEnvSetupError, match="shoal_t_nowhere"):
        get(look.options(runtime_env={"worker_process_setup_hook": "shoal_t_nowhere.f"}).remote("JOB"))


@pytest.mark.usefixtures("cluster")
def test_every_kind_of_task_hears_that_its_environment_is_broken() -> None:
    broken = {"worker_process_setup_hook": "shoal_t_nowhere.f"}

    @shoal.remote(runtime_env=broken)
    def stream() -> Iterator[int]:
        yield 1

    @shoal.remote(runtime_env=broken, num_returns=2)
    def two() -> tuple[int, int]:
        return 1, 2

    with pytest.raises(RuntimeEnvSetupError):
        get(next(stream.remote()))
    refs: Any = two.remote()
    for ref in refs:
        with pytest.raises(RuntimeEnvSetupError):
            get(ref)


@pytest.mark.usefixtures("cluster")
def test_a_hook_that_ends_its_process_is_not_called_without_end(tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    def die() -> None:
        with calls.open("a") as file:
            file.write("x")
        os._exit(1)

    with pytest.raises(WorkerCrashedError):
        get(look.options(runtime_env={"worker_process_setup_hook": die}, max_retries=1).remote("JOB"))
    assert len(calls.read_text()) >= 2
    with pytest.raises(ActorDiedError):
        get(Looker.options(runtime_env={"worker_process_setup_hook": die}).remote().look.remote("JOB"))


@pytest.mark.usefixtures("cluster")
def test_a_task_can_be_cancelled_while_its_environment_is_set_up() -> None:
    def hang() -> None:
        time.sleep(600)

    ref = look.options(runtime_env={"worker_process_setup_hook": hang}, max_retries=0).remote("JOB")
    with pytest.raises(GetTimeoutError):
        shoal.get(ref, timeout=0.5)
    shoal.cancel(ref)
    with pytest.raises(TaskCancelledError):
        get(ref)


@pytest.mark.usefixtures("cluster")
def test_a_remote_function_takes_its_environment_with_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "work", shoal_t_carried="WHO = 'carried'")
    own = who.options(runtime_env={"working_dir": folder})

    @shoal.remote
    def run() -> str:
        os.rename(folder, f"{folder}-gone")  # as on another machine
        return shoal.get(own.remote("shoal_t_carried"))[0]

    assert get(run.remote()) == "carried"


@pytest.mark.usefixtures("cluster")
def test_a_detached_actor_keeps_its_environment(tmp_path: Path) -> None:
    folder = write(tmp_path / "work", shoal_t_detached="WHO = 'detached'")
    actor = Looker.options(
        runtime_env={"working_dir": folder}, name="shoal_t_detached", lifetime="detached", max_restarts=1
    ).remote()
    assert get(actor.look.remote("JOB", "HOOK")) == {"JOB": "job", "HOOK": "called"}
    assert get(actor.below.remote())["BOTH"] == "child"
    shoal.kill(actor)


def test_a_detached_actor_has_its_environment_after_its_creators_job(cluster: Cluster, tmp_path: Path) -> None:
    folder = write(tmp_path / "work", shoal_t_lasting="WHO = 'lasting'")
    options = {"name": "shoal_t_lasting", "lifetime": "detached", "max_restarts": 1, "max_task_retries": 1}
    actor = Looker.options(runtime_env={"working_dir": folder}, namespace="lasting", **options).remote()
    pid, place = get(actor.where.remote())
    job = shoal.get_runtime_context().get_job_id()
    with left(cluster, tmp_path):
        os.rename(folder, f"{folder}-gone")
        shoal.init(cluster.address)
        until(
            lambda: state.list_jobs(filters=[("job_id", "=", job)])[0].status != "RUNNING",
            "the creator's job has ended",
        )
        found = shoal.get_actor("shoal_t_lasting", namespace="lasting")
        os.kill(pid, signal.SIGKILL)
        until(lambda: is_gone(pid), "the actor's process is gone")
        again, there = get(found.where.remote())
        assert again != pid
        assert os.listdir(there) == os.listdir(place) == ["shoal_t_lasting.py"]
        assert get(found.look.remote("JOB", "HOOK")) == {"JOB": "job", "HOOK": "called"}
        shoal.kill(found)
        until(lambda: not os.path.exists(there), "the folder of the actor's own job is gone")


def test_a_jobs_folders_go_with_it(cluster: Cluster, tmp_path: Path) -> None:
    folder = write(tmp_path / "work", shoal_t_ends="WHO = 'ends'")
    place = Path(get(who.options(runtime_env={"working_dir": folder}).remote("shoal_t_ends"))[1])
    assert place.is_dir()
    with left(cluster, tmp_path):
        until(lambda: not place.exists(), "the folder of the job is gone")


def test_processes_write_log_lines_as_the_driver_says(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    @shoal.remote
    def write_lines() -> str:
        logging.getLogger("mine").info("from a task", extra={"colour": "red"})
        return shoal.get_runtime_context().get_worker_id()

    root = logging.getLogger()
    before = root.handlers, root.level
    lines: list[dict[str, str]] = []

    def read() -> bool:
        found = [line[line.index("{") :] for line in capfd.readouterr().err.splitlines() if "from a task" in line]
        lines.extend(map(json.loads, found))
        return bool(lines)

    try:
        with left(cluster, tmp_path):
            shoal.init(cluster.address, logging_config=shoal.LoggingConfig(encoding="JSON"))
            worker = get(write_lines.remote())
            until(read, "the line of the task has come")
            assert (lines[0]["worker_id"], lines[0]["colour"], lines[0]["levelname"]) == (worker, "red", "INFO")
            assert lines[0]["job_id"] == shoal.get_runtime_context().get_job_id()
            assert "write_lines" in lines[0]["task_name"]
    finally:
        root.handlers, root.level = before


def test_nothing_is_left_of_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    folder = write(tmp_path / "work", shoal_t_left="WHO = 'left'")
    with left(cluster, tmp_path):
        with shoal.init("local", num_cpus=1, runtime_env={"working_dir": folder}):
            said, place, _ = get(who.remote("shoal_t_left"))
            assert said == "left"
            assert Path(place).is_dir()
        until(lambda: not Path(place).parent.parent.exists(), "the folder of the node is gone")


@shoal.remote
def threads() -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def test_libraries_that_compute_in_threads_are_told_how_many_cpus_they_have(cluster: Cluster) -> None:
    assert get([threads.remote(), threads.options(num_cpus=0.5).remote()]) == ["1", "1"]
    assert get(threads.options(num_cpus=2).remote()) == "2"
    chosen = {"env_vars": {"OMP_NUM_THREADS": "7"}}
    assert get(threads.options(num_cpus=2, runtime_env=chosen).remote()) == "7"
