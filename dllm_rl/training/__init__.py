"""The training loop, and the parts of a run around it."""

from dllm_rl.training.trainer import train

__all__ = ["train"]
