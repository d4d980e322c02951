"""The processes of Ray that a test started."""

import os

import psutil


def of_ray(process=None):
    """The processes of Ray below this process, or below another one."""
    found = (process or psutil.Process()).children(recursive=True)
    return [p for p in found if p.is_running() and "ray" in " ".join(named(p)) and p.pid != os.getpid()]


def named(process):
    """The first words of a process's command line; none if it has ended."""
    try:
        return process.cmdline()[:3]
    except psutil.Error:
        return []


def workers(process=None):
    """Those of them that make rollouts."""
    return [p for p in of_ray(process) if named(p) and named(p)[0].startswith("ray::Worker")]
