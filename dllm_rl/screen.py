"""Safe printing: untrusted prompts, completions, paths and names cannot act as control characters or rich markup.

`import dllm_rl` runs this module before all others. It therefore also contains the setup that must precede the other
imports.
"""

import io
import logging
import os
import signal
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.text import Text

PR_SET_PDEATHSIG = 1
MAX_MESSAGE_LENGTH = 380  # characters of a printed error or of another library's message
NARROW: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}  # table style


def interactive() -> bool:
    """Return whether Python runs interactively: a notebook, IPython, or Python's prompt."""
    return hasattr(sys, "ps1")  # the prompt string, which only an interactive Python has


@contextmanager
def printing_anything() -> Iterator[None]:
    """In the block, write a character that the encoding of standard output or error lacks as an escape such as \\u6570.

    An ASCII terminal (PYTHONIOENCODING, or the locale C) would else raise UnicodeEncodeError, and end a run that prints
    a completion. It holds for whatever the block prints, also in other libraries and in the user's functions, and for
    an object that the user put in place of a stream.
    """
    changed, replaced = [], []
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            if stream.errors in ("strict", "surrogateescape"):
                changed.append((stream, stream.errors))
                stream.reconfigure(errors="backslashreplace")
        elif stream is not None and not isinstance(stream, _Escaping):
            replaced.append((name, stream, _Escaping(stream)))
            setattr(sys, *replaced[-1][::2])
    try:
        yield
    finally:
        for stream, errors in changed:
            if not stream.closed:
                stream.reconfigure(errors=errors)
        for name, stream, escaping in replaced:
            if getattr(sys, name) is escaping:  # not replaced again in the block
                setattr(sys, name, stream)


class _Escaping:
    """A stream of any class, such as `codecs.StreamWriter`. Text that it cannot encode is written in ASCII."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> Any:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            return self._stream.write(text.encode("ascii", "backslashreplace").decode())

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def escape_controls(text: str, *, keep: str = "") -> str:
    """Replace control and format characters, except those in `keep`, by visible characters."""
    if text.isprintable():  # the usual case, and far faster
        return text
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
    """Format an error in one line. An OSError on a file becomes "PATH: REASON", without the error number.

    The middle of a long line is removed (`without_middle`), because our errors name the setting at the beginning and
    the remedy at the end.
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return escape_controls(without_middle(text))


def without_middle(text: str, max_length: int = MAX_MESSAGE_LENGTH) -> str:
    """Shorten a text to `max_length` characters by replacing its middle with "..."."""
    if len(text) <= max_length:
        return text
    return f"{text[: max_length // 2]} ... {text[5 - max_length // 2 :]}"


def literal(text: object, *, style: str = "", keep: str = "") -> Text:
    """Return text for a cell or title of a table that rich prints unchanged, including square brackets. `keep` has the
    control characters of the library's own text, such as its line breaks.
    """
    return Text(escape_controls(str(text), keep=keep), style=style)


_NOISE = {  # logger -> part of a harmless message
    "torchao": "Failed to load",  # CUDA extensions, on a machine without CUDA
    "torch.utils._pytree": "is an Enum subclass",  # a deprecation inside torchao
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional faster kernel
}


def silence_import_noise() -> None:
    """Filter the messages of _NOISE out of their loggers."""
    for name, part in _NOISE.items():
        # A filter, because a level would also drop errors.
        logging.getLogger(name).addFilter(lambda record, part=part: part not in str(record.msg))  # type: ignore[misc]


def ended_by_launcher() -> None:
    """Ask Linux to send SIGTERM to this process when torch's or accelerate's launcher dies.

    Otherwise the process would outlive its launcher.
    """
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    if not sys.platform.startswith("linux") or not launched:
        return
    parent = os.getppid()
    command_file = Path(f"/proc/{parent}/cmdline")
    command = command_file.read_bytes() if command_file.exists() else b""
    if not any(word in command for word in (b"accelerate", b"torchrun", b"torch.distributed", b"dllm")):
        return  # a shell or another parent, which may end before its jobs
    import ctypes  # imported here, because only launched processes need it

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the launcher died before the call of prctl
        os.kill(os.getpid(), signal.SIGTERM)


# Called here, because the other imports take seconds: if the launcher died meanwhile, the parent would change.
ended_by_launcher()
