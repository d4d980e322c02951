"""`dllm-rl doctor MODEL`: whether the library works with a model, and what its quantized rollouts are worth."""

import argparse
from pathlib import Path

from dllm_rl.cli.options import open_policy, read_methods
from dllm_rl.doctor.model import SECTIONS, check_model
from dllm_rl.quantization.schemes import Scheme

SLOW = "step"  # the section that --quick leaves out


def check_model_command(arguments: argparse.Namespace) -> int:
    """Print what each section found, and write the report. Return 1 if something is wrong, else 0."""
    sections = arguments.sections or [name for name in SECTIONS if not (arguments.quick and name == SLOW)]
    if unknown := [name for name in sections if name not in SECTIONS]:
        raise ValueError(f"--sections {unknown[0]} is not one of {', '.join(SECTIONS)}")
    if arguments.quick and arguments.sections:
        raise ValueError(f"--quick leaves {SLOW!r} out, and --sections names what to run; give one of them")
    schemes = None
    if arguments.quantization is not None:
        schemes = read_methods(Scheme, "quantization", [arguments.quantization], arguments.fields)
        if schemes == [None]:
            raise ValueError("--quantization none has no copy to measure: leave it out, or name other --sections")
    output = Path(arguments.output or "report.json")
    results = check_model(
        lambda: open_policy(arguments, half_head=arguments.half_head),
        [name for name in SECTIONS if name in sections],
        schemes=schemes,
        seed=arguments.seed,
        output=output,
    )
    wrong, look = ([each.name for each in results if each.finding.verdict == kind] for kind in ("wrong", "look"))
    if wrong:
        summary = (
            f"wrong: {', '.join(wrong)}; mend this first and run the command again, because the other numbers are "
        )
        summary += "those of the model as it is now"
    else:
        summary = f"nothing is wrong; a person must judge: {', '.join(look)}" if look else "every check passed"
        if "sampler" in sections:
            summary += "; whether the completions are answers is for you to read"
    if left_out := [name for name in SECTIONS if name not in sections]:
        summary += f"; not run: {', '.join(left_out)}"
    print(
        f"\n{summary}\n{output} has the numbers and versions, and no texts or paths, so that it can be sent to others"
    )
    return int(bool(wrong))
