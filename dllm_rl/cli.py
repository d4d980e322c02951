"""The `dllm-rl` command. Each subcommand reads its arguments here and calls one function elsewhere."""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dllm-rl", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_sample(commands)
    add_report(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_sample(commands) -> None:
    sub = commands.add_parser("sample", help="complete prompts with a checkpoint")
    sub.add_argument("model", help="a checkpoint folder")
    sub.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to complete; none: a line each from standard input")
    sub.add_argument("--max_new_tokens", type=int, default=16, help="tokens per completion (default 16)")
    sub.add_argument("--num_steps", type=int, help="unmasking steps of a diffusion model (default: one per token)")
    sub.add_argument("--block_size", type=int, help="positions open at once (default: all)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    sub.add_argument("--seed", type=int, default=0)
    sub.set_defaults(run=sample)


def sample(arguments: argparse.Namespace) -> None:
    from dllm_rl.policies import load_policy
    from dllm_rl.samplers.autoregress import autoregress
    from dllm_rl.samplers.unmask import unmask
    from dllm_rl.tasks.base import Problem
    from dllm_rl.text import decode, encode, stream

    policy = load_policy(arguments.model)
    texts = arguments.prompts or [line.rstrip("\n") for line in sys.stdin]
    prompts = encode(policy, [Problem(text) for text in texts])
    options = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    if policy.spec.attention == "causal":
        rollout = autoregress(policy, prompts, stream(arguments.seed), **options)
    else:
        steps = arguments.num_steps or arguments.max_new_tokens
        rollout = unmask(policy, prompts, stream(arguments.seed), num_steps=steps, block_size=arguments.block_size, **options)
    for completion in decode(policy, rollout):
        print(completion)


def add_report(commands) -> None:
    sub = commands.add_parser("report", help="draw a run's picture again")
    sub.add_argument("directory", help="the output_dir of a run")
    sub.set_defaults(run=report)


def report(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from dllm_rl.report import draw

    print(draw(Path(arguments.directory)))


if __name__ == "__main__":
    raise SystemExit(main())
