"""Configure Flower for production: with a password, read-only and persistent."""

import os
from pathlib import Path

_AUTH = Path(os.environ.get("FLOWER_AUTH_FILE", "/run/secrets/flower_auth"))

# user:password. Without the file Flower does not start, because its pages would be public.
basic_auth = [_AUTH.read_text(encoding="utf-8").strip()]
# Use the commands of embedq-worker to control workers.
read_only = True

# Tasks and workers survive a restart of Flower. The interval is in milliseconds.
persistent = True
db = "/var/lib/flower/flower"
state_save_interval = 60_000
# Tasks (batches) in memory; ops/bench/flower_memory.py measures it. They contain no texts.
max_tasks = 10_000
max_workers = 1_000

# The arguments are the size of a batch: <256 texts, 15 kB>.
tasks_columns = "uuid,state,args,received,runtime,worker"
natural_time = True

# Histogram boundaries in seconds; the default ones are too short for batches.
task_runtime_metric_buckets = [0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
# Seconds. Workers keep their names over restarts, so a name that is offline this long is obsolete.
purge_offline_workers = 3_600
