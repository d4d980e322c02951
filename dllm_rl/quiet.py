"""Filters for irrelevant import-time warnings of other libraries."""

import logging
from collections.abc import Callable

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
