"""Sampling from random tokens, as in DiffusionGemma.

A completion is denoised canvas by canvas; here a canvas is a block of `policy.spec.block_size` tokens. Each step draws
a token at every position of the canvas, accepts the most certain draws, and replaces the others by new random tokens.
docs/methods.md explains the tags [paper] and [ours].
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.distributions import Categorical

from dllm_rl.device import copy_to_device
from dllm_rl.models.base import Policy, length_buckets
from dllm_rl.models.denoiser import Prefix, conditioning, has_images
from dllm_rl.models.logprobs import TokenLogprob, invert_cdf
from dllm_rl.records import option
from dllm_rl.rng import row_seeds, uniforms
from dllm_rl.samplers.canvas import RANK_STREAM, TOKEN_STREAM
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.samplers.unmask import check_fits
from dllm_rl.types import MIN_TEMPERATURE, Prompts, Renoised, Rollout

NOISE_STREAM = RANK_STREAM  # for the random tokens; this sampler has no ranks, so their stream is free


class Renoise(Sampler):
    """Complete prompts, canvas by canvas (DiffusionGemma's sampler).

    Use it for encoder-decoder models whose noise is random tokens; use `Unmask` for models whose noise is mask tokens.
    A canvas of C = `policy.spec.block_size` tokens begins with random tokens. In step s of n a token is drawn at every
    position from softmax(logits / tau), tau = t_min + (t_max - t_min) (n - s) / n. The draws at the positions of lowest
    entropy are accepted: as many as have (sum of their entropies) - (the largest) <= entropy_bound. The other positions
    get new random tokens. The next step reads the canvas and this step's logits. With equal random numbers the tokens
    are those of transformers' `generate`, except that tokens after a row's end token stay as they were sampled.

    `Rollout.renoised` records every step, and `Trajectory` replays it. A row depends only on its prompt, its seed and
    the weights; batching changes at most the last bits of a sum. A step needs memory for the fp32 logits (R, C, V) of
    all R rows.

    Args:
        max_new_tokens: Number of new tokens, a multiple of the canvas's length.
        diffusion_steps: Largest number of steps of a canvas.
        t_max: Temperature of the first step, at least t_min.
        t_min: Limit of the temperature after the last step, at least 1e-30.
        entropy_bound: Bound on the accepted entropies in nats, above 0. Infinity accepts every draw.
        stability_threshold: A row's canvas ends early if the likeliest tokens are the same as in each of this many
            previous steps, and the mean entropy is below confidence_threshold. If both thresholds are None, every
            canvas takes diffusion_steps steps.
        confidence_threshold: Mean entropy in nats below which a row's canvas may end early.
        answer: Tokens of a finished canvas. "argmax": the likeliest tokens of its last step, as in the authors' code;
            they do not depend on the last draws. "drawn": the last step accepts all its draws [ours]; use it for
            training.

    Source: transformers 5.23 [paper].
    """

    max_new_tokens: int = option(at_least=1)
    diffusion_steps: int = option(default=48, at_least=1)
    t_max: float = option(default=0.8, at_least=MIN_TEMPERATURE)
    t_min: float = option(default=0.4, at_least=MIN_TEMPERATURE)
    entropy_bound: float = 0.1  # may be infinite
    stability_threshold: int | None = option(default=1, at_least=0)
    confidence_threshold: float | None = option(default=0.005, at_least=0)
    answer: Literal["argmax", "drawn"] = "argmax"

    def check(self) -> None:
        if self.t_min > self.t_max:
            raise ValueError(f"t_min={self.t_min} must be at most t_max={self.t_max}")
        if not self.entropy_bound > 0:
            raise ValueError(f"entropy_bound={self.entropy_bound} must be above 0 nats")
        if (self.stability_threshold is None) != (self.confidence_threshold is None):
            raise ValueError(
                f"stability_threshold={self.stability_threshold} and confidence_threshold={self.confidence_threshold} "
                "stop a canvas together; give both, or None for both"
            )

    @torch.no_grad()
    def __call__(
        self,
        policy: Policy,
        prompts: Prompts,
        generator: Generator,
        *,
        on_step: Callable[[Rollout], None] | None = None,
    ) -> Rollout:
        """Complete the prompts.

        Args:
            policy: Policy with an encoder and a decoder.
            prompts: Left-padded prompts, without `infill_mask` and images.
            generator: Generator that draws one seed per row. It is not used if `prompts.seeds` is set.
            on_step: Function that is called with the current rollout after every step. None: no call.

        Returns:
            Rollout with the rows of the prompts.

        Raises:
            ValueError: The model's noise is not random tokens, or a prompt has images or open positions.
        """
        _check(policy, prompts, self.max_new_tokens)
        temperatures = tuple(
            self.t_min + (self.t_max - self.t_min) * ((self.diffusion_steps - step) / self.diffusion_steps)
            for step in range(self.diffusion_steps)
        )
        seeds = row_seeds(generator, len(prompts.tokens)) if prompts.seeds is None else prompts.seeds
        record = _Record.empty(policy, prompts, seeds, self.max_new_tokens, temperatures)
        starts = prompts.attention_mask.cpu().long().argmax(-1)
        # The buckets of `likelihoods.views.row_chunks`: a row is scored at the width at which it was sampled.
        for bucket in length_buckets(starts, prompts.tokens.shape[1] + self.max_new_tokens, policy.device):
            (rows,) = copy_to_device(policy.device, bucket.rows)
            stop_thresholds = (self.stability_threshold, self.confidence_threshold)
            bucket_sampler = _BucketSampler(
                policy, record, rows, bucket.start, self.entropy_bound, self.answer, stop_thresholds
            )
            after_step = (lambda: on_step(record.rollout(policy))) if on_step else None
            for block in range(self.max_new_tokens // record.canvas_length):
                if not len(bucket_sampler.rows):
                    break
                bucket_sampler.denoise_canvas(block, after_step)
        return record.rollout(policy)


@dataclass
class _Record:
    """The recorded state of the L positions of every completion.

    Attributes:
        prompts: Prompts of the batch.
        seeds: Seed of each row.
        canvas_length: Number of positions of a canvas.
        temperatures: Temperature of each step.
        tokens: Tokens of the canvases, and finally the answer.
        begun: Positions of canvases that have begun.
        step: Step of the last accepted draw, or of the answer; -1 while the token is noise.
        logprobs: Sum over the steps of the log-probs of the accepted draws.
        seen: Tokens that each step read, as in `Renoised`.
        drawn: Accepted draws of each step, as in `Renoised`.
        step_logprobs: Log-probs of these draws.
        row_steps: Number of steps that each row has taken.
        pad_id: Token id of padding.
        forwards: Number of model calls.
    """

    prompts: Prompts
    seeds: Int[Tensor, " B"]
    canvas_length: int
    temperatures: tuple[float, ...]
    tokens: Int[Tensor, "B L"]
    begun: Bool[Tensor, "B L"]
    step: Int[Tensor, "B L"]
    logprobs: Float[Tensor, "B L"]
    seen: Int[Tensor, "B L W"]
    drawn: Int[Tensor, "B L W"]
    step_logprobs: Float[Tensor, "B L W"]
    row_steps: Int[Tensor, " B"]
    pad_id: int
    forwards: int = 0

    @classmethod
    def empty(
        cls, policy: Policy, prompts: Prompts, seeds: Tensor, max_new_tokens: int, temperatures: tuple[float, ...]
    ) -> "_Record":
        """Return the record before the first step."""
        assert policy.spec.block_size is not None, "`check_spec` requires it"
        shape = (len(prompts.tokens), max_new_tokens)
        tokens = torch.full(shape, policy.pad_id, device=policy.device)
        no_steps = torch.full((*shape, len(temperatures)), -1, dtype=torch.int32, device=policy.device)
        return cls(
            prompts=prompts,
            seeds=seeds.to(policy.device),
            canvas_length=policy.spec.block_size,
            temperatures=temperatures,
            tokens=tokens,
            begun=torch.zeros_like(tokens, dtype=torch.bool),
            step=torch.full_like(tokens, -1),
            logprobs=torch.zeros(shape, device=policy.device),
            seen=no_steps,
            drawn=no_steps.clone(),
            step_logprobs=torch.zeros(no_steps.shape, device=policy.device),
            row_steps=torch.zeros_like(tokens[:, 0]),
            pad_id=policy.pad_id,
        )

    def rollout(self, policy: Policy) -> Rollout:
        """Return the rollout so far, with the prompts on the left."""
        prompts = self.prompts
        width = prompts.tokens.shape[1]
        num_steps = max(1, int((self.seen >= 0).any(0).any(0).sum()))  # later steps were not taken, and are cut off
        block = torch.arange(self.tokens.shape[1], device=policy.device) // self.canvas_length
        renoised = Renoised(
            block=torch.where(self.begun, block, -1),
            seen=self.seen[..., :num_steps],
            drawn=self.drawn[..., :num_steps],
            logprobs=self.step_logprobs[..., :num_steps],
            temperatures=self.temperatures,
        )
        return Rollout(
            tokens=torch.cat([prompts.tokens.to(policy.device), self.tokens], dim=1),
            attention_mask=torch.cat([prompts.attention_mask.to(policy.device), self.begun], dim=1),
            completion_mask=F.pad(self.begun, (width, 0)),
            unmask_step=F.pad(self.step, (width, 0), value=-1),
            logprobs=F.pad(self.logprobs, (width, 0)),
            group=prompts.group.to(policy.device),
            weights_version=policy.weights_version,
            forwards=self.forwards,
            renoised=renoised.padded(width),
        )


class _StepResult(NamedTuple):
    """The result of a step of R rows on the C positions of their canvas.

    Attributes:
        before: Tokens that the step read.
        after: Tokens after the step.
        is_noise: Positions whose token after the step is random.
        drawn: Drawn tokens.
        scored: Draws that the likelihood scores.
        logprobs: Log-probs of the draws, in nats.
    """

    before: Int[Tensor, "R C"]
    after: Int[Tensor, "R C"]
    is_noise: Bool[Tensor, "R C"]
    drawn: Int[Tensor, "R C"]
    scored: Bool[Tensor, "R C"]
    logprobs: Float[Tensor, "R C"]


@dataclass
class _BucketSampler:
    """Sampler of the unfinished rows of a bucket: rows of similar length, which run together.

    Attributes:
        policy: Policy to sample from.
        record: Record of all rows.
        rows: Unfinished rows.
        start: First column of the bucket's prompts.
        entropy_bound: See `Renoise`.
        answer: See `Renoise`.
        stop_thresholds: Stability and confidence threshold of `Renoise`.
        prefix: The encoder's cache of the tokens before the current canvas.
    """

    policy: Policy
    record: _Record
    rows: Int[Tensor, " R"]
    start: int
    entropy_bound: float
    answer: str
    stop_thresholds: tuple[int | None, float | None]
    prefix: Prefix = field(init=False)

    def __post_init__(self) -> None:
        prompts = self.record.prompts
        rows, copies = prompts.shared_rows(self.rows.cpu())  # the encoder reads a prompt once for all its completions
        tokens = prompts.tokens[rows.to(prompts.tokens.device), self.start :].to(self.policy.device)
        attention_mask = prompts.attention_mask[rows.to(prompts.tokens.device), self.start :].to(self.policy.device)
        self.prefix = Prefix.empty(self.policy, len(rows))
        self.prefix.read(self.policy, tokens, attention_mask)
        self.record.forwards += 1
        if len(rows) < len(copies):
            self.prefix.select_rows(copies.to(tokens.device))

    def denoise_canvas(self, block: int, after_step: Callable[[], None] | None) -> None:
        """Denoise canvas number `block` of every row. Rows that wrote an end token are then finished."""
        policy, record, rows = self.policy, self.record, self.rows
        offsets = block * record.canvas_length + torch.arange(record.canvas_length, device=rows.device)
        if block:
            previous_canvas = record.tokens[rows[:, None], offsets - record.canvas_length]
            self.prefix.read(policy, previous_canvas, torch.ones_like(previous_canvas, dtype=torch.bool))
            record.forwards += 1
        index = (rows[:, None], offsets)
        record.begun[index] = torch.ones_like(record.begun[index])
        canvas = self.random_tokens(0, offsets)
        previous_logits = None
        is_done = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        stability, _ = self.stop_thresholds
        history = torch.full((stability or 0, *canvas.shape), -1, device=rows.device)  # of `likeliest`
        for step, temperature in enumerate(record.temperatures):
            logits = self.prefix.logits(policy, canvas, previous_logits, temperature)
            record.forwards += 1
            drawn, logprobs = self.draw(logits, step, offsets)
            likeliest = logits.argmax(-1)
            entropies = Categorical(logits=logits).entropy()
            stops = self.should_stop(likeliest, entropies, history)
            if step + 1 == len(record.temperatures):
                stops = torch.ones_like(stops)
            accepted = accept(entropies, self.entropy_bound)
            scored = accepted & ~stops[:, None]  # the last draws have no effect if the answer is the argmax
            if self.answer == "drawn":
                accepted = scored = accepted | stops[:, None]
            answer = drawn if self.answer == "drawn" else likeliest
            noise = self.random_tokens(step + 1, offsets)
            after = torch.where(stops[:, None], answer, torch.where(accepted, drawn, noise))
            is_noise = ~(accepted | stops[:, None])
            result = _StepResult(canvas, after, is_noise, drawn, scored, logprobs)
            self.record_step(index, step, ~is_done, result)
            history = torch.cat([history, likeliest[None]])[1:] if stability else history
            canvas = torch.where(is_done[:, None], canvas, after)
            is_done = is_done | stops
            previous_logits = conditioning(policy, logits)
            if after_step is not None:
                after_step()
            if is_done.all():
                break
        eos = torch.tensor(policy.spec.eos_ids, device=rows.device)
        unfinished = (~torch.isin(record.tokens[index], eos).any(-1)).nonzero()[:, 0]
        if len(unfinished) < len(rows):
            self.rows = rows[unfinished]
            self.prefix.select_rows(unfinished)

    def random_tokens(self, step: int, offsets: Int[Tensor, " C"]) -> Int[Tensor, "R C"]:
        """Return random tokens, uniform over the vocabulary."""
        return (self.uniforms(step, offsets, NOISE_STREAM) * self.policy.vocab_size).long()

    def uniforms(self, step: int, offsets: Int[Tensor, " C"], stream: int) -> Float[Tensor, "R C"]:
        """Return numbers in [0, 1) that depend only on the row's seed, the canvas's step and the position."""
        seeds = self.record.seeds[self.rows].repeat_interleave(len(offsets))
        numbers = uniforms(seeds, torch.full_like(seeds, step), offsets.repeat(len(self.rows)), stream=stream)
        return numbers.view(len(self.rows), len(offsets))

    def draw(
        self, logits: Float[Tensor, "R C V"], step: int, offsets: Int[Tensor, " C"]
    ) -> tuple[Int[Tensor, "R C"], Float[Tensor, "R C"]]:
        """Draw a token at every position. Return it and its log-prob in nats, as `Trajectory()` recomputes it."""
        flat_logits = logits.flatten(0, 1)
        tokens = invert_cdf(flat_logits.softmax(-1), self.uniforms(step, offsets, TOKEN_STREAM).flatten())
        logprobs = TokenLogprob.apply(flat_logits, tokens)
        return tokens.view(logits.shape[:2]), logprobs.view(logits.shape[:2])

    def should_stop(
        self, likeliest: Int[Tensor, "R C"], entropies: Float[Tensor, "R C"], history: Int[Tensor, "H R C"]
    ) -> Bool[Tensor, " R"]:
        """Return the rows whose likeliest tokens equal those of the H previous steps, and whose mean entropy is low."""
        stability, confidence = self.stop_thresholds
        if stability is None or confidence is None:
            return torch.zeros_like(likeliest[:, 0], dtype=torch.bool)
        return (history == likeliest).all(-1).all(0) & (entropies.mean(-1) < confidence)

    def record_step(
        self,
        index: tuple[Tensor, Tensor],
        step: int,
        is_active: Bool[Tensor, " R"],
        result: _StepResult,
    ) -> None:
        """Record a step of the active rows. A row without a scored draw gets no entry in `seen` and `drawn`."""
        record = self.record
        active = is_active[:, None].expand_as(result.scored)
        scored = result.scored & active
        is_recorded = active & result.scored.any(-1, keepdim=True)
        logprobs = result.logprobs.to(record.logprobs).masked_fill(~scored, 0.0)
        row_steps = record.row_steps[self.rows]
        last_step = torch.where(result.is_noise, -1, row_steps[:, None])
        record.tokens[index] = torch.where(active, result.after, record.tokens[index])
        record.step[index] = torch.where(active, last_step, record.step[index])
        record.logprobs[index] += logprobs
        record.seen[(*index, step)] = torch.where(is_recorded, result.before, -1).int()
        record.drawn[(*index, step)] = torch.where(scored, result.drawn, -1).int()
        record.step_logprobs[(*index, step)] = logprobs
        record.row_steps[self.rows] = row_steps + is_active


def accept(entropies: Float[Tensor, "R C"], bound: float) -> Bool[Tensor, "R C"]:
    """Return the positions of lowest entropy, as many as have (sum) - (largest) <= bound, and at least one.

    Source: arXiv 2505.24857 [paper].
    """
    sorted_entropies, index = entropies.sort(dim=-1)
    accepted = sorted_entropies.cumsum(-1) - sorted_entropies <= bound
    return torch.zeros_like(accepted).scatter(-1, index, accepted)


def _check(policy: Policy, prompts: Prompts, length: int) -> None:
    """Raise ValueError as documented in `Renoise`."""
    spec = policy.spec
    if spec.attention != "encoder_decoder":
        raise ValueError(
            f"policy {spec.name!r} has {spec.attention!r} attention; Renoise is for models whose noise is random "
            f"tokens: use {'Autoregress' if spec.attention == 'causal' else 'Unmask'}"
        )
    size = spec.block_size
    assert size is not None, "`check_spec` requires it"
    if length % size:
        lower = length // size * size
        nearest = f"{lower}, {lower + size}" if lower > 0 else f"{size}"
        raise ValueError(
            f"max_new_tokens={length} must be a multiple of the canvas's {size} tokens; nearest: {nearest}"
        )
    if prompts.infill_mask is not None:
        raise ValueError("prompts have open positions, which need a mask token; give prompts without them")
    if has_images(policy.module, prompts.tokens):
        raise ValueError("a prompt has the image token, and images are not supported; give only text")
    check_fits(policy, prompts, length)
