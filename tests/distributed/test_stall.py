"""A main thread that stands still: of the test's own process, which looks at itself from another thread."""

import threading
import time

import pytest

from dllm_rl.distributed import stall as motion
from dllm_rl.distributed.stall import StallDetector


def turns_while(main, *, looks=4):
    """How often in a row no motion was seen, and the last place, of `looks` looks while the main thread runs `main`."""
    seen, found, entered, over, ended = StallDetector(), [], threading.Event(), threading.Event(), []

    def watch():
        entered.wait()
        for _ in range(looks):
            found.append(seen.look())
            time.sleep(0.2)  # longer than what the looks themselves take of the processor
        ended.append(True)
        over.set()

    thread = threading.Thread(target=watch)
    thread.start()
    main(entered, over, ended)
    thread.join()
    return seen.still_ticks, found[-1]


def asleep(entered, over, ended):
    entered.set()
    over.wait()


def busy(entered, over, ended):
    entered.set()
    while not ended:  # an event would be asked in threading.py, where a look may then find the thread
        sum(range(1000))


def test_one_that_waits_for_a_lock_stands_still_at_its_place(monkeypatch):
    """The first look has nothing to compare with."""
    monkeypatch.setattr(motion, "SHARE", 0.9)
    turns, place = turns_while(asleep)
    assert turns == 3 and place is not None and "/threading.py:" in place


def test_one_that_computes_moves():
    turns, place = turns_while(busy)
    assert turns == 0 and "/test_stall.py:" in place


def test_processor_time_is_motion_wherever_the_code_stands(monkeypatch):
    monkeypatch.setattr(motion, "SHARE", 0.0)
    assert turns_while(asleep)[0] == 0


def test_one_that_waits_for_others_does_not_stand_still(monkeypatch):
    monkeypatch.setattr(motion, "SHARE", 0.9)
    monkeypatch.setattr(motion, "WAITING", ("/threading.py",))
    assert turns_while(asleep)[0] == 0


ELASTIC = "/lib/torch/distributed/elastic/multiprocessing/api.py"
COLLECTIVE = "/lib/torch/distributed/distributed_c10d.py"
LOOP = f"{motion.PACKAGE}training/trainer.py"


@pytest.mark.parametrize(
    ("files", "waiting"),
    [
        ([COLLECTIVE, "/lib/accelerate/utils/operations.py", LOOP], True),
        ([f"{motion.PACKAGE}distributed/collectives.py", f"{motion.PACKAGE}step/learner.py", LOOP], True),
        ([f"{motion.PACKAGE}distributed/collectives.py", LOOP], True),
        (["/lib/threading.py", f"{motion.PACKAGE}training/late_rollouts/schedule.py", LOOP], True),
        (["/lib/subprocess.py", "/lib/torch/_inductor/codecache.py", LOOP], True),
        (["/lib/threading.py", "/lib/torch/nn/modules/module.py", LOOP, "recipe.py", ELASTIC], False),
        ([f"{motion.PACKAGE}files.py", f"{motion.PACKAGE}distributed/collectives.py", LOOP, ELASTIC], False),
        ([LOOP], False),
        (["user.py"], False),
        ([], False),
    ],
)
def test_code_that_waits_for_others_is_told_by_what_this_package_called(files, waiting):
    """Not by what called this package, as torch's launchers do, nor by the name of a folder that both lie in."""
    assert motion.waits(files) == waiting
