"""``shoal job``: submit programs that the cluster runs by itself, and see what became of them."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from shoal.cli.flags import (
    Format,
    Output,
    json_object,
    on_cluster,
    out,
)
from shoal.cli.tables import new_table, print_table
from shoal.job_submission import JobDetails, JobStatus, JobSubmissionClient
from shoal.status import Target
from shoal_core.runtime.session import Address

job = typer.Typer(
    no_args_is_help=True,
    help="Submit programs that the cluster runs by itself, and see what became of them.",
)

LOOK_SECONDS = 0.2
SIGNALLED = 128
"""What a shell adds to the number of a signal that has killed a program."""
SHOWN = ("submission_id", "job_id", "type", "status", "entrypoint", "message")
"""The columns that people are shown; JSON has all of them."""

Id = Annotated[str, typer.Argument(help="The job's submission id, or the id of its driver's job.")]


@job.command()
@on_cluster(observes=False)
def submit(
    where: Target,
    entrypoint: Annotated[list[str], typer.Argument(help="The command and its arguments, behind `--`.")],
    submission_id: Annotated[str | None, typer.Option(help="What it is to be called; drawn by default.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not show its log until it has ended.")] = False,
    runtime_env_json: Annotated[str | None, typer.Option(help="The runtime environment, as JSON.")] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file with the runtime environment, as JSON.")
    ] = None,
    working_dir: Annotated[str | None, typer.Option(help="A folder, or zip file, in which it is to run.")] = None,
    metadata_json: Annotated[str | None, typer.Option(help='What is noted of it, as JSON: {"team": "a"}.')] = None,
    entrypoint_num_cpus: Annotated[
        float | None, typer.Option(min=0, help="CPUs that the command itself takes.")
    ] = None,
    entrypoint_num_gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs that the command itself takes.")
    ] = None,
    entrypoint_memory: Annotated[int | None, typer.Option(min=1, help="Bytes that the command itself takes.")] = None,
    entrypoint_resources: Annotated[
        str | None, typer.Option(help='Resources that the command itself takes, as JSON: {"licence": 1}.')
    ] = None,
) -> None:
    """Have a command run on the cluster, and show its log; its exit code where it failed, 1 where it did not run."""
    if runtime_env is not None and runtime_env_json is not None:
        raise typer.BadParameter("--runtime-env and --runtime-env-json cannot both be given")
    text = runtime_env_json if runtime_env is None else runtime_env.read_text()
    environment = json_object("--runtime-env-json" if runtime_env is None else "--runtime-env", text)
    if working_dir is not None:
        environment["working_dir"] = working_dir
    client = _client(where)
    try:
        name = client.submit_job(
            entrypoint=shlex.join(entrypoint),
            submission_id=submission_id,
            runtime_env=environment,
            metadata=json_object("--metadata-json", metadata_json),
            entrypoint_num_cpus=entrypoint_num_cpus,
            entrypoint_num_gpus=entrypoint_num_gpus,
            entrypoint_memory=entrypoint_memory,
            entrypoint_resources=json_object("--entrypoint-resources", entrypoint_resources),
        )
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    out.print(f"Submitted as [bold]{escape(name)}[/].")
    if no_wait:
        out.print(f"To see what becomes of it: shoal job status {shlex.quote(name)}, shoal job logs --follow ...")
        return
    _follow(client, name)
    _print_end(client.get_job_info(name))


@job.command()
@on_cluster(observes=False)
def status(
    where: Target,
    job_id: Id,
    output: Output = Format.TABLE,
) -> None:
    """Say how far a job is."""
    details = _client(where).get_job_info(job_id)
    if output is Format.JSON:
        print(json.dumps(_row(details), indent=2))
    else:
        _print_details([details])


@job.command("list")
@on_cluster(observes=False)
def list_(
    where: Target,
    output: Output = Format.TABLE,
) -> None:
    """List all jobs, drivers that nobody submitted among them."""
    jobs = _client(where).list_jobs()
    if output is Format.JSON:
        print(json.dumps([_row(details) for details in jobs], indent=2))
    elif jobs:
        _print_details(jobs)
    else:
        out.print("There are no jobs.")


@job.command()
@on_cluster(observes=False)
def logs(
    where: Target,
    job_id: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
) -> None:
    """Print what a job has printed."""
    client = _client(where)
    if follow:
        _follow(client, job_id)
    else:
        print(client.get_job_logs(job_id), end="")


@job.command()
@on_cluster(observes=False)
def stop(
    where: Target,
    job_id: Id,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until it has ended.")] = False,
) -> None:
    """Stop a job: its processes are asked to end, and killed after three seconds."""
    client = _client(where)
    if not client.stop_job(job_id):
        out.print("It has ended already.")
    while not no_wait and not client.get_job_status(job_id).is_terminal():
        time.sleep(LOOK_SECONDS)
    _print_details([client.get_job_info(job_id)])


@job.command()
@on_cluster(observes=False)
def delete(
    where: Target,
    job_id: Id,
) -> None:
    """Forget a job that has ended, and its log."""
    _client(where).delete_job(job_id)
    out.print("Deleted.")


def _client(where: Target) -> JobSubmissionClient:
    return JobSubmissionClient(Address(where.address, where.cluster, where.credentials, where.tls))


def _follow(client: JobSubmissionClient, name: str) -> None:
    async def follow() -> None:
        async for text in client.tail_job_logs(name):
            print(text, end="", flush=True)

    asyncio.run(follow())


def _row(details: JobDetails) -> dict[str, Any]:
    return details.model_dump(mode="json")


def _print_details(jobs: list[JobDetails]) -> None:
    table = new_table(*SHOWN, texts={"entrypoint", "message"})
    for details in jobs:
        row = _row(details)
        table.add_row(*("" if row[column] is None else escape(row[column]) for column in SHOWN))
    print_table(table, out)


def _print_end(details: JobDetails) -> None:
    """Say how a job has ended that was waited for."""
    out.print(f"[bold]{details.status}[/]: {escape(details.message or '')}")
    if details.status is not JobStatus.SUCCEEDED:
        code = details.driver_exit_code or 1
        raise typer.Exit(code if code > 0 else SIGNALLED - code)
