"""The training loop, and what a run needs around it."""

from dllm_rl.training.trainer import train

__all__ = ["train"]
