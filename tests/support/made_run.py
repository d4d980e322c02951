"""A run without a start: what a test of one of its parts needs, in a line."""

from contextlib import nullcontext
from types import SimpleNamespace

from accelerate import Accelerator
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.training.run import CheckpointWriter, Run


def make_run(directory="runs/x", *, recipe=None, policy=None, saved=None, **parts):
    """A run of `tiny_recipe` after three steps; `parts`: other fields of Run. Its log, stop and screen do nothing."""
    policy = policy or tiny_masked_lm(**SIZES)
    fields = {
        "accelerator": Accelerator(cpu=True),
        "log": SimpleNamespace(entered="", step_seconds={}, say=lambda text: None, stage=nullcontext),
        "optimizer": None,
        "state": TrainingState(step=3, version=3, dtype="float32", recipe={}),
        "stop": SimpleNamespace(agreed=lambda *_: 0, last_words=None),
        "writer": CheckpointWriter(in_thread=False),
        "progress": lambda *_: None,
    }
    run = Run(recipe=recipe or tiny_recipe(directory), policy=policy, rollout_policy=policy, **fields | parts)
    run.saved = saved
    return run
