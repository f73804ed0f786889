# SPDX-License-Identifier: MIT
# What the jobs of rq_jobs.py do.


def add(a, b):
    return a + b


def fail():
    raise ValueError("on purpose")
