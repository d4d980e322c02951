"""A main thread that stands still: of the test's own process, which looks at itself from another thread."""

import threading
import time

import pytest

from dllm_rl.training import motion
from dllm_rl.training.motion import Motion


def turns_while(main, *, works=True, looks=4):
    """How often in a row no motion was seen, and the last place, of `looks` looks while the main thread runs `main`."""
    seen, found, entered, over = Motion(), [], threading.Event(), threading.Event()

    def watch():
        entered.wait()
        for _ in range(looks):
            found.append(seen.asked(works))
            time.sleep(0.2)  # longer than what the looks themselves take of the processor
        over.set()

    thread = threading.Thread(target=watch)
    thread.start()
    main(entered, over)
    thread.join()
    return seen.turns, found[-1]


def asleep(entered, over):
    entered.set()
    over.wait()


def busy(entered, over):
    entered.set()
    while not over.is_set():
        sum(range(1000))


def test_one_that_waits_for_a_lock_stands_still_at_its_place(monkeypatch):
    """The first look has nothing to compare with."""
    monkeypatch.setattr(motion, "SHARE", 0.9)
    turns, place = turns_while(asleep)
    assert turns == 3 and place is not None and "/threading.py:" in place


@pytest.mark.parametrize(("main", "works", "share"), [(busy, True, 0.01), (asleep, False, 0.9)])
def test_one_that_computes_moves_and_one_that_is_not_known_to_work_may_stand(main, works, share, monkeypatch):
    monkeypatch.setattr(motion, "SHARE", share)
    assert turns_while(main, works=works) == (0, None)


def test_processor_time_is_motion_wherever_the_code_stands(monkeypatch):
    monkeypatch.setattr(motion, "SHARE", 0.0)
    assert turns_while(asleep) == (0, None)


def test_one_that_waits_for_others_does_not_stand_still(monkeypatch):
    monkeypatch.setattr(motion, "SHARE", 0.9)
    monkeypatch.setattr(motion, "WAITING", ("/threading.py",))
    assert turns_while(asleep) == (0, None)
