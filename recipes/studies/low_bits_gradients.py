"""What do four-bit rollouts do to the policy gradient of a pretrained diffusion model: bias, noise, or worse samples?

The model, the int4 scheme and the settings are those of low_bits.py, at the checkpoint of smollm2_diffusion_sft.py,
where training begins; a batch has 4 prompts of 8 completions. For each of 32 batches the same prompts are completed by
the learner's own weights and by the int4 copy; then every corrector makes the gradient of the int4 completions. A
corrector can only mend the first of three numbers:

    bias      squared distance of the mean gradient from that of the learner's own completions, as a share of the
              latter's squared norm; 0 is none, and 1 is as far as no gradient at all
    noise     mean squared distance of a batch's gradient from its mean, as a share of the same
    reward    mean reward of the int4 copy's completions less that of the learner's

Squared norms of means are unbiased: products of two different batches alone count. Intervals (95 %) are of a jackknife
over batches, also those of the difference from `int4`, batch by batch.

A first run, of the batches 0 to 31, had bias 1.8±2.2 without a corrector, 0.00±0.24 with TIS, 0.04±0.29 with AIS,
1.8±2.2 with permuted AIS and 2.0±2.3 with the aligned forward; cosines 0.30, 1.04, 1.02, 0.28 and -0.04. It did not
store what differences need. This run has the batches 32 to 63. Claims before it: the cosines of TIS and of AIS are
above that of no corrector; those of permuted AIS and of the aligned forward are not.

More cases, of the same batches, whose claims were written before their runs:

    again          the start once more, on the machine and from the checkpoint of the cases below (another machine made
                   `start`, and another checkpoint)
    after_rl       after 48 steps of RL with unquantized rollouts, seed 100, at the rate that low_bits_tuned.py chose
                   for them; after_rl_101 is seed 101
    max_prob       at the start, sampled in `MaxProb` order, which an int4 copy changes, instead of random order

In each of these the cosines of TIS and of AIS are above that of no corrector; and TIS's cosine is lower in max_prob
than in `again`. Nine claims, whose intervals (`CLAIMED`) are those of Bonferroni's correction over nine. Known before
the runs: under `MaxProb` the learner would begin with other positions than the int4 copy in 0.06 of the rows of the
first eight batches; the second of two steps leaves no choice. Stored with them: how often the learner would have
unmasked the copy's positions first (`order_agreement`), and accuracy around RL.

    python recipes/smollm2_diffusion_sft.py
    python -m recipes.studies.low_bits_gradients             25 minutes of a core, low_bits_gradients.json, the table
    python -m recipes.studies.low_bits_gradients again       or another case: low_bits_gradients_again.json
    python -m recipes.studies.low_bits_gradients --report    the table of low_bits_gradients.json
    python -m recipes.studies.low_bits_gradients claims      those of the other cases, from their files
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_rl import AIS, TIS, Aligned, Int4WeightOnly, MaxProb, NoCorrection, Recipe
from dllm_rl.algorithms.correctors import Corrector
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.files import read_json, write_json
from dllm_rl.models.base import trainable_parameters
from dllm_rl.models.lora import add_lora
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.step.collect import collect
from dllm_rl.step.context import StepContext
from dllm_rl.step.correct import make_batches
from dllm_rl.step.score import score_samples
from dllm_rl.step.update import forward_backward
from dllm_rl.training.make_step import make_step
from dllm_rl.training.policies import build_policy
from dllm_rl.training.trainer import train
from recipes.studies.controls import Permuted
from recipes.studies.low_bits import STUDY, WORDS
from recipes.studies.low_bits_tuned import STORED as TUNED
from recipes.studies.low_bits_tuned import here
from recipes.studies.paired import in_words, interval, markdown, student_t, which

CASES = ("start", "again", "after_rl", "after_rl_101", "max_prob")
CLAIMED = 2.981 / 2.040  # half-widths of Bonferroni's 1 - 0.05 / 9 over those of 95 %: Student's t with 31 degrees
BATCHES = range(32, 64)
AGREEMENT = "rollout_corr/order_agreement"
BASELINE = "int4"
OWN = "learner's own completions"
CORRECTORS: dict[str, Corrector] = {
    "int4": NoCorrection(),
    "int4, tis": TIS(),
    "int4, ais": AIS(),
    "int4, permuted ais": Permuted(corrector=AIS()),
    "int4, aligned": Aligned(),
}


def gradient(run: StepContext, samples: Any, number: int) -> tuple[Tensor, dict[str, float]]:
    """Return the gradient of the batch's loss for all trained weights, flat, and the metrics of its mismatch."""
    trained = trainable_parameters(run.policy.module)
    with run.arithmetic(learner=True):
        scored = score_samples(run, samples, number)
        (batch, *_), metrics = make_batches(run, scored)
        settings = run.settings.update_settings(number)
        forward_backward(run.policy, batch, batch.old_view_logprobs, loss=settings.loss, likelihood=settings.likelihood)
    flat = torch.cat([weight.grad.flatten() for weight in trained if weight.grad is not None])
    for weight in trained:
        weight.grad = None
    return flat, metrics


def stored_path(case: str) -> Path:
    path = Path(__file__).with_suffix(".json")
    return path if case == CASES[0] else path.with_stem(f"{path.stem}_{case}")


def recipe_of(case: str) -> tuple[Recipe, dict[str, Any]]:
    """The settings whose first step is measured, and what to store of how they were made."""
    base, made = STUDY.base, {"machine": here()}
    if case.startswith("after_rl"):
        summary = train(
            replace(
                base,
                rollout_quantization=None,
                learning_rate=read_json(TUNED)["rates"]["unquantized"],
                seed=101 if case.endswith("101") else 100,
                save_merged=True,
                output_dir=f"runs/low-bits-gradients-{case}",
                overwrite_output_dir=True,
            )
        )
        made |= {when: summary[when][STUDY.metric] for when in ("eval_before", "eval_after")}
        base = replace(base, model=summary["checkpoint"])
    elif case == "max_prob":
        base = replace(base, sampler=base.sampler.replace(rank=MaxProb()))
    return replace(base, seed=0, train_batch_size=4), made


def measure(recipe: Recipe, numbers: range) -> tuple[dict[str, Tensor], dict[str, list[float]], list[float]]:
    """By arm the gradients (M, D) of the batches, by sampler their mean rewards, and the order's agreement by batch."""
    accelerator = make_accelerator()
    policy = build_policy(recipe, accelerator.device)
    add_lora(policy, recipe.lora)
    int4 = quantized_copy(policy, Int4WeightOnly())
    gradients: dict[str, list[Tensor]] = {arm: [] for arm in (OWN, *CORRECTORS)}
    rewards: dict[str, list[float]] = {OWN: [], "int4": []}
    agreement = []

    def context(sampler: Any, **changes: Any) -> StepContext:
        return make_step(replace(recipe, **changes), accelerator=accelerator, policy=policy, rollout_policy=sampler)

    for number in numbers:
        own = context(policy, rollout_quantization=None)
        samples, _, _ = collect(own, number)
        rewards[OWN].append(samples.rewards.mean().item())
        gradients[OWN].append(gradient(own, samples, number)[0])
        samples, _, _ = collect(context(int4, rollout_quantization=Int4WeightOnly()), number)
        rewards["int4"].append(samples.rewards.mean().item())
        for arm, corrector in CORRECTORS.items():
            run = context(int4, rollout_quantization=Int4WeightOnly(), corrector=corrector)
            flat, metrics = gradient(run, samples, number)
            gradients[arm].append(flat)
            if arm == BASELINE and AGREEMENT in metrics:  # a random order has none; the aligned forward's is the copy's
                agreement.append(metrics[AGREEMENT])
        print(f"batch {number}", flush=True)
    return {arm: torch.stack(each) for arm, each in gradients.items()}, rewards, agreement


def jackknife(statistic: Callable[[list[int]], float], num_batches: int) -> tuple[float, float]:
    """A statistic of all batches, and the half-width of its 95 % interval from those of all but one batch."""
    every = list(range(num_batches))
    without = torch.tensor([statistic([i for i in every if i != left]) for left in every], dtype=torch.float64)
    deviation = ((num_batches - 1) / num_batches * (without - without.mean()).square().sum()).sqrt().item()
    return statistic(every), student_t(num_batches) * deviation


def mean_product(products: Tensor, batches: list[int]) -> float:
    """The product of two means, from the products (M, M) of all pairs of different batches."""
    chosen = products[batches][:, batches]
    n = len(batches)
    return ((chosen.sum() - chosen.diagonal().sum()) / (n * (n - 1))).item()


def cosine_of(products: dict[str, Tensor], cross: dict[str, Tensor], arm: str, batches: list[int]) -> float:
    """The cosine of an arm's mean gradient with the learner's own; NaN if a product of different batches is below 0."""
    lengths = mean_product(products[arm], batches) * mean_product(products[OWN], batches)
    return mean_product(cross[arm], batches) / lengths**0.5 if lengths > 0 else float("nan")


def rows_of(products: dict[str, Tensor], cross: dict[str, Tensor]) -> list[dict[str, Any]]:
    """By arm bias, cosine, noise and the cosine's difference from BASELINE, each with its interval.

    Args:
        products: By arm the inner products (M, M) of its batches' gradients.
        cross: By arm the inner products (M, M) of its batches with the learner's own.
    """

    def scale(batches: list[int]) -> float:
        return mean_product(products[OWN], batches)

    def bias(arm: str, batches: list[int]) -> float:
        own = scale(batches)
        return (mean_product(products[arm], batches) - 2 * mean_product(cross[arm], batches)) / own + 1

    def noise(arm: str, batches: list[int]) -> float:
        mean_square = products[arm].diagonal()[batches].mean().item()
        return (mean_square - mean_product(products[arm], batches)) / scale(batches)

    def cosine(arm: str, batches: list[int]) -> float:
        return cosine_of(products, cross, arm, batches)

    def gain(arm: str, batches: list[int]) -> float:
        return cosine(arm, batches) - cosine(BASELINE, batches)

    count = len(products[OWN])
    return [
        {"arm": arm} | {f.__name__: jackknife(partial(f, arm), count) for f in (bias, cosine, gain, noise)}
        for arm in products
    ]


def rounded(products: Tensor) -> list[list[float]]:
    return [[float(f"{product:.7g}") for product in row] for row in products.tolist()]


def shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value[0]:z.2f}±{value[1]:.2f}"


def matrices(stored: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The products and cross products of a stored run."""
    products, cross = (
        {arm: torch.tensor(matrix, dtype=torch.float64) for arm, matrix in stored[kind].items()}
        for kind in ("products", "cross")
    )
    return products, cross


HEADS = {"cosine": "cosine", "gain": "gain of cosine", "bias": "squared error", "noise": "noise"}


def table(stored: dict[str, Any]) -> str:
    """Return the table of a stored run."""
    rows = rows_of(*matrices(stored))
    return markdown(
        [{"gradient": WORDS[row["arm"]]} | {head: shown(row[key]) for key, head in HEADS.items()} for row in rows]
    )


def claim_rows(stored: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The claims of the cases behind `start`, from their stored runs, with Bonferroni's intervals."""
    found = {}
    for case in CASES[1:]:
        gains = {row["arm"]: row["gain"] for row in rows_of(*matrices(stored[case]))}
        found |= {f"{case}: {arm} above no corrector": gains[arm] for arm in ("int4, tis", "int4, ais")}
    random, deterministic = matrices(stored["again"]), matrices(stored["max_prob"])

    def lower(batches: list[int]) -> float:
        return cosine_of(*random, "int4, tis", batches) - cosine_of(*deterministic, "int4, tis", batches)

    found["int4, tis: again above max_prob"] = jackknife(lower, len(BATCHES))
    return [
        {"claim": said_of_case(claim), "difference": shown((value, CLAIMED * half))}
        | {"by itself": shown((value, half))}
        | {"verdict": "shown" if value > CLAIMED * half else "not shown"}
        for claim, (value, half) in found.items()
    ]


def said_of_case(claim: str) -> str:
    """A claim in the words of the page."""
    changes = {
        "int4, tis: again above max_prob": (
            "TIS: the cosine is higher in random order (the start, again) than under `MaxProb`"
        ),
        "int4, tis above": "TIS is better than",
        "int4, ais above": "AIS is better than",
    }
    case, colon, rest = in_words(claim, changes).partition(": ")
    return NAMES.get(case, case) + colon + rest


NAMES = {  # of the cases, on the page
    "again": "the start, again",
    "after_rl": "after RL, seed 100",
    "after_rl_101": "after RL, seed 101",
    "max_prob": "the start, `MaxProb`",
}


def case_rows(stored: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """By case the cosine of each arm, and what was stored with it."""
    rows = []
    for case in CASES[1:]:
        cosines = {row["arm"]: shown(row["cosine"]) for row in rows_of(*matrices(stored[case]))}
        agreement = stored[case]["agreement"]
        rows.append(
            {"case": NAMES[case]}
            | {WORDS[arm].removeprefix("INT4, "): cosines[arm] for arm in CORRECTORS}
            | {"reward": lost_reward(stored[case]), "same first positions": interval(agreement) if agreement else "-"}
        )
    return rows


def lost_reward(stored: dict[str, Any]) -> str:
    """Return the mean reward of the int4 completions less that of the learner's own, with its interval."""
    int4, unquantized = stored["rewards"]["int4"], stored["rewards"][OWN]
    return interval([after - before for after, before in zip(int4, unquantized, strict=True)])


def report(case: str) -> None:
    """Print the table and the lost reward of the stored run."""
    stored = read_json(stored_path(case))
    print(table(stored))
    print("reward", lost_reward(stored))
    if stored.get("agreement"):
        print("order agreement", interval(stored["agreement"]))


def main(case: str) -> None:
    torch.set_num_threads(1)
    recipe, made = recipe_of(case)
    gradients, rewards, agreement = measure(recipe, BATCHES)
    own = gradients[OWN]
    kept = {
        "products": {arm: rounded(each @ each.T) for arm, each in gradients.items()},
        "cross": {arm: rounded(each @ own.T) for arm, each in gradients.items()},
    }
    numbers = {"batches": [BATCHES.start, BATCHES.stop], "rewards": rewards, "agreement": agreement}
    write_json(stored_path(case), made | numbers | kept)
    report(case)


def page_tables() -> dict[str, str]:
    cases = {case: read_json(stored_path(case)) for case in CASES[1:]}
    return {
        "arms": table(read_json(stored_path(CASES[0]))),
        "cases": markdown(case_rows(cases)),
        "claims": markdown(claim_rows(cases)),
    }


if __name__ == "__main__":
    case = which((*CASES, "claims"))
    if case == "claims":
        for rows in (case_rows, claim_rows):
            print(markdown(rows({case: read_json(stored_path(case)) for case in CASES[1:]})))
    else:
        report(case) if "--report" in sys.argv else main(case)
