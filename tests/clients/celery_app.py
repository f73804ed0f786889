# SPDX-License-Identifier: MIT
# The tasks of celery_run.py.
import os

from celery import Celery

port = os.environ["PORT"]
app = Celery("tasks", broker=f"redis://127.0.0.1:{port}/1", backend=f"redis://127.0.0.1:{port}/2")


@app.task
def add(a, b):
    return a + b


@app.task
def total(numbers):
    return sum(numbers)
