"""Messages of other libraries that say nothing to a user of this one."""

import logging

_NOISE = {
    "torchao": "Failed to load",  # CUDA extensions, on a machine without them
    "torch.utils._pytree": "is an Enum subclass",  # a deprecation inside torchao
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional faster kernel
    "bitsandbytes.autograd._functions": "inputs will be cast from",  # once per product
}


def hush_imports() -> None:
    """Drop just these messages, whoever imports the library that logs them; everything else is still logged."""
    for name, start in _NOISE.items():
        logging.getLogger(name).addFilter(lambda record, start=start: start not in str(record.msg))
