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
    sub = commands.add_parser("sample", help="complete prompts with a checkpoint, and watch it being done")
    sub.add_argument("model", help="a checkpoint folder")
    sub.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to complete; none: a line each from standard input")
    sub.add_argument("--max_new_tokens", type=int, default=16, help="tokens per completion (default 16)")
    sub.add_argument("--num_steps", type=int, help="unmasking steps of a diffusion model (default: one per token)")
    sub.add_argument("--block_size", type=int, help="positions open at once (default: all)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    sub.add_argument("--top_k", type=int)
    sub.add_argument("--top_p", type=float)
    sub.add_argument("--rank", help="confidence (default), max_prob, margin, entropy or random")
    sub.add_argument("--commit", help="schedule (default), threshold=TAU, factor=F, entropy_bound=GAMMA ...")
    sub.add_argument("--cache", help="block (exact, block-causal models), prefix or dual (approximate; =STEPS between refreshes)")
    sub.add_argument("--group_size", type=int, default=1, help="completions of each prompt")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--html", metavar="FILE", help="write a page that replays the completions")
    sub.add_argument("--json", action="store_true", help="print one JSON object with every token, its step and probability")
    sub.add_argument("--no_live", dest="live", action="store_false", default=None, help="do not draw the steps in a terminal")
    sub.add_argument("--delay", type=float, default=0.0, help="seconds to rest on each step of the live view")
    sub.set_defaults(run=sample)


def sample(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from dllm_rl.policies import load_policy
    from dllm_rl.show import RANKS, cache_of, commit_rule, show

    if arguments.rank is not None and arguments.rank not in RANKS:
        raise ValueError(f"rank={arguments.rank!r} is not one of {', '.join(RANKS)}")
    show(
        load_policy(arguments.model),
        arguments.prompts or [line.rstrip("\n") for line in sys.stdin],
        html=None if arguments.html is None else Path(arguments.html),
        as_json=arguments.json,
        live=arguments.live,
        delay=arguments.delay,
        seed=arguments.seed,
        group_size=arguments.group_size,
        max_new_tokens=arguments.max_new_tokens,
        num_steps=arguments.num_steps,
        block_size=arguments.block_size,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        rank=None if arguments.rank is None else RANKS[arguments.rank],
        commit=None if arguments.commit is None else commit_rule(arguments.commit),
        cache=None if arguments.cache is None else cache_of(arguments.cache),
    )


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
