"""Jobs that the cluster runs by itself; programs and people reach them through ``shoal.job_submission``."""
