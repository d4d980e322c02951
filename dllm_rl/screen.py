"""Untrusted text on a screen: prompts, completions, paths and names cannot act as control characters or rich markup.

`import dllm_rl` runs this module before all others, so that it also contains the setup that must precede the other
imports.
"""

import logging
import os
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.text import Text

PR_SET_PDEATHSIG = 1
MAX_MESSAGE_LENGTH = 380  # characters of an error, or of a library's message
NARROW: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}  # a table for 80 columns


def interactive() -> bool:
    """Return whether Python runs interactively: a notebook, IPython, or Python's prompt."""
    return hasattr(sys, "ps1")  # the prompt string, which only an interactive Python has


def escape_controls(text: str, *, keep: str = "") -> str:
    """Replace control and format characters, except those of `keep`, by visible signs."""
    shown = []
    for c in text:
        if c in keep:
            shown.append(c)
        elif c == "\n":
            shown.append("↵")
        elif unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            shown.append(chr(0x2400 + ord(c)) if ord(c) < 0x20 else "\ufffd")
        else:
            shown.append(c)
    return "".join(shown)


def line_of(error: BaseException) -> str:
    """Format an error in one line; for a file, its path and the fault, without the system's error number.

    A line of more than MAX_MESSAGE_LENGTH characters loses its middle: the field is at the beginning, the remedy at the
    end.
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return escape_controls(without_middle(text))


def without_middle(text: str) -> str:
    """Remove the middle of a text of more than MAX_MESSAGE_LENGTH characters."""
    return (
        text
        if len(text) <= MAX_MESSAGE_LENGTH
        else f"{text[: MAX_MESSAGE_LENGTH // 2]} ... {text[5 - MAX_MESSAGE_LENGTH // 2 :]}"
    )


def literal(text: object, *, style: str = "") -> Text:
    """Return a cell or a title that rich prints unchanged, including brackets."""
    return Text(escape_controls(str(text)), style=style)


_NOISE = {
    "torchao": "Failed to load",  # CUDA extensions, on a machine without CUDA
    "torch.utils._pytree": "is an Enum subclass",  # a deprecation inside torchao
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional faster kernel
    "bitsandbytes.autograd._functions": "inputs will be cast from",  # at every matrix product
}


def silence_import_noise() -> None:
    """Drop only these messages, for any importer of the library."""
    for name, start in _NOISE.items():
        logging.getLogger(name).addFilter(_other_than(start))  # a filter, because a level would also drop errors


def _other_than(start: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: start not in str(record.msg)


@contextmanager
def imports_interruptible() -> Iterator[None]:
    """Make Ctrl-C during an import in the block print one line and exit with 130; interactively it raises."""
    main = threading.current_thread() is threading.main_thread()
    if interactive() or not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end_an_import)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ended_by_launcher() -> None:
    """Let Linux send SIGTERM when torch's or accelerate's launcher dies, so that no process outlives the launcher.

    If the launcher has died already, as far as this can be determined, end the process immediately.
    """
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    if not sys.platform.startswith("linux") or not launched:
        return
    parent = os.getppid()
    words = Path(f"/proc/{parent}/cmdline")
    command = words.read_bytes() if words.exists() else b""
    if not command and parent > 1:
        # The launcher is ending: freeing its memory takes a while, and only then its children get another parent.
        for _ in range(5000):
            if os.getppid() != parent:
                return ended_by_launcher()
            time.sleep(0.001)
    if not any(word in command for word in (b"accelerate", b"torchrun", b"torch.distributed", b"dllm")):
        # Any other parent, such as a shell, may end before its jobs. But a recipe may import torch before this line:
        # then init is the parent of a dead launcher's processes. Only torchrun sets its variable. accelerate's may be
        # exported by hand, in a service or a container: in this case the leader of the process group is alive.
        if parent == 1 and ("TORCHELASTIC_RUN_ID" in launched or not _lives(os.getpgrp())):
            os.kill(os.getpid(), signal.SIGTERM)
        return
    import ctypes  # here: no other process needs it

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the launcher died in between
        os.kill(os.getpid(), signal.SIGTERM)


def _lives(process: int) -> bool:
    """Return whether a process runs; 0 means a process that a container does not see."""
    status = Path(f"/proc/{process}/stat")
    # The state comes after the name in brackets; Z has ended, and its parent has not collected it yet.
    return process == 0 or (status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z")


def _end_an_import(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(128 + number)  # libraries turn an exception into another one, or ignore it
        frame = frame.f_back
    raise KeyboardInterrupt


# Called now because the other imports take seconds: if the launcher died meanwhile, the parent would change.
ended_by_launcher()
