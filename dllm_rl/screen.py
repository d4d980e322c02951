"""Foreign text on a screen: prompts, completions, paths and names are shown, and can neither steer a terminal nor be
read as rich's markup."""

import logging
import sys
import unicodedata
from collections.abc import Callable

from rich.text import Text


def interactive() -> bool:
    """Whether someone types at a prompt: a notebook, IPython, Python itself."""
    return hasattr(sys, "ps1")


def escape_controls(text: str, *, keep: str = "") -> str:
    """Text that cannot move the cursor, ring, or turn its neighbours round: control and format characters, but those of
    `keep`, are replaced by signs that stand for them."""
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


def literal(text: object, *, style: str = "") -> Text:
    """What rich prints as it stands, brackets and all: a cell, a title."""
    return Text(escape_controls(str(text)), style=style)


_NOISE = {
    "torchao": "Failed to load",  # CUDA extensions, on a machine without them
    "torch.utils._pytree": "is an Enum subclass",  # a deprecation inside torchao
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional faster kernel
    "bitsandbytes.autograd._functions": "inputs will be cast from",  # once per product
}


def silence_import_noise() -> None:
    """Drop just these messages, whoever imports the library that logs them; everything else is still logged."""
    for name, start in _NOISE.items():
        logging.getLogger(name).addFilter(_other_than(start))


def _other_than(start: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: start not in str(record.msg)
