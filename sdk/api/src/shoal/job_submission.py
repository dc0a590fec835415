"""Submitting jobs: programs that the cluster runs by itself, under the names of ``ray.job_submission``.

::

    from shoal.job_submission import JobSubmissionClient

    client = JobSubmissionClient()
    job = client.submit_job(entrypoint="python train.py", runtime_env={"working_dir": "."})
    print(client.get_job_status(job), client.get_job_logs(job))

A client is no driver: it joins no cluster, and opens a connection for each call.
"""

from shoal.jobs.client import JobSubmissionClient
from shoal.jobs.details import DriverInfo, JobDetails, JobInfo, JobStatus, JobType
from shoal.jobs.submissions import JobSubmissionError

__all__ = [
    "DriverInfo",
    "JobDetails",
    "JobInfo",
    "JobStatus",
    "JobSubmissionClient",
    "JobSubmissionError",
    "JobType",
]
