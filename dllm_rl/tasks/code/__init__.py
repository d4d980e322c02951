"""Programming problems: static rewards, and a sandbox for tests."""

from dllm_rl.tasks.code.task import Code

__all__ = ["Code"]
