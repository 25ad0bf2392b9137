"""Flower as it is run in production: behind a password, to look and not to touch, with a memory."""

import os
from pathlib import Path

_AUTH = Path(os.environ.get("FLOWER_AUTH_FILE", "/run/secrets/flower_auth"))

# user:password. Without the file Flower does not start: its pages would be open to everyone.
basic_auth = [_AUTH.read_text(encoding="utf-8").strip()]
# Nobody revokes a task or stops a worker from a web page; embedq-worker has commands for that.
read_only = True

# What it knows survives a restart of Flower. In milliseconds: 60 would fill a disk.
persistent = True
db = "/var/lib/flower/flower"
state_save_interval = 60_000
# A batch is a task, and one costs 4 kB here, so memory is flat from 40 MB on; ops/bench has a
# script that shows it. No texts are among them.
max_tasks = 10_000
max_workers = 1_000

# The arguments are the size of a batch: <256 texts, 15 kB>.
tasks_columns = "uuid,state,args,received,runtime,worker"
natural_time = True

# Seconds; the default boundaries end where a batch begins.
task_runtime_metric_buckets = [0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
# Names of workers outlive restarts, so what is away for an hour is away.
purge_offline_workers = 3_600
