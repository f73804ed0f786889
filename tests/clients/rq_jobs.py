# SPDX-License-Identifier: MIT
# rq: a worker in a process of its own runs jobs, one that fails, and one that depends on another.
import os
import subprocess
import sys

import redis
from rq import Queue

import rq_functions

port = os.environ["PORT"]
connection = redis.Redis(port=int(port), db=1)
queue = Queue(connection=connection)
sums = [queue.enqueue(rq_functions.add, i, i) for i in range(20)]
fails = queue.enqueue(rq_functions.fail)
after = queue.enqueue(rq_functions.add, 1, 2, depends_on=sums[0])
worker = "from rq import Connection, Worker; import redis; " \
    f"connection = redis.Redis(port={port}, db=1); " \
    "Worker(['default'], connection=connection).work(burst=True, logging_level='ERROR')"
with open(os.path.join(os.environ["WORK"], "worker.log"), "w", encoding="utf-8") as log:
    done = subprocess.run([sys.executable, "-c", worker], stderr=log, stdout=log, check=False)
print("worker", done.returncode)
print([job.result for job in sums])
fails.refresh()
print(fails.get_status(), fails.exc_info.strip().splitlines()[-1])
print(after.result)
print(len(queue), queue.failed_job_registry.count, queue.finished_job_registry.count)
