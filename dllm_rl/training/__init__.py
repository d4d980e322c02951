"""The training loop, and what a run needs around it."""

from dllm_rl.training.loop import train

__all__ = ["train"]
