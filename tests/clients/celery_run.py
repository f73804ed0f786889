# SPDX-License-Identifier: MIT
# Celery: a worker in a process of its own, with broker and results in databases 1 and 2.
import os
import subprocess
import sys

from celery import chain, chord, group

from celery_app import add, app, total

with open(os.path.join(os.environ["WORK"], "worker.log"), "w", encoding="utf-8") as log:
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "celery_app", "worker", "-P", "solo"],
        stdout=log, stderr=subprocess.STDOUT)
try:
    print(add.delay(2, 3).get(timeout=60))
    print(sum(group(add.s(i, i) for i in range(20))().get(timeout=30)))
    print(chord([add.s(i, i) for i in range(10)])(total.s()).get(timeout=30))
    print(chain(add.s(1, 2), add.s(3), add.s(4))().get(timeout=30))
    print(add.apply_async((1, 1), countdown=1).get(timeout=30))
    try:
        add.delay(1, "x").get(timeout=30)
    except TypeError as error:
        print(type(error).__name__)
    print(len(app.control.ping(timeout=3)))
    app.control.shutdown()
    print("worker", worker.wait(30))
finally:
    worker.kill()
