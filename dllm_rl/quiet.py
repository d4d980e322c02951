"""Two start-up messages of other libraries that say nothing to a user of this one."""

import logging

_NOISE = {
    "torchao": "Failed to load",  # CUDA extensions, on a machine without them
    "torch.utils._pytree": "is an Enum subclass",  # a deprecation inside torchao
}


def hush_imports() -> None:
    """Drop just these messages, whoever imports the library that logs them; everything else is still logged."""
    for name, start in _NOISE.items():
        logging.getLogger(name).addFilter(lambda record, start=start: start not in str(record.msg))
