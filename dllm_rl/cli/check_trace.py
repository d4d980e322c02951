"""`dllm-rl check-trace`: replay the rollouts of a file under a model, and compare the log-probs."""

import argparse
import json
import math
from dataclasses import replace

from rich.console import Console

from dllm_rl.cli.options import open_policy
from dllm_rl.diagnostics.trace_check import as_json, check_trace, report_table
from dllm_rl.diagnostics.traces import read_trace
from dllm_rl.screen import escape_controls


def check_trace_command(arguments: argparse.Namespace) -> int:
    """Print the report. Return 1 if steps are impossible or the mean log-prob difference exceeds --bound, else 0."""
    if not 0 <= arguments.bound < math.inf:
        raise ValueError(f"bound={arguments.bound} must be at least 0, and finite")
    if arguments.batch_size < 1:
        raise ValueError(f"batch_size={arguments.batch_size} must be at least 1")
    rollout = read_trace(arguments.file)
    names = ("temperature", "top_k", "top_p")
    passed = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    rollout = replace(rollout, sampling_params=replace(rollout.sampling_params, **passed))
    policy = open_policy(arguments)
    report = check_trace(policy, rollout, bound=arguments.bound, micro_batch_size=arguments.batch_size)
    if arguments.json:
        print(json.dumps(as_json(report)))
    else:
        console = Console()
        console.print(report_table(report))
        console.print(escape_controls(report.verdict), markup=False, highlight=False)
    return int(not report.ok)
