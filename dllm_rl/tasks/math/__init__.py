"""GSM8K and MATH500: the tasks, their graders, and math-verify in a worker process."""

from dllm_rl.tasks.math.task import GSM8K, MATH500

__all__ = ["GSM8K", "MATH500"]
