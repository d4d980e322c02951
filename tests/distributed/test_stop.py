"""Signals to one of several processes, in one process: the exchange is played."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from accelerate import Accelerator
from forked import Child
from refusals import refuses

from dllm_rl.distributed import stop as stopping
from dllm_rl.distributed.stop import SIGNALS, Stop, Stopped
from dllm_rl.tasks import user_code

OVER = "the end"


@pytest.fixture
def stop():
    """Of a process that is not the main one; the signals do afterwards what they did before."""
    numbers = [*SIGNALS, signal.SIGALRM]
    before = {number: signal.getsignal(number) for number in numbers}
    made = Stop(seconds=1000.0, main=False)
    yield made
    made.disarm()
    for number, handler in before.items():
        signal.signal(number, handler)


class Exchange(Accelerator):
    """An accelerator of two processes; during a gather, this one gets the signal `late`."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, others, late=0):
        self.others, self.late = others, late

    def gather(self, mine):
        if self.late:
            os.kill(os.getpid(), self.late)
        return torch.cat([mine, torch.tensor([self.others])])


def test_a_signal_during_the_exchange_is_kept_for_the_next_one(stop):
    """The other process has not heard of it: this one goes on with it for a step."""
    assert stop.agreed(Exchange(0, late=signal.SIGUSR1)) == 0
    assert stop.received == signal.SIGUSR1
    assert stop.agreed(Exchange(0)) == signal.SIGUSR1


def test_all_processes_leave_with_the_signal_that_they_agreed_on(stop):
    assert stop.agreed(Exchange(signal.SIGUSR1, late=signal.SIGTERM)) == signal.SIGUSR1
    with pytest.raises(Stopped) as left:
        stop.leave(OVER)
    assert left.value.args == (128 + signal.SIGUSR1,)


def test_a_signal_that_came_before_the_last_step_had_ended_ends_the_run_after_it(stop):
    assert stop.agreed(Exchange(0, late=signal.SIGTERM)) == 0
    refuses(str(128 + signal.SIGTERM), lambda: stop.leave_at_once(OVER), Stopped)


def test_a_further_signal_does_not_interrupt_the_end_of_a_run(stop):
    """As a launcher sends one to all processes when the first has ended."""
    stop.leave_at_once(OVER)
    refuses(str(128 + signal.SIGUSR1), lambda: os.kill(os.getpid(), signal.SIGUSR1), Stopped)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == signal.SIGUSR1


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1])
def test_a_ctrl_c_after_another_signal_waits_for_the_step(stop, first):
    """A launcher hands a signal on, and its user presses Ctrl-C as well: only a second Ctrl-C asks for less."""
    os.kill(os.getpid(), first)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == first


def test_a_second_ctrl_c_saves_the_last_step_and_a_third_does_not_wait_for_the_save(stop):
    asked = []

    def save():
        asked.append(signal.getitimer(signal.ITIMER_REAL))
        os.kill(os.getpid(), signal.SIGINT)

    stop.overdue = save
    os.kill(os.getpid(), signal.SIGINT)
    assert not asked
    refuses(str(128 + signal.SIGINT), lambda: os.kill(os.getpid(), signal.SIGINT), Stopped)
    assert asked == [(0.0, 0.0)]  # once, and the timer was off


def test_a_ctrl_c_during_the_save_of_a_step_that_is_overdue_does_not_wait_for_it(stop):
    stop.is_leaving = True
    stop.overdue = lambda: pytest.fail("saved again")
    os.kill(os.getpid(), signal.SIGINT)
    refuses(str(128 + signal.SIGINT), lambda: os.kill(os.getpid(), signal.SIGINT), Stopped)


@pytest.mark.parametrize("last_words", [None, OVER])
def test_a_signal_that_another_process_leaves_on_is_heard_once(stop, last_words):
    stop.last_words = last_words
    if last_words is None:
        stop.hear_from_another(signal.SIGINT)
    else:
        refuses(str(128 + signal.SIGINT), lambda: stop.hear_from_another(signal.SIGINT), Stopped)
    assert stop.received == signal.SIGINT
    stop.hear_from_another(signal.SIGINT)  # no second Ctrl-C


def test_a_signal_that_this_process_does_not_hear_is_not_raised_for_another(stop):
    """A run in a thread has no handlers: the signal would end the whole process."""
    signal.signal(signal.SIGHUP, lambda *_: pytest.fail("raised"))
    stop.hear_from_another(signal.SIGHUP)
    assert not stop.received


def test_two_processes_delete_a_refused_runs_folder_at_the_same_time(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / stopping.LOCK).touch()

    def after_the_other(directory):
        shutil.rmtree(directory)
        raise FileNotFoundError(directory)

    monkeypatch.setattr(stopping, "remove", after_the_other)
    stopping.leave_folder(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_a_step_that_is_overdue_is_asked_again_each_second(stop, seconds):
    """An update is let end: only what comes after it can be saved. No time at all is no time limit turned off."""
    stop.seconds = seconds
    os.kill(os.getpid(), signal.SIGTERM)
    left, every = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < left <= max(seconds, 1.0) and every == 1.0
    asked = []
    stop.overdue = lambda: asked.append(True)
    signal.raise_signal(signal.SIGALRM)
    assert asked


def test_a_ctrl_c_is_heard_where_it_was_ignored_and_a_hangup_is_not(stop):
    """A shell starts what runs in its background with Ctrl-C ignored, and nohup ignores the hangup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    made = Stop(seconds=1000.0, main=False)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGINT)
    assert made.received == signal.SIGINT
    made.disarm()


HANDLERS = """
import multiprocessing, os, signal, time
from concurrent.futures import ProcessPoolExecutor
from dllm_rl.distributed.stop import SIGNALS, Stop
from dllm_rl.tasks import user_code

def own(number, frame):
    os._exit(7)

def handlers(*_):
    with user_code.process_restored():  # a worker may call the library
        pass
    return [str(signal.getsignal(number)) for number in SIGNALS]

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGUSR1, own)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
before = handlers()
stops = [Stop(seconds=99.0, main=True) for _ in range(2)]  # a reward that trains a model has two
user_code.AFTER_USER_CODE += [stop.arm for stop in stops]
assert handlers() != before
hears = signal.getsignal(signal.SIGTERM)
"""
IN_POOLS = f"""{HANDLERS}
context = multiprocessing.get_context("fork")
with context.Pool(1) as pool:
    print(pool.map(handlers, [0])[0] == before)
with ProcessPoolExecutor(1, mp_context=context) as pool:
    print([*pool.map(handlers, [0])][0] == before)
"""
ENDED = f"""{HANDLERS}
import sys
if sys.argv[1] == "around":  # a handler of the user's calls the run's
    for number in SIGNALS:
        signal.signal(number, lambda *given: hears(*given))
for number in SIGNALS:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if sys.argv[1] == "around":  # as if the signal came before the fork's clean-up
                signal.signal(number, lambda *given: hears(*given))
            os.write(writing, b".")
            time.sleep(20)
        except KeyboardInterrupt:
            os._exit(5)
        os._exit(6)
    os.read(reading, 1)
    os.kill(child, number)
    if number == signal.SIGHUP:
        os.kill(child, signal.SIGKILL)
    print(signal.Signals(number).name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_pools_processes_have_the_handlers_from_before_the_runs():
    assert outcome(IN_POOLS) == "True\nTrue\n"


@pytest.mark.parametrize("way", ["fork", "around"])
def test_a_signal_ends_a_forked_process_as_without_a_run(way):
    """SIGHUP was ignored, as under nohup, and SIGUSR1 had a handler."""
    assert outcome(ENDED, way) == "SIGINT 5\nSIGTERM -15\nSIGHUP -9\nSIGUSR1 7\n"


def outcome(program: str, *arguments: object) -> str:
    child = Child(program, *arguments)
    out, error = child.communicate()
    assert child.returncode == 0 and not error, error
    return out


def ignored(number):
    signal.signal(number, signal.SIG_IGN)


def handled(number):
    signal.signal(number, lambda *_: None)


def ignored_in_c(number):
    """Python's table of handlers does not see it."""
    ctypes.CDLL(None).signal(int(number), ctypes.c_void_p(1))


def blocked(number):
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})


@pytest.mark.parametrize("disarm", [ignored, handled, ignored_in_c, blocked])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("raises", [False, True])
def test_a_grader_cannot_disarm_the_stop(stop, monkeypatch, disarm, number, raises):
    monkeypatch.setattr(user_code, "AFTER_USER_CODE", [stop.arm])
    with suppress(ValueError), user_code.process_restored():
        disarm(number)
        if raises:
            raise ValueError
    os.kill(os.getpid(), number)
    assert stop.received == number


def test_a_graders_time_limit_leaves_the_stops_timer(stop, monkeypatch):
    """It asks for the alarm, and turns it off, after the signal has come."""
    monkeypatch.setattr(user_code, "AFTER_USER_CODE", [stop.arm])
    overdue = []
    stop.seconds, stop.overdue = 0.2, lambda: overdue.append(True)
    with user_code.process_restored():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the grader's limit"))
        signal.alarm(5)
        signal.alarm(0)
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
    signal.raise_signal(signal.SIGALRM)
    assert overdue
    stop.disarm()
    with user_code.process_restored():
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


LAUNCHER = (
    "import os, signal, subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, text=True)\n"
    "print(child.stdout.readline(), flush=True)\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone signals the death of a parent")
@pytest.mark.parametrize("late", ["", "import torch; "])
@pytest.mark.repeated(first_only=True)
def test_a_process_does_not_outlive_a_launcher_that_dies_while_it_imports(late):
    """It asks before the other imports; after them its parent is another process."""
    hears = "print('importing', flush=True)"
    child = f"import dllm_rl, sys, time; {hears}; {late}time.sleep(10); print('outlived', file=sys.stderr)"
    command = [sys.executable, "-c", LAUNCHER, child, "accelerate"]  # by this word it is known as a launcher
    alone = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=alone
    )  # waits for the child, which has its error
    assert (done.returncode, done.stdout.strip(), done.stderr) == (-signal.SIGKILL, "importing", "")


RUNS = """
import atexit, sys
from types import SimpleNamespace
import torch.distributed as dist
from dllm_rl.distributed.stop import leaving_nothing_behind

@leaving_nothing_behind
def train(recipe):
    if recipe.fails:
        raise ValueError("failed")

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(lambda: print(dist.is_initialized()))  # runs after what a run registers
try:
    for _ in range(2):
        train(SimpleNamespace(directory=sys.argv[1], fails=sys.argv[2] == "fails"))
except ValueError:
    pass
dist.barrier()  # a script may go on with the group after a run
"""


@pytest.mark.slow
@pytest.mark.parametrize(("way", "is_left"), [("ends", False), ("fails", True)])
def test_the_process_group_of_a_run_that_ended_well_is_destroyed_before_python_shuts_down(tmp_path, way, is_left):
    done = subprocess.run([sys.executable, "-c", RUNS, str(tmp_path), way], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{is_left}\n"), done.stderr
