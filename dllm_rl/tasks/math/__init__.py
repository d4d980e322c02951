"""GSM8K and MATH500: the tasks, their graders, and math-verify in a worker process."""

from dllm_rl.tasks.math.gsm8k import GSM8K
from dllm_rl.tasks.math.math500 import MATH500

__all__ = ["GSM8K", "MATH500"]
