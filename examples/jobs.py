"""A program that the cluster runs by itself, followed and stopped from outside. Run: ``python examples/jobs.py``."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import shoal
from shoal.job_submission import JobSubmissionClient

PROGRAM = """
import os
import shoal

@shoal.remote
def square(number: int) -> int:
    return number * number

shoal.init()
print("squares:", shoal.get([square.remote(number) for number in range(5)]))
print("stage:", os.environ["STAGE"])
"""


async def follow(client: JobSubmissionClient, job: str) -> None:
    """Print what a job prints, until it has ended."""
    async for text in client.tail_job_logs(job):
        print(text, end="")


def main() -> None:
    """Submit jobs that succeed, fail and are stopped."""
    with shoal.init(num_cpus=2), tempfile.TemporaryDirectory() as folder:
        Path(folder, "program.py").write_text(PROGRAM)
        client = JobSubmissionClient()

        job = client.submit_job(
            entrypoint="python program.py",
            runtime_env={"working_dir": folder, "env_vars": {"STAGE": "test"}},
            metadata={"team": "examples"},
        )
        asyncio.run(follow(client, job))
        print("it has", client.get_job_status(job), "with", client.get_job_info(job).metadata)

        job = client.submit_job(entrypoint="echo begins; exit 3")
        asyncio.run(follow(client, job))
        print("another:", client.get_job_info(job).message)

        job = client.submit_job(entrypoint="sleep 1000", submission_id="night")
        client.stop_job(job)
        asyncio.run(follow(client, job))
        print("the last was", client.get_job_status("night"))


if __name__ == "__main__":
    main()
