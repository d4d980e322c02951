"""Reinforcement learning of diffusion language models with quantized rollouts.

The public names, in `__init__.pyi`, are imported on first use, so that `import dllm_rl` is fast.
"""

from typing import Any

import lazy_loader

from dllm_rl.screen import silence_import_noise

silence_import_noise()  # before the libraries that log this noise are imported

__version__ = "0.4.0.dev0"

_import_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names of __init__.pyi


def __getattr__(name: str) -> Any:
    if name not in __all__:
        from dllm_rl.records import nearest_hint

        raise AttributeError(f"module 'dllm_rl' has no attribute {name!r}{nearest_hint(name, __all__, '{!r}')}")
    return _import_name(name)
