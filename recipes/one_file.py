"""Reinforcement learning of a masked diffusion language model, from top to bottom in one file. Read this one first.

    python recipes/one_file.py

A masked diffusion language model reads a text with masked positions, and gives a distribution over tokens for each of
them. It writes an answer by filling in some of the masks in each step, in any order. Here a small model learns 4x4
Sudoku from rewards, after a short supervised warm-up. A step of the loop (`train`, below) has six stages:

    1. rollout     A copy of the model with FP8 weights completes each of P puzzles G times by iterative unmasking
                   (LLaDA, arXiv 2502.09992, algorithm 5). It records the tokens, the step that wrote each of them, and
                   their log-probs.
    2. advantages  The task grades the completions. Each is compared with the others of its puzzle (GRPO).
    3. likelihood  The learner, which is the model in fp32, replays the recorded steps: its log-probs of these tokens.
    4. correction  The two log-probs of a token differ, because FP8 rounds the weights. Importance weights account for
                   the difference (AIS).
    5. update      PPO's clipped ratio and AdamW.
    6. sync        The new weights are quantized for the next rollout.

`dllm_rl.train` has the same stages, and each part can be exchanged. tests/recipes/test_one_file.py runs 10 steps of
both: they write the same tokens, get the same rewards, and agree on log-probs and weights. What this file leaves out:

    dllm_rl/samplers       LLaDA's own rank `Confidence` (the probability of the token that was drawn) and the
                           probability of the order, which that rank needs (docs/sampler.md); blocks, caches, prompts of
                           unequal lengths, infilling, temperature, top-p, samplers that revise what they wrote
    dllm_rl/likelihoods    estimates that take fewer forwards than the rollout: one_step, ELBOs, merged steps
    dllm_rl/algorithms     other correctors (TIS, IcePop, TBPO), losses and advantages; a KL term; mismatch metrics
    dllm_rl/quantization   INT8, INT4, FP8 products on a GPU, weights quantized in place, aligned forwards (QaRL)
    dllm_rl/models         real checkpoints (LLaDA, Dream, SDAR), LoRA, the logits of 126,000 tokens in chunks
    dllm_rl/training       micro-batches, learning-rate schedules, bf16, dynamic sampling
    dllm_rl/distributed, checkpoints, monitoring, evaluation   several GPUs; stop and resume; logs; greedy evaluation

The axes of a tensor are the suffix of its name: P puzzles, G completions of each, B = P * G rows (row p * G + g), R
rows that the update learns from, S prompt positions, L completion positions, T = S + L, K positions of all rows
together, V tokens of the vocabulary, D hidden size. Log-probs are in nats.
"""

import argparse
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchao.quantization import Float8WeightOnlyConfig, quantize_

from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.rng import generator_for, row_seeds, uniforms
from dllm_rl.tasks import Sudoku

LENGTH = 16  # L: the cells of a 4x4 grid, one token each


@dataclass(frozen=True)
class Settings:
    """The names are those of `dllm_rl.Recipe`, where it has them."""

    seed: int = 0
    warmup_steps: int = 400  # at most, supervised, before RL
    sft_warmup_target: float = 0.2  # the solve rate that ends the warm-up
    num_steps: int = 100  # of RL
    train_batch_size: int = 32  # P, puzzles per step
    num_generations: int = 8  # G, completions per puzzle
    diffusion_steps: int = 2  # forwards per completion, each of which writes 8 of the 16 cells
    num_iterations: int = 1  # updates per rollout
    learning_rate: float = 5e-4
    max_grad_norm: float = 1.0
    epsilon: float = 0.2  # PPO's clip: how far a ratio may move from 1 and keep its gradient
    cap: float = 2.0  # AIS: the largest importance weight
    tau: float = 0.05  # AIS: the mean |log mismatch|, in nats, that halves the trust in uncorrected rollouts


class Rollout(NamedTuple):
    """What the sampler did, in enough detail to replay it."""

    prompts_BS: Tensor  # token ids
    tokens_BL: Tensor  # token ids of the completions
    unmask_step_BL: Tensor  # the step that wrote each token: 0, 1, ...
    logprobs_BL: Tensor  # of each token when it was drawn, under the policy that drew it; nats


class Step(NamedTuple):
    """What a step of `train` did. `main` prints the metrics; the test compares all of it."""

    rollout: Rollout
    rewards_PG: Tensor
    learned_B: Tensor  # True for the R rows that the update learned from
    old_RL: Tensor  # their tokens' log-probs under the learner, before the update; nats
    metrics: dict[str, float]


# --- The model: a stock transformers class, here RobertaPreLayerNormForMaskedLM --------------------------------------


def logits_at(model: Any, canvas_BT: Tensor, wanted_BL: Tensor, *, copies: int = 1) -> Tensor:
    """Logits (K, V) for the K marked positions of the completions, row by row.

    copies  how many consecutive rows are equal: one forward serves them all
    """
    distinct_BT = canvas_BT[::copies]
    # RoBERTa counts positions from pad_token_id + 1. Left to itself it would not count a position that holds a padding
    # token, and a policy may write one.
    positions_T = torch.arange(canvas_BT.shape[1]) + model.config.pad_token_id + 1
    hidden_BTD = model.base_model(distinct_BT, position_ids=positions_T.expand_as(distinct_BT)).last_hidden_state
    hidden_BTD = hidden_BTD.repeat_interleave(copies, dim=0)
    # The head runs at the wanted positions alone: with LLaDA's 126,000 tokens, logits of all positions fill a GPU.
    return model.lm_head(hidden_BTD[:, -LENGTH:][wanted_BL])


def token_logprobs(logits_KV: Tensor, tokens_K: Tensor) -> Tensor:
    """log p of one token at each of the K positions, nats."""
    return logits_KV.gather(-1, tokens_K[:, None])[:, 0] - logits_KV.logsumexp(-1)


def without_mask(model: Any, logits_KV: Tensor) -> Tensor:
    """The logits of the distribution that tokens are drawn from: a mask is never drawn."""
    return logits_KV.index_fill(-1, torch.tensor(model.config.mask_token_id), -torch.inf)


# --- 1. Rollout ------------------------------------------------------------------------------------------------------


def quantized_copy(model: Any) -> Any:
    """The policy that samples: the model with the linear layers of its blocks in FP8 (e4m3: 4 bits of exponent, 3 of
    mantissa). Each row of a weight has a scale, max |w| / 448, and w / scale is rounded to the nearest FP8 number.

    Rollouts usually take most of the time of RL, and with FP8 a GPU reads half the bytes of BF16. The learner stays in
    fp32, because an update moves a weight by less than a step of FP8. So the two policies disagree: rounding changes a
    weight by up to a sixteenth, and every probability a little. On a CPU only the rounding is real: products take the
    rounded weights in fp32, and no time is saved.

    Embeddings, norms and the head are not quantized: they are small, and an error of the head moves every logit.
    """
    rollout_model = copy.deepcopy(model)
    config = Float8WeightOnlyConfig(set_inductor_config=False)  # True would change torch's settings for all code
    quantize_(rollout_model.base_model.encoder, config)
    return rollout_model


@torch.no_grad()
def unmask(model: Any, prompts_PS: Tensor, seeds_B: Tensor, *, diffusion_steps: int) -> Rollout:
    """Complete every prompt G = B / P times by iterative unmasking. Each row has a seed for its random numbers."""
    copies = len(seeds_B) // len(prompts_PS)
    prompts_BS = prompts_PS.repeat_interleave(copies, dim=0)
    tokens_BL = torch.full((len(seeds_B), LENGTH), model.config.mask_token_id)
    unmask_step_BL = torch.full_like(tokens_BL, -1)
    logprobs_BL = torch.zeros(tokens_BL.shape)
    for step in range(diffusion_steps):
        masked_BL = unmask_step_BL < 0
        canvas_BT = torch.cat([prompts_BS, tokens_BL], dim=1)
        # Before the first token is written, the completions of a prompt look the same to the model.
        logits_KV = logits_at(model, canvas_BT, masked_BL, copies=copies if step == 0 else 1)

        # Which positions to write: those with the highest probability of their best token. This rank (`MaxProb`) is a
        # function of what the model sees. LLaDA ranks by the probability of the token that was drawn. Then a position
        # with an improbable draw tends to stay masked, the kept tokens are no fair sample, and the likelihood needs one
        # more factor (docs/sampler.md).
        rank_BL = torch.full(masked_BL.shape, -torch.inf)
        rank_BL[masked_BL] = logits_KV.amax(-1) - logits_KV.logsumexp(-1)
        num_masked = int(masked_BL[0].sum())  # the same in every row
        count = math.ceil(num_masked / (diffusion_steps - step))  # equal shares for the steps that are left
        best_BC = rank_BL.argsort(dim=-1, descending=True, stable=True)[:, :count]
        picked_BL = torch.zeros_like(masked_BL).scatter(1, best_BC, True)

        # Which tokens: each is drawn from the model's distribution at its position, at temperature 1. Draws of one step
        # do not see each other: two cells of a Sudoku row may both become a 3, although each 3 alone was likely. To
        # write several tokens at once and still agree is what RL teaches here.
        logits_KV = without_mask(model, logits_KV[picked_BL[masked_BL]])
        mass_KV = (logits_KV - logits_KV.amax(-1, keepdim=True)).exp()
        cumulative_KV = mass_KV.double().cumsum(-1)
        # A random number is a function of the row's seed, the step and the position. So a completion does not depend on
        # what else is in the batch, and another program can draw the same one.
        row_K, place_K = picked_BL.nonzero(as_tuple=True)
        uniforms_K = uniforms(seeds_B[row_K], torch.full_like(row_K, step), place_K, stream=0)  # in [0, 1)
        point_K1 = uniforms_K[:, None] * cumulative_KV[:, -1:]
        tokens_K = torch.searchsorted(cumulative_KV, point_K1, right=True)[:, 0]

        tokens_BL[picked_BL] = tokens_K
        logprobs_BL[picked_BL] = token_logprobs(logits_KV, tokens_K)
        unmask_step_BL[picked_BL] = step
    return Rollout(prompts_BS, tokens_BL, unmask_step_BL, logprobs_BL)


# --- 2. Advantages ---------------------------------------------------------------------------------------------------


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """How much better a completion is than the mean of its group, in standard deviations of the group (GRPO).

    The mean of the group takes the place of a value network: which puzzles are hard no longer matters, only which of
    the completions of a puzzle is better. The constant keeps the advantages of nearly equal rewards small.
    """
    return (rewards_PG - rewards_PG.mean(-1, keepdim=True)) / (rewards_PG.std(-1, keepdim=True) + 1e-4)


# --- 3. Likelihood ---------------------------------------------------------------------------------------------------


def trajectory_logprobs(model: Any, rollout: Rollout, *, diffusion_steps: int, group_size: int) -> Tensor:
    """log p (B, L) of each token, given what the sampler saw when it drew this token. Nats, differentiable.

    An autoregressive model gives log p(y) = sum_t log p(y_t | y_<t) in one forward. A masked model has a different
    log p(y_t | visible tokens) for every set of visible tokens, so the set must be known: this is why the rollout
    records the step that wrote each token. Replaying the steps rebuilds each canvas. It takes as many forwards as the
    rollout, and it is exact: given the order, the sum over L is the log-probability of the completion, and a policy
    with the sampler's weights gets the log-probs that the sampler recorded. Random masks take fewer forwards, and give
    a bound of another quantity, log p(y) over all orders.
    """
    logprobs_BL = torch.zeros(rollout.tokens_BL.shape)
    for step in range(diffusion_steps):
        masked_BL = rollout.unmask_step_BL >= step  # when this step began
        written_BL = rollout.unmask_step_BL == step  # by this step
        tokens_BL = rollout.tokens_BL.masked_fill(masked_BL, model.config.mask_token_id)
        canvas_BT = torch.cat([rollout.prompts_BS, tokens_BL], dim=1)
        logits_KV = logits_at(model, canvas_BT, written_BL, copies=group_size if step == 0 else 1)
        logits_KV = without_mask(model, logits_KV)
        logprobs_BL[written_BL] = token_logprobs(logits_KV, rollout.tokens_BL[written_BL])
    return logprobs_BL


# --- 4. Correction ---------------------------------------------------------------------------------------------------


def ais_weights(log_mismatch_RL: Tensor, *, cap: float, tau: float) -> tuple[Tensor, dict[str, float]]:
    """Adaptive importance sampling (AIS, arXiv 2605.13907): a weight (R, L) for each token, and metrics.

    The policy gradient is an expectation over completions of the learner, but the FP8 policy wrote the completions. A
    token that the learner writes more often than the FP8 policy should count more: w = p_learner / p_FP8 is its
    importance weight. (The exact weight is the product over the completion, which varies far more.) Weights are noise,
    too, so AIS applies them to the extent that the policies disagree:

        m = 1 + lambda (min(w, cap) - 1),   lambda = 1 - reliability * tau / (divergence + tau) / (1 + variation)

    lambda is 0 where the policies agree, and rises towards 1. The three measures are the paper's, of which a digest was
    read; how they combine is our choice.
    """
    log_ratio_RL = log_mismatch_RL.double()
    ratio_RL = log_ratio_RL.exp()
    ratio_R = log_ratio_RL.sum(-1).exp()  # of whole completions
    reliability = effective_sample_size(ratio_R)
    divergence = log_ratio_RL.abs().mean().item()  # nats
    variation = (ratio_RL.std(correction=0) / ratio_RL.mean()).item()
    lam = 1 - reliability * tau / (divergence + tau) / (1 + variation)
    weights_RL = torch.lerp(torch.ones_like(log_mismatch_RL), log_mismatch_RL.exp().clamp(max=cap), lam)
    return weights_RL, {"ess": effective_sample_size(ratio_RL.flatten()), "lambda": lam, "mismatch": divergence}


def effective_sample_size(weights_N: Tensor) -> float:
    """(sum w)^2 / (N sum w^2), in (0, 1]: the N weighted samples estimate a mean about as well as ESS * N samples of
    the learner's own would. 1: the policies agree. 0.5: half of the rollout is wasted."""
    return (weights_N.sum().square() / (len(weights_N) * weights_N.square().sum())).item()


# --- 5. Update -------------------------------------------------------------------------------------------------------


def clipped_loss(
    logprobs_RL: Tensor, old_RL: Tensor, advantages_R: Tensor, weights_RL: Tensor, *, epsilon: float, num_tokens: int
) -> Tensor:
    """- sum of m min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) / num_tokens, r = p / p_old (PPO, GRPO).

    There are two ratios. m, of the learner and the FP8 policy, is constant: it says how much a token counts. r, of the
    learner now and before the first update, carries the gradient. In the first update r is 1, and the gradient is that
    of m A log p. In later updates on the same rollout, a token whose r has moved by epsilon in the direction of A loses
    its gradient: the rollout tells little about policies far from the one that wrote it.
    """
    ratio_RL = (logprobs_RL - old_RL).exp()
    advantages_R1 = advantages_R[:, None]  # every token has the advantage of its completion
    objective_RL = torch.minimum(ratio_RL * advantages_R1, ratio_RL.clamp(1 - epsilon, 1 + epsilon) * advantages_R1)
    return -(weights_RL * objective_RL).sum() / num_tokens


# --- The loop --------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids of texts of equal length: a character is a token."""
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False) for text in texts])


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text before the first end token."""
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


def sample_and_grade(
    model: Any, tokenizer: Any, task: Sudoku, indices: Sequence[int], seeds_B: Tensor, settings: Settings
) -> tuple[Rollout, Tensor, float]:
    """A rollout of the puzzles at `indices`, its rewards (P, G), and the share of completions that are solutions.

    A reward is 1 for a solution, plus 4 times the share of cells that agree with it. So completions that are wrong
    differ from each other too, and a model that solves nothing yet has something to learn from.
    """
    problems = [task[index] for index in indices]
    prompts_PS = encode(tokenizer, [problem.prompt for problem in problems])
    rollout = unmask(model, prompts_PS, seeds_B, diffusion_steps=settings.diffusion_steps)
    group_size = len(seeds_B) // len(problems)
    texts = [decode(tokenizer, ids) for ids in rollout.tokens_BL.tolist()]
    graded = [task.reward(problems[row // group_size], text) for row, text in enumerate(texts)]
    rewards_PG = torch.tensor([reward.value for reward in graded]).view(-1, group_size)
    return rollout, rewards_PG, sum(reward.breakdown["solve_rate"] for reward in graded) / len(graded)


def train(model: Any, tokenizer: Any, task: Sudoku, settings: Settings) -> Iterator[Step]:
    """GRPO with FP8 rollouts. Updates `model` in place, and yields what each step did."""
    P = settings.train_batch_size
    G = settings.num_generations
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    rollout_model = quantized_copy(model)
    for step in range(settings.num_steps):
        # 1. Rollout. The random numbers of a step are functions of the seed and the step: no generator has a state.
        indices = torch.randint(len(task), (P,), generator=generator_for(settings.seed, "train", step)).tolist()
        seeds_B = row_seeds(generator_for(settings.seed, "rollout", step), P * G)
        rollout, rewards_PG, solve_rate = sample_and_grade(rollout_model, tokenizer, task, indices, seeds_B, settings)

        # 2. Advantages. A group of equal rewards has none: it teaches nothing, and is not scored.
        advantages_PG = group_advantages(rewards_PG)
        differs_P = (rewards_PG != rewards_PG[:, :1]).any(-1)
        if not differs_P.any():
            continue
        learned_B = differs_P.repeat_interleave(G)
        learned = Rollout(*(field[learned_B] for field in rollout))

        for iteration in range(settings.num_iterations):
            # 3. Likelihood
            logprobs_RL = trajectory_logprobs(model, learned, diffusion_steps=settings.diffusion_steps, group_size=G)
            if iteration == 0:
                # 4. Correction
                old_RL = logprobs_RL.detach()
                weights_RL, mismatch = ais_weights(old_RL - learned.logprobs_BL, cap=settings.cap, tau=settings.tau)
            # 5. Update
            loss = clipped_loss(
                logprobs_RL,
                old_RL,
                advantages_PG[differs_P].flatten(),
                weights_RL,
                epsilon=settings.epsilon,
                num_tokens=P * G * LENGTH,  # of all groups: one that teaches nothing is a 0, not a smaller batch
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()

        # 6. Sync. Otherwise the first step's weights would write all rollouts, and the mismatch would grow.
        rollout_model = quantized_copy(model)
        metrics = {"reward": rewards_PG.mean().item(), "solve_rate": solve_rate} | mismatch
        yield Step(rollout, rewards_PG, learned_B, old_RL, metrics)


# --- Before and after RL ---------------------------------------------------------------------------------------------


def solve_rate_of(model: Any, tokenizer: Any, split: str, settings: Settings) -> float:
    """The share of 400 held-out puzzles that the model solves in one completion each, sampled as in training."""
    task = Sudoku(split=split, clues=(10, 12), size=400)  # splits share no solution
    seeds_B = row_seeds(generator_for(settings.seed, split), len(task))
    return sample_and_grade(model, tokenizer, task, range(len(task)), seeds_B, settings)[2]


def warm_up(model: Any, tokenizer: Any, task: Sudoku, settings: Settings) -> None:
    """Supervised training on solved puzzles, until the model solves some. RL strengthens what a policy already does now
    and then; a model of random weights never solves a puzzle.

    The loss of masked diffusion (LLaDA, eq. 5): t ~ U(0, 1], each token of the solution is masked with probability t,
    and the loss per token is the sum of -log p over the masked tokens, divided by t and by L. For a whole solution its
    mean is an upper bound of -log p(solution).
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(settings.warmup_steps):
        generator = generator_for(settings.seed, "warm-up", step)
        problems = [task[index] for index in torch.randint(len(task), (64,), generator=generator).tolist()]
        prompts_BS = encode(tokenizer, [problem.prompt for problem in problems])
        tokens_BL = encode(tokenizer, [problem.solution for problem in problems])
        t_BL = (1 - torch.rand(len(problems), 1, generator=generator)).expand(-1, LENGTH)
        masked_BL = torch.rand(t_BL.shape, generator=generator) < t_BL
        canvas_BT = torch.cat([prompts_BS, tokens_BL.masked_fill(masked_BL, model.config.mask_token_id)], dim=1)
        logprobs_K = token_logprobs(logits_at(model, canvas_BT, masked_BL), tokens_BL[masked_BL])
        loss = -(logprobs_K / t_BL[masked_BL]).sum() / tokens_BL.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 30)  # small at first: AdamW does not know the gradients' size
        optimizer.step()
        if (step + 1) % 20 == 0:  # often: a small model gets the idea within 20 steps, at another step for each seed
            solve_rate = solve_rate_of(model, tokenizer, "validation", settings)
            print(f"warm-up step {step + 1:3}  loss {loss.item():.3f}  solve_rate {solve_rate:.3f}")
            if solve_rate >= settings.sft_warmup_target:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description="RL of a masked diffusion language model on 4x4 Sudoku, in one file")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    settings = Settings(**vars(parser.parse_args()))
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and on a busy machine they lose much

    policy = tiny_masked_lm(characters="1234.=", seed=settings.seed)  # 353,490 random weights
    model = policy.module
    tokenizer = policy.tokenizer
    task = Sudoku(split="train", clues=(10, 12))  # puzzles with 10 to 12 of the 16 cells given, and one solution
    warm_up(model, tokenizer, task, settings)
    before = solve_rate_of(model, tokenizer, "test", settings)
    for number, step in enumerate(train(model, tokenizer, task, settings), start=1):
        print(f"RL step {number:3}  " + "  ".join(f"{name} {value:.4f}" for name, value in step.metrics.items()))
    after = solve_rate_of(model, tokenizer, "test", settings)
    print(f"solve rate on 400 held-out puzzles: {before:.3f} before RL, {after:.3f} after")


if __name__ == "__main__":
    main()
