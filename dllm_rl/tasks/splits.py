"""Which split a problem belongs to: decided by what must not leak, and by nothing else."""

from hashlib import sha256
from typing import Literal

Split = Literal["train", "validation", "test"]
NAMES: tuple[Split, ...] = ("train", "validation", "test")


def hashed_split(key: str) -> Split:
    """The split of a key, the same for ever: 70 in 100 train, 10 validation, 20 test."""
    place = int.from_bytes(sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") % 100
    return "test" if place < 20 else "validation" if place < 30 else "train"


def check_split(split: str, names: tuple[str, ...] = NAMES) -> None:
    if split not in names:
        raise ValueError(f"split={split!r} must be one of {', '.join(map(repr, names))}")
