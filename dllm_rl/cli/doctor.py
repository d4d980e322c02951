"""`dllm-rl doctor`: the sources of mismatch in a few rollouts of a checkpoint."""

import argparse
from functools import partial
from pathlib import Path

from dllm_rl.cli.options import open_policy
from dllm_rl.config import pickable
from dllm_rl.diagnostics.doctor import diagnose
from dllm_rl.diagnostics.findings import write_doctor
from dllm_rl.models.tokens import encode, usual_length
from dllm_rl.quantization import schemes as quantize
from dllm_rl.samplers import sampler_for
from dllm_rl.tasks.protocols import TASKS


def doctor_command(arguments: argparse.Namespace) -> int:
    """Print the report; 1 when the mismatch is above --bound (mean |log-ratio|, nats), else 0."""
    schemes = pickable(quantize.__name__)
    if arguments.quantization != "none" and arguments.quantization not in schemes:
        raise ValueError(f"quantization={arguments.quantization!r} is none of none, {', '.join(sorted(schemes))}")
    if arguments.task not in TASKS:
        raise ValueError(f"task={arguments.task!r} is none of {', '.join(TASKS)}")
    config = None if arguments.quantization == "none" else schemes[arguments.quantization]()
    policy = open_policy(arguments, float32_head=not arguments.half_head)
    task = TASKS[arguments.task]()
    length = arguments.max_new_tokens or usual_length(policy, task)
    sampler = partial(sampler_for(policy), max_new_tokens=length, temperature=arguments.temperature)
    if policy.spec.attention != "causal":
        sampler = partial(sampler, num_steps=arguments.num_steps)
    prompts = encode(policy, [task[i] for i in range(arguments.num_prompts)], group_size=2)
    found = diagnose(policy, config, prompts=prompts, sampler=sampler, seed=arguments.seed)
    write_doctor(found, as_json=arguments.json, directory=arguments.output_dir and Path(arguments.output_dir))
    return int(arguments.bound is not None and found.worst > arguments.bound)
