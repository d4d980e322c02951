"""How do the ESS of tokens and the ESS of completions of quantized rollouts fall with the length?

AIS (arXiv 2605.13907, read from a summary) reports for LLaDA-8B on GSM8K that the effective sample size (ESS) of
uncorrected FP8 rollouts falls from above 0.95 to below 0.70 during RL. Two numbers have this name: that of tokens, and
that of completions, of which each has one weight, the product of its tokens' ratios p(learner) / p(copy). Which of the
two can it be, and at which length?

The model is SmolLM2-135M, made a masked-diffusion model and trained on the prose of Python's documentation
(`pydoc_data.topics` of the Python that runs this), all of it in bf16: 60 steps of supervised training on rows of some
200 tokens, adapters of rank 16. A fifth of the topics is held out: prompts are pieces of 32 tokens of them, one
completion for each, the same prompts in every cell. Completions of 16, 32, 64, 128, 256 and 512 tokens are sampled at
temperature 1, 16 tokens a step (16 tokens are therefore one step, 512 are 32 steps) without an end token. The copy
samples, and the learner scores each token at the state in which the copy wrote it. Formats are of the weights alone,
but "FP8 with inputs", which is what an FP8 kernel computes, and "bf16", which is the same weights in bf16 beside a
learner in fp32. Orders are `RandomOrder` and `MaxProb`; under `MaxProb` the learner would write other positions than
the copy does, of which no ratio here says anything. FP8 is measured at all lengths in both orders, bf16 in random order
up to 256 tokens, the others at 16 and 64.

"After RL" is after 12 steps of GRPO on uncorrected FP8 rollouts: 4 prompts of 8 completions of 32 tokens, at 5e-4
(not tuned). The reward is the share of a completion's characters that are in words of the documentation.

ESS is (sum of w)^2 / (N sum of w^2). That of N completions is at least 1 / N, and is too high where few large weights
are rare, so that the number of them decides what it says; other numbers stand beside it. `mean weight` has the mean 1
if enough completions are drawn. `sd of the sum` is the
standard deviation of a completion's log-weight, `Gaussian` is exp(-sd^2), which the ESS would be if this weight were
Gaussian, and `independent` is the ESS of tokens to the power of the length, which it would be if tokens were
independent. `mean ratio` is the ESS of the geometric mean of a completion's ratios. `largest` is the largest difference
of a token's log-probs, `first step` the share of the sum of their squares that the first 16 tokens have, which are
written while all are masked, and `later` the root mean square of those after it. Intervals (95 %) are of a bootstrap
over prompts; that of a completion ESS near 1 / N is too narrow.

Claims, of FP8 in both orders before RL unless they say otherwise, by the bootstrap, two-sided, with Holm's correction:

1. the ESS of completions falls: it is higher at 16 than at 128 tokens (one claim for each order);
2. the ESS of tokens does not: at 128 tokens it is not more than 0.05 below that at 16 (one for each order);
3. at 128 tokens the ESS of completions is below 0.70, AIS's number, and that of tokens above it (two for each order);
4. the ESS of tokens in `MaxProb` order is above that in random order, at 128 tokens;
5. after RL the ESS of tokens in random order is not more than 0.05 below that before, at 128 tokens.

Known before the claims, from tries of at most four completions:
- Another checkpoint of such a training, after headings as prompts: the ESS of tokens was 0.85 (random, 64 tokens),
  0.92 (`MaxProb`, 64) and 0.93 (random, 512), and log-weights of completions of 64 tokens were -36, -13, -1 and 1.
- The same checkpoint, with prompts as here: 0.96 (FP8, 16 tokens); of 64 tokens in random order 0.95 (FP8), 0.89 (FP8
  with inputs), 0.69 (NVFP4), 0.52 (INT4). The sd of the sum was 1.0 (FP8, 16) and 1.9 (FP8, 64).
- Unquantized rollouts agree to the bit with a learner in bf16.
- After two supervised steps: 0.92 (FP8, 16 tokens) and 0.997 (bf16), and 0.85 after two RL steps from there.

    python -m recipes.studies.ess_by_length            half an hour of a core: what is missing, ess_by_length.json
    python -m recipes.studies.ess_by_length --report   run nothing: the tables of ess_by_length.json
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import exp
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from dllm_rl import (
    NVFP4,
    SFT,
    FakeQuantize,
    Float8WeightOnly,
    Int4WeightOnly,
    MaxProb,
    NoCorrection,
    Policy,
    Problem,
    Reward,
    Unmask,
    load_policy,
)
from dllm_rl.decoding.tokens import text_ids
from dllm_rl.diagnostics.trace_check import replayed
from dllm_rl.files import read_json, write_json
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import Scheme
from dllm_rl.rng import generator_for
from dllm_rl.samplers.rules import RandomOrder
from dllm_rl.training.fine_tune import fine_tune
from dllm_rl.training.trainer import train
from dllm_rl.types import Prompts
from recipes import smollm2_diffusion, smollm2_diffusion_sft
from recipes.studies.late_rollouts import QUIET
from recipes.studies.paired import holm, markdown

STORED = Path(__file__).with_suffix(".json")
RUNS = Path("runs/ess-by-length")
TOKENS_PER_STEP, PROMPT, RESAMPLES = 16, 32, 4000
NUM_COMPLETIONS = {16: 64, 32: 48, 64: 32, 128: 32, 256: 12, 512: 6}
WORD = re.compile(r"[A-Za-z]{2,}")
FORMATS: dict[str, Scheme | None] = {
    "FP8": Float8WeightOnly(dequantized=True),
    "FP8 with inputs": FakeQuantize(weight="e4m3", activation="e4m3"),
    "INT4": Int4WeightOnly(),
    "NVFP4": NVFP4(),
    "bf16": None,  # beside a learner in fp32
}
ORDERS = {"random": RandomOrder(), "MaxProb": MaxProb()}
AIS_LATE, MARGIN = 0.70, 0.05
Key = tuple[str, str, str, int]  # when, format, order, length


@cache
def prose(held_out: bool) -> list[str]:
    """The paragraphs of each topic, joined; without code, grammar, lists and headings. A fifth is held out."""
    chosen = [topics[name] for name in sorted(topics) if (crc32(name.encode()) % 5 == 0) == held_out]
    paragraphs = ([part for part in text.split("\n\n") if part[:1].isalpha() and len(part) > 80] for text in chosen)
    return [" ".join(" ".join(parts).split()) for parts in paragraphs]


def pieces(texts: Sequence[str], num_words: int) -> list[str]:
    """The texts cut into pieces of so many words."""
    found = []
    for words in map(str.split, texts):
        found += [" ".join(words[i : i + num_words]) for i in range(0, len(words) - num_words + 1, num_words)]
    return found


@cache
def vocabulary() -> set[str]:
    return set(WORD.findall(" ".join(prose(held_out=False))))


@dataclass(frozen=True)
class Words:
    """Go on with a text: the reward is the share of characters that are in words of the documentation."""

    name, version = "words", "1"
    held_out: bool
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        return Problem(pieces(prose(self.held_out), 12)[index])

    def reward(self, problem: Problem, completion: str) -> Reward:
        covered = sum(len(word) for word in WORD.findall(completion) if word in vocabulary())
        return Reward(covered / max(len(completion), 1), True)


def in_bfloat16() -> Policy:
    """The converted model, with weights in bf16."""
    policy = smollm2_diffusion_sft.smollm2_diffusion()
    policy.module.to(torch.bfloat16)
    return policy


SUPERVISED: SFT = replace(
    smollm2_diffusion_sft.recipe,
    name="ess-by-length-sft",
    model=in_bfloat16,
    dataset=[{"text": piece} for piece in pieces(prose(held_out=False), 140)],
    eval_dataset=[{"text": piece} for piece in pieces(prose(held_out=True), 140)[:8]],
    max_length=None,
    completion_length=None,
    train_batch_size=4,
    num_steps=60,
    eval_steps=0,
    save_steps=60,
    output_dir=str(RUNS / "sft"),
    resume_from_checkpoint="latest",
)
SAMPLER = Unmask(max_new_tokens=32, diffusion_steps=2, rank=RandomOrder(), temperature=1.0, suppress=(0, 2))
RL = replace(
    smollm2_diffusion.recipe,
    **QUIET,
    name="ess-by-length-rl",
    dtype="bfloat16",
    task=Words(held_out=False, size=400),
    validation_task=Words(held_out=True, size=4),
    eval_task=Words(held_out=True, size=4),
    sampler=SAMPLER,
    eval_sampler=SAMPLER,
    rollout_quantization=Float8WeightOnly(dequantized=True),
    corrector=NoCorrection(),
    beta=0.0,
    train_batch_size=4,
    num_steps=12,
    output_dir=str(RUNS / "rl"),
    resume_from_checkpoint="latest",
)


@dataclass(frozen=True)
class Cell:
    """What is measured together: `rows` are of completions, each with its number of tokens, the sums of d, d^2, rho and
    rho^2, the sum of d^2 in the first step alone, and the largest |d|.

    d = log p(learner) - log p(copy) of a token in nats, rho = exp(d).
    """

    when: str
    format: str
    order: str
    length: int
    rows: tuple[tuple[float, ...], ...] = ()

    @property
    def key(self) -> Key:
        return self.when, self.format, self.order, self.length


def plan() -> list[Cell]:
    """The cells in the order in which they are run: what comes last is what is missing if the time ends."""
    orders = tuple(ORDERS)
    cells = [Cell("before", "FP8", order, length) for length in (16, 32, 64, 128) for order in orders]
    cells += [Cell("before", name, "random", length) for length in (16, 64) for name in FORMATS]
    cells += [Cell("after", "FP8", order, length) for length in (16, 64, 128) for order in orders]
    cells += [Cell("before", "FP8", order, 256) for order in orders]
    cells += [Cell("before", "FP8", order, 512) for order in orders]
    cells += [Cell("before", "bf16", "random", length) for length in (32, 128, 256)]
    cells += [Cell("before", name, "MaxProb", 64) for name in FORMATS]
    return list({cell.key: cell for cell in cells}.values())


def prompts_of(policy: Policy) -> list[list[int]]:
    """The first tokens of pieces of the held-out topics, one piece for each completion."""
    found = [text_ids(policy, piece)[:PROMPT] for piece in pieces(prose(held_out=True), 40)]
    return [ids for ids in found if len(ids) == PROMPT][: max(NUM_COMPLETIONS.values())]


@torch.no_grad()
def measure(policy: Policy, copy: Policy, cell: Cell) -> Cell:
    """Sample the cell's completions from the copy, and score them under the policy."""
    length = cell.length
    sampler = SAMPLER.replace(max_new_tokens=length, diffusion_steps=length // TOKENS_PER_STEP, rank=ORDERS[cell.order])
    ids = prompts_of(policy)[: NUM_COMPLETIONS[length]]
    batch_size = max(1, 2048 // (PROMPT + length))
    rows: list[tuple[float, ...]] = []
    for first in range(0, len(ids), batch_size):
        seeds = list(range(first, min(first + batch_size, len(ids))))
        prompts = Prompts.from_ids([ids[i] for i in seeds], pad_id=policy.pad_id, seeds=seeds)
        rollout = sampler(copy, prompts, generator_for(0, "ess by length"))
        recorded, learner = replayed(policy, rollout)
        for d, step, mask in zip(
            (learner - recorded).double(), rollout.unmask_step, rollout.completion_mask, strict=True
        ):
            rows.append(sums_of(d[mask], step[mask] == 0))
    return replace(cell, rows=tuple(rows))


def sums_of(d: Tensor, first: Tensor) -> tuple[float, ...]:
    """What `Cell.rows` has of a completion, from the d of its tokens; `first` marks those of the first step."""
    rho, square = d.exp(), d.square()
    sums = (d.sum(), square.sum(), rho.sum(), rho.square().sum(), square[first].sum(), d.abs().max())
    return (len(d), *(float(f"{each.item():.6g}") for each in sums))


# Statistics of a cell's rows (..., N, 7), over N; so that a bootstrap is one call.
def token_ess(rows: Tensor) -> Tensor:
    tokens, rho, square = (rows[..., i].sum(-1) for i in (0, 3, 4))
    return rho.square() / (tokens * square)


def ess(log_weights: Tensor) -> Tensor:
    """The ESS of weights (..., N), over their number."""
    weights = (log_weights - log_weights.amax(-1, keepdim=True)).exp()
    return weights.sum(-1).square() / (weights.shape[-1] * weights.square().sum(-1))


def completion_ess(rows: Tensor) -> Tensor:
    return ess(rows[..., 1])


def mean_weight(rows: Tensor) -> Tensor:
    return rows[..., 1].exp().mean(-1)


def mean_ratio_ess(rows: Tensor) -> Tensor:
    return ess(rows[..., 1] / rows[..., 0])


def token_sd(rows: Tensor) -> Tensor:
    tokens, total, square = (rows[..., i].sum(-1) for i in range(3))
    return (square / tokens - (total / tokens).square()).sqrt()


def sum_sd(rows: Tensor) -> Tensor:
    return rows[..., 1].std(-1)


Statistic = Callable[[Tensor], Tensor]


def resampled(cell: Cell, of: Statistic) -> Tensor:
    """The statistic of RESAMPLES bootstrap samples of the completions."""
    rows = torch.tensor(cell.rows, dtype=torch.float64)
    generator = torch.Generator().manual_seed(crc32(repr(cell.key).encode()))
    return of(rows[torch.randint(len(rows), (RESAMPLES, len(rows)), generator=generator)])


def value(cell: Cell, of: Statistic) -> float:
    return of(torch.tensor(cell.rows, dtype=torch.float64)).item()


def between(samples: Tensor) -> str:
    """The 95 % interval of a bootstrap's samples."""
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"[{low:.2f}, {high:.2f}]"


def shown(cell: Cell, of: Statistic) -> str:
    """The statistic with its 95 % interval."""
    return f"{value(cell, of):.2f} {between(resampled(cell, of))}"


def small(number: float) -> str:
    return f"{number:.2f}" if number >= 0.005 else "<0.005"


def later(cell: Cell) -> str:
    """The root mean square of d after the first step."""
    if cell.length == TOKENS_PER_STEP:
        return "-"
    squares = sum(row[2] - row[5] for row in cell.rows)
    return f"{(squares / len(cell.rows) / (cell.length - TOKENS_PER_STEP)) ** 0.5:.2f}"


def cell_rows(cells: Sequence[Cell]) -> list[dict[str, str]]:
    rows = []
    for cell in cells:
        tokens, deviation = value(cell, token_ess), value(cell, sum_sd)
        rows.append(
            {
                "rollouts": cell.format,
                "order": cell.order,
                "tokens": str(cell.length),
                "N": str(len(cell.rows)),
                "ESS of tokens": shown(cell, token_ess),
                "ESS of completions": shown(cell, completion_ess),
                "mean weight": small(value(cell, mean_weight)),
                "Gaussian": small(exp(-(deviation**2))),
                "independent": small(tokens**cell.length),
                "mean ratio": f"{value(cell, mean_ratio_ess):.2f}",
                "sd of a token": f"{value(cell, token_sd):.2f}",
                "sd of the sum": f"{deviation:.2f}",
                "largest": f"{max(row[6] for row in cell.rows):.1f}",
                "first step": f"{sum(row[5] for row in cell.rows) / sum(row[2] for row in cell.rows):.2f}",
                "later": later(cell),
            }
        )
    return rows


def of_fp8(order: str, length: int, when: str = "before") -> Key:
    return when, "FP8", order, length


@dataclass(frozen=True)
class Claim:
    """What is above 0 where it holds: a number plus the terms (sign, cell, statistic)."""

    text: str
    number: float
    terms: tuple[tuple[int, Key, Statistic], ...]

    def value(self, of: Callable[[Key, Statistic], Any]) -> Any:
        return self.number + sum(sign * of(key, statistic) for sign, key, statistic in self.terms)


CLAIMS: list[Claim] = []
for _order in ORDERS:
    _short, _long = of_fp8(_order, 16), of_fp8(_order, 128)
    CLAIMS += [
        Claim(
            f"{_order}: the ESS of completions is higher at 16 than at 128 tokens",
            0.0,
            ((1, _short, completion_ess), (-1, _long, completion_ess)),
        ),
        Claim(
            f"{_order}: the ESS of tokens is at most {MARGIN} lower at 128 than at 16 tokens",
            MARGIN,
            ((1, _long, token_ess), (-1, _short, token_ess)),
        ),
        Claim(f"{_order}, 128 tokens: the ESS of completions is below 0.70", AIS_LATE, ((-1, _long, completion_ess),)),
        Claim(f"{_order}, 128 tokens: the ESS of tokens is above 0.70", -AIS_LATE, ((1, _long, token_ess),)),
    ]
CLAIMS += [
    Claim(
        "128 tokens: the ESS of tokens is higher in MaxProb than in random order",
        0.0,
        ((1, of_fp8("MaxProb", 128), token_ess), (-1, of_fp8("random", 128), token_ess)),
    ),
    Claim(
        f"random, 128 tokens: the ESS of tokens is at most {MARGIN} lower after RL",
        MARGIN,
        ((1, of_fp8("random", 128, "after"), token_ess), (-1, of_fp8("random", 128), token_ess)),
    ),
]


def claim_rows(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """The claims whose cells have been run."""
    stored = {cell.key: cell for cell in cells}
    found = []
    for claim in CLAIMS:
        if not all(key in stored for _, key, _ in claim.terms):
            continue
        number = claim.value(lambda key, statistic: value(stored[key], statistic))
        samples = claim.value(lambda key, statistic: resampled(stored[key], statistic))
        tail = min((samples <= 0).double().mean().item(), (samples >= 0).double().mean().item())
        found.append((claim, f"{number:.2f} {between(samples)}", min(1.0, 2 * max(tail, 1 / RESAMPLES))))
    tests = holm([p for *_, p in found])
    return [
        {"stated before the runs": claim.text, "above 0 if it holds, 95 %": told, "Holm's p": f"{p:.3f}"}
        for (claim, told, _), p in zip(found, tests, strict=True)
    ]


def training_rows(steps: Sequence[dict[str, float]]) -> list[dict[str, str]]:
    """The RL run in four parts: the rewards of its rollouts, and the ESS of their tokens, means over the steps."""
    rows = []
    for quarter in range(4):
        first, end = (len(steps) * each // 4 for each in (quarter, quarter + 1))
        part = steps[first:end]
        rows.append(
            {
                "steps": f"{first + 1} to {end}",
                "reward": f"{mean(step['reward'] for step in part):.3f}",
                "ESS of tokens": f"{mean(step['rollout_corr/ess'] for step in part):.2f}",
                "least of a step": f"{min(step['rollout_corr/ess'] for step in part):.3f}",
                "mean abs log ratio": f"{mean(step['rollout_corr/abs_log_ratio_mean'] for step in part):.2f}",
            }
        )
    return rows


def load() -> dict[str, Any]:
    return read_json(STORED) if STORED.exists() else {"cells": []}


def cells_of(stored: dict[str, Any]) -> list[Cell]:
    """The cells that have been run, in a table's order."""
    cells = [Cell(*cell[:4], tuple(map(tuple, cell[4]))) for cell in stored["cells"]]
    places = {name: place for place, name in enumerate((*FORMATS, *ORDERS))}
    return sorted(cells, key=lambda cell: (cell.when != "before", places[cell.format], places[cell.order], cell.length))


def trained(recipe: Any, train_fn: Callable[[Any], Any]) -> dict[str, Any]:
    """The summary of a run, which is run where it has not ended."""
    path = Path(recipe.output_dir) / "summary.json"
    return read_json(path) if path.exists() else train_fn(recipe)


def checkpoint(when: str, stored: dict[str, Any]) -> str:
    """The model before or after RL, made where it is not there; what its training left goes into `stored`."""
    summary = trained(SUPERVISED, fine_tune)
    stored["sft"] = {name: found for name, found in summary.items() if name.startswith("eval")}
    if when == "after":
        summary = trained(replace(RL, model=summary["checkpoint"]), train)
        names = ("reward", "rollout_corr/ess", "rollout_corr/chi2_seq", "rollout_corr/abs_log_ratio_mean")
        steps = read_metrics(RUNS / "rl")
        stored["rl"] = [{name: round(step[name], 4) for name in names} for step in steps if "reward" in step]
    return summary["checkpoint"]


def complete() -> None:
    """Run what is missing, and store each cell when it is done."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")  # the head's products; relative errors are below 1e-6
    stored = load()
    done = {cell.key for cell in cells_of(stored)}

    @cache
    def weights(when: str, dtype: torch.dtype) -> Policy:
        return load_policy(checkpoint(when, stored), dtype=dtype)

    @cache
    def copy_of(when: str, name: str) -> Policy:
        scheme, policy = FORMATS[name], weights(when, torch.bfloat16)
        return policy if scheme is None else quantized_copy(policy, scheme.config())

    for cell in plan():
        if cell.key not in done:
            learner = weights(cell.when, torch.float32 if FORMATS[cell.format] is None else torch.bfloat16)
            measured = measure(learner, copy_of(cell.when, cell.format), cell)
            stored["cells"].append([*measured.key, measured.rows])
            write_json(STORED, stored)
            print(*measured.key, *list(cell_rows([measured])[0].values())[3:], flush=True)


def page_tables() -> dict[str, str]:
    stored = load()
    cells = cells_of(stored)
    tables = {when: markdown(cell_rows([cell for cell in cells if cell.when == when])) for when in ("before", "after")}
    tables["claims"] = markdown(claim_rows(cells))
    return tables | ({"training": markdown(training_rows(stored["rl"]))} if "rl" in stored else {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    if not parser.parse_args().report:
        complete()
    for name, table in page_tables().items():
        print(f"{name}\n\n{table}")
