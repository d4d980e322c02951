"""Rollouts by vLLM: do runs learn as with this library's sampler, why do the log-probs differ, and what does it cost?

The model is that of engines/vllm_sudoku.py; `costs` has SmolLM2-135M, too (`pip install gguf`). All parts run on a CPU.
The page is docs/vllm.md.

runs    vLLM in bf16 with TIS, and this library's sampler in the learner's fp32: 60 steps on three seeds, paired. A
        pair has the same warm-up and the same prompts; the samplers draw different tokens from the same seeds.
parts   mean |d| in nats a token between two ways to compute the log-probs of the same tokens, at temperature 1: of 256
        completions that vLLM sampled from the model which the first run trained. vLLM computes log-probs while it
        samples (a token at a time, from its cache), or afterwards in one pass over prompt and completion.
costs   processor seconds of the stages of a step, of all processes, with the samplers in turn. Completions have 16
        tokens and no end token, so that all samplers sample as many.

    python -m recipes.studies.vllm_rollouts runs parts costs        run these, then print the tables
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from dllm_rl import Autoregress, Causal, Policy, Rollout, load_policy
from dllm_rl.decoding.tokens import encode
from dllm_rl.diagnostics.trace_check import replayed
from dllm_rl.files import read_json, write_json
from dllm_rl.integrations.vllm import Client
from dllm_rl.models.base import copied
from dllm_rl.rng import generator_for
from dllm_rl.types import Prompts
from recipes import smollm2_arithmetic
from recipes.engines.vllm_sudoku import recipe
from recipes.studies.paired import markdown

STORED = Path(__file__).with_suffix(".json")
FOLDER = Path("runs/vllm-study")
SEEDS, STEPS, LAST = 3, 60, 20
AUTOREGRESS = Autoregress(max_new_tokens=16, temperature=1.0)
ARMS: dict[str, dict[str, Any]] = {"vLLM": {}, "in process": {"rollout_engine": None, "sampler": AUTOREGRESS}}
METRICS = {"mean abs log-ratio": "rollout_corr/abs_log_ratio_mean", "ESS": "rollout_corr/ess"}
TRAINED = FOLDER / "vLLM_0" / "checkpoints" / f"step-{STEPS:06}"
REPETITIONS = {"0.8 million": 5, "135 million": 3}  # by the model's weights
FORMATS = ("bfloat16", "float32")
Clock = Callable[[], float]


def store(name: str, value: Any) -> None:
    write_json(STORED, (read_json(STORED) if STORED.is_file() else {}) | {name: value})


def folder_of(arm: str, seed: int) -> Path:
    return FOLDER / f"{arm.replace(' ', '_')}_{seed}"


def runs() -> None:
    """Train both arms on each seed, and store them after each run."""
    from dllm_rl import train
    from dllm_rl.monitoring.json_lines import current_rows

    rows: list[dict[str, Any]] = []
    for seed in range(SEEDS):
        for arm, changes in ARMS.items():
            folder = folder_of(arm, seed)
            summary = train(replace(recipe, **changes, seed=seed, num_steps=STEPS, output_dir=str(folder)))
            steps = [row for row in current_rows(folder / "metrics.jsonl") if "reward" in row]
            row: dict[str, Any] = {"arm": arm, "seed": seed, "reward": [round(step["reward"], 4) for step in steps]}
            row |= {name: summary[f"eval_{name}"] for name in ("before", "after")}
            row |= {name: mean(step[metric] for step in steps) for name, metric in METRICS.items()}
            rows.append(row)
            store("runs", rows)
            gc.collect()  # ends the run's vLLM


def prompts_of(policy: Policy, num_prompts: int, num_generations: int, task: Any = recipe.eval_task) -> Prompts:
    problems = [task[index] for index in range(num_prompts)]
    return encode(policy, problems, num_generations=num_generations)


def in_one_pass(client: Client, rollout: Rollout, rows_at_a_time: int) -> Tensor:
    """The log-probs (B, T) that vLLM computes of tokens that it is given, at temperature 1."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    ids = [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.attention_mask, strict=True)]
    outputs = []
    for start in range(0, len(ids), rows_at_a_time):
        requests = [{"prompt_token_ids": row} for row in ids[start : start + rows_at_a_time]]
        outputs += client.llm.generate(requests, params, use_tqdm=False)
    found = torch.zeros(rollout.tokens.shape)
    for i, (row, output) in enumerate(zip(ids, outputs, strict=True)):
        scored = [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], row[1:], strict=True)]
        count = int(rollout.completion_mask[i].sum())
        found[i, rollout.completion_mask[i]] = torch.tensor(scored[-count:])
    return found


def parts() -> None:
    """Compare the ways to compute the log-probs of the same tokens."""
    policy = load_policy(str(TRAINED), dtype=torch.float32)
    in_bf16 = copied(policy)
    in_bf16.module.to(torch.bfloat16)
    prompts, engine = prompts_of(policy, 64, 4), recipe.rollout_engine
    assert engine is not None
    found: dict[str, Any] = {}
    for dtype in FORMATS:
        rollout_policy = engine.replace(dtype=dtype).load(policy)
        rollout = recipe.sampler(rollout_policy, prompts, generator_for("parts"))
        mask, client = rollout.completion_mask, rollout_policy.module.client
        ways = {"sampled": rollout.logprobs, "one pass": in_one_pass(client, rollout, len(mask))}
        ways |= {"row by row": in_one_pass(client, rollout, 1), "learner": replayed(policy, rollout)[1]}
        ways["transformers"] = ways["learner"] if dtype == "float32" else replayed(in_bf16, rollout)[1]
        pairs = [("sampled", "learner"), ("sampled", "one pass"), ("one pass", "row by row")]
        pairs += [("one pass", "transformers"), ("transformers", "learner")]
        found[dtype] = {f"{a}, {b}": float((ways[a] - ways[b])[mask].abs().mean()) for a, b in pairs}
        ratio = (ways["learner"] - ways["sampled"])[mask].double().exp()
        found[dtype] |= {"ESS": float(ratio.mean() ** 2 / (ratio**2).mean()), "tokens": int(mask.sum())}
        client.close()
        store("parts", found)


def processor_seconds() -> float:
    """Of this process and those that it started."""
    import psutil

    this = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in (this, *this.children(recursive=True)))


def costs() -> None:
    """Run the stages of a step in turn, with each sampler."""
    tiny = recipe.model()
    smollm2 = load_policy(smollm2_arithmetic.weights.smollm2(), dtype=torch.float32)
    batches = {
        "0.8 million": (tiny, prompts_of(tiny, 32, 8)),
        "135 million": (smollm2, prompts_of(smollm2, 2, 8, smollm2_arithmetic.recipe.eval_task)),
    }
    stored: dict[str, Any] = {}
    for size, (policy, prompts) in batches.items():
        stored[size] = {"completions": len(prompts.tokens), "seconds": costs_of(policy, prompts, REPETITIONS[size])}
        store("costs", stored)
        gc.collect()  # ends vLLM


def costs_of(policy: Policy, prompts: Prompts, repetitions: int) -> dict[str, dict[str, list[float]]]:
    policy.spec = replace(policy.spec, eos_ids=())
    assert recipe.rollout_engine is not None
    engine = recipe.rollout_engine.replace(max_model_len=64)
    opened = {dtype: engine.replace(dtype=dtype).load(policy) for dtype in FORMATS}
    rollout = AUTOREGRESS(policy, prompts, generator_for("costs"))
    optimizer, likelihood = torch.optim.AdamW(policy.module.parameters(), lr=0.0), Causal()

    def update() -> None:
        views = likelihood.draw_views(rollout, generator_for("views"))
        scores = likelihood.view_logprobs(policy, rollout, views, retain_graphs=True)
        optimizer.zero_grad()
        likelihood.combine(scores, views)[rollout.completion_mask].mean().backward()
        optimizer.step()

    jobs: dict[str, Callable[[], Any]] = {"in process": lambda: AUTOREGRESS(policy, prompts, generator_for("costs"))}
    for dtype, rollout_policy in opened.items():
        jobs[f"vLLM, {dtype}"] = lambda p=rollout_policy: recipe.sampler(p, prompts, generator_for("costs"))
    jobs |= {"sync": lambda: engine.sync(policy, opened["bfloat16"]), "update": update}
    found: dict[str, dict[str, list[float]]] = {name: {"processor": [], "wall": []} for name in jobs}
    for repetition in range(repetitions + 1):
        for name, job in jobs.items():
            clocks: dict[str, Clock] = {"processor": processor_seconds, "wall": time.perf_counter}
            before = {kind: clock() for kind, clock in clocks.items()}
            job()
            for kind, clock in clocks.items():
                if repetition:  # the first one warms up
                    found[name][kind].append(round(clock() - before[kind], 4))
    return found


def shown(difference: float) -> str:
    return f"{difference:.1e}" if difference else "0"


def page_tables() -> dict[str, str]:
    found = read_json(STORED)
    rows = []
    for arm in ARMS:
        for row in (each for each in found["runs"] if each["arm"] == arm):
            early, late = (mean(row["reward"][part]) for part in (slice(LAST), slice(-LAST, None)))
            cells = {"rollouts": arm, "seed": str(row["seed"]), f"mean reward, first {LAST} steps": f"{early:.2f}"}
            cells |= {f"last {LAST}": f"{late:.2f}"}
            cells |= {f"held-out reward, {when}": f"{row[when]['reward']:.2f}" for when in ("before", "after")}
            cells |= {"mean abs log-ratio": f"{row['mean abs log-ratio']:.4f}", "ESS": f"{row['ESS']:.5f}"}
            rows.append(cells)
    pairs = {
        "everything: vLLM while it samples, against the learner": "sampled, learner",
        "vLLM a token at a time, against vLLM in one pass": "sampled, one pass",
        "vLLM in one pass over 256 rows, against one row": "one pass, row by row",
        "vLLM's kernels, against transformers' in the same format": "one pass, transformers",
        "transformers in this format, against transformers in fp32": "transformers, learner",
    }
    compared = [
        {"compared": text} | {f"vLLM in {dtype}": shown(found["parts"][dtype][pair]) for dtype in found["parts"]}
        for text, pair in pairs.items()
    ]
    steps = []
    for size, batch in found["costs"].items():
        spent = {name: median(each["processor"]) for name, each in batch["seconds"].items()}
        update, sync = spent.pop("update"), spent.pop("sync")
        for name, rollout in spent.items():
            stages = {"rollout": rollout, "update": update, "sync": sync if name != "in process" else 0.0}
            stages["step"] = sum(stages.values())
            row = {"weights": size, "completions": str(batch["completions"]), "rollouts": name}
            steps.append(row | {stage: f"{seconds:.2f}" if seconds else "-" for stage, seconds in stages.items()})
    return {"runs": markdown(rows), "parts": markdown(compared), "costs": markdown(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to run: runs, parts, costs")
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of vllm_rollouts.json")
    for part in parser.parse_args().parts:
        {"runs": runs, "parts": parts, "costs": costs}[part]()
    for table in page_tables().values():
        print(table)


if __name__ == "__main__":
    main()
