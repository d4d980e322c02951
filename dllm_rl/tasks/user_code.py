"""Call code of the user, such as graders and callbacks: what it is given is its own, and what it sets does not last."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import Error, deepcopy
from types import NoneType
from typing import Any

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


@contextmanager
def process_restored() -> Iterator[None]:
    """Give the process back its working directory and torch's settings (`TORCH_SETTINGS`) after a call of user code.

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
        yield
    finally:
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
