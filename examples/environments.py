"""Variables, a folder and a module for worker processes. Run: ``python examples/environments.py``."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path

import shoal
from shoal.exceptions import RuntimeEnvSetupError
from shoal.util.multiprocessing import Pool


@shoal.remote
def variables(*names: str) -> list[str | None]:
    """Return what variables are in the process of this task."""
    return [os.environ.get(name) for name in names]


@shoal.remote
def describe(module: str) -> str:
    """Import a module that only the runtime environment has, beside a file of the working directory."""
    return f"{importlib.import_module(module).NAME} reads {Path('data.txt').read_text()}"


def fail() -> None:
    """Set nothing up."""
    raise OSError("the licence server is away")


def main() -> None:
    """Give environments to a job, to tasks and to a pool."""
    with (
        tempfile.TemporaryDirectory() as folder,
        shoal.init(num_cpus=2, runtime_env={"env_vars": {"STAGE": "test", "OWNER": "the job"}}),
    ):
        print("of the job:", shoal.get(variables.remote("STAGE", "OWNER")))
        own = variables.options(runtime_env={"env_vars": {"OWNER": "the task"}})
        print("of a task:", shoal.get(own.remote("STAGE", "OWNER")))

        project, library = Path(folder, "project"), Path(folder, "library")
        project.mkdir()
        library.mkdir()
        (project / "data.txt").write_text("what lies beside it")
        (library / "__init__.py").write_text("NAME = 'a library of our own'")
        sent = describe.options(runtime_env={"working_dir": str(project), "py_modules": [str(library)]})
        print("sent:", shoal.get(sent.remote("library")))

        with Pool(2, ray_remote_args={"runtime_env": {"env_vars": {"STAGE": "pool"}}}) as pool:
            print("of a pool:", pool.map(os.getenv, ["STAGE", "OWNER"]))

        try:
            shoal.get(variables.options(runtime_env={"worker_process_setup_hook": fail}).remote("STAGE"))
        except RuntimeEnvSetupError as error:
            print("not set up:", str(error).rpartition(": ")[2])


if __name__ == "__main__":
    main()
