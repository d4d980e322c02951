"""Call code of the user, such as graders and callbacks: what it is given is its own, and what it sets does not last."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import Error, deepcopy
from types import NoneType
from typing import Any, NoReturn

# Settings of torch that a script of inference sets for its process or thread: the function that reads one, and the
# function that sets it.
TORCH_SETTINGS = {
    "is_grad_enabled": "set_grad_enabled",
    "get_default_dtype": "set_default_dtype",
    "get_default_device": "set_default_device",
    "get_num_threads": "set_num_threads",
    "get_float32_matmul_precision": "set_float32_matmul_precision",
    "get_deterministic_debug_mode": "set_deterministic_debug_mode",
}
# What turned torch's inference mode back, which no function sets: each stays in force as long as it exists.
INFERENCE_MODES: list[Any] = []
# Called after user code: runs set their signal handlers again, which a grader, or a library of its, may have replaced.
AFTER_USER_CODE: list[Callable[[], None]] = []


@contextmanager
def children_end() -> Iterator[None]:
    """End a process that the block has forked as soon as it leaves the block, by whatever way.

    A child of `os.fork` that calls `sys.exit`, raises or returns would otherwise be a second process of the run, which
    saves, logs and unlocks what belongs to the first.
    """
    process = os.getpid()
    try:
        yield
    except BaseException as error:
        if os.getpid() != process:
            _end_child(error)
        raise
    if os.getpid() != process:
        _end_child(None)


def _end_child(error: BaseException | None) -> NoReturn:
    """End this process like Python at the end of a script, but without what the parent does at its exit."""
    status: Any = 1
    if isinstance(error, SystemExit):
        status = 0 if error.code is None else error.code
    elif error is None:
        status = (
            f"process {os.getpid()}, which a function of yours forked, returned from it and ends here, so that it does "
            "not go on as a second run; end it by os._exit(0)"
        )
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # it is closed, or there is none
            stream.flush()
    os._exit(status & 0xFF)


@contextmanager
def process_restored() -> Iterator[None]:
    """Give the process back its working directory, torch's settings (`TORCH_SETTINGS`) and a run's signal handlers
    (`AFTER_USER_CODE`) after a call of user code. What the call forked ends in it (`children_end`).

    States of random number generators are left alone: a run reads none of them, and a function that draws from one
    should draw other numbers at its next call.
    """
    try:
        directory = os.getcwd()
    except FileNotFoundError:  # somebody has deleted it
        directory = None
    torch: Any = sys.modules.get("torch")  # tasks never import it; a process without it has no setting to lose
    before = {} if torch is None else {name: getattr(torch, name)() for name in TORCH_SETTINGS}
    is_inference = torch is not None and torch.is_inference_mode_enabled()
    try:
        with children_end():
            yield
    finally:
        for restore in AFTER_USER_CODE:
            restore()
        if before and torch.is_inference_mode_enabled() != is_inference:
            INFERENCE_MODES.append(torch.inference_mode(is_inference))
            INFERENCE_MODES[-1].__enter__()  # sets the grad mode, too, which is restored next
        for name, value in before.items():
            if getattr(torch, name)() != value:
                # Without a default device, tensors are made on the CPU. None says so at no cost.
                is_no_device = name == "get_default_device" and value.type == "cpu"
                getattr(torch, TORCH_SETTINGS[name])(None if is_no_device else value)
        if directory is not None:
            with suppress(FileNotFoundError):  # the call has deleted it
                os.chdir(directory)


def own_copy(value: Any) -> Any:
    """Return a deep copy of a value of a row, for user code that may change it in place.

    A value that Python cannot copy, such as a lock or an open connection, is returned as it is.
    """
    # Rows are mostly JSON, which this copies several times faster than `deepcopy`.
    if type(value) in (str, int, float, bool, NoneType):
        return value
    if type(value) is list:
        return [own_copy(item) for item in value]
    if type(value) is dict:
        return {key: own_copy(item) for key, item in value.items()}
    try:
        return deepcopy(value)
    except (TypeError, Error):
        return value
