"""When the last resort is armed. What a deadline does to a stuck grader: test_base.py."""

import faulthandler
import threading
import time

from dllm_rl.tasks import deadline as module
from dllm_rl.tasks.deadline import GRACE, deadline


class StillThread(threading.Thread):
    """The watch, which never looks: the clock of these tests is none that it could wait by."""

    def start(self):
        pass


def test_the_last_resort_is_armed_at_most_once_a_second_and_moves_with_the_work(monkeypatch):
    clock = [100.0]
    armed = []
    monkeypatch.setattr(module.threading, "Thread", StillThread)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda after, **_: armed.append((clock[0], after)))
    with deadline(7.0, lambda: "late") as restart:
        for _ in range(40):  # a quarter of a second each: ten seconds of work
            clock[0] += 0.25
            restart()
    assert armed == [(100.0 + second, 7.0 + GRACE) for second in range(11)]
