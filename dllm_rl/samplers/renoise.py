"""Sampling from random tokens, as in DiffusionGemma.

A completion is denoised canvas by canvas; here a canvas is a block of `policy.spec.block_size` tokens. Each step draws
a token at every position of the canvas, accepts the most certain draws, and replaces the others by new random tokens.
docs/papers.md explains the tags [paper] and [ours].
"""

from collections.abc import Callable
from typing import Literal

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
from dllm_rl.types.rollouts import MIN_TEMPERATURE, Prompts, Renoised, Rollout

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

    def greedy(self) -> "Renoise":
        return self.replace(answer="argmax")

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
        record = _Record(policy, prompts, seeds, self.max_new_tokens, temperatures)
        after_step = (lambda: on_step(record.rollout(policy))) if on_step else None
        starts = prompts.attention_mask.cpu().long().argmax(-1)
        # The buckets of `likelihoods.views.row_chunks`: a row is scored at the width at which it was sampled.
        for bucket in length_buckets(starts, prompts.tokens.shape[1] + self.max_new_tokens, policy.device):
            bucket_sampler = _BucketSampler(policy, record, self, bucket.rows, bucket.start)
            for block in range(self.max_new_tokens // record.canvas_length):
                if not len(bucket_sampler.rows):
                    break
                bucket_sampler.denoise_canvas(block, after_step)
        return record.rollout(policy)


class _Record:
    """The recorded state of the L positions of every completion."""

    def __init__(
        self,
        policy: Policy,
        prompts: Prompts,
        seeds: Int[Tensor, " B"],
        max_new_tokens: int,
        temperatures: tuple[float, ...],
    ) -> None:
        """Start before the first step. `temperatures` has the temperature of each of the W steps of a canvas."""
        assert policy.spec.block_size is not None, "`check_spec` requires it"
        shape = (len(prompts.tokens), max_new_tokens)
        self.prompts = prompts
        self.seeds = seeds.to(policy.device)
        self.canvas_length = policy.spec.block_size
        self.temperatures = temperatures
        self.tokens = torch.full(shape, policy.pad_id, device=policy.device)  # of the canvases, and finally the answer
        self.begun = torch.zeros_like(self.tokens, dtype=torch.bool)  # positions of canvases that have begun
        # The step of the last accepted draw, or of the answer; -1 while the token is noise.
        self.step = torch.full_like(self.tokens, -1)
        self.logprobs = torch.zeros(shape, device=policy.device)  # sum over the steps for the accepted draws
        # The next three have the shape (B, L, W); `Renoised` explains them.
        self.seen = torch.full((*shape, len(temperatures)), -1, dtype=torch.int32, device=policy.device)
        self.drawn = self.seen.clone()
        self.step_logprobs = torch.zeros(self.seen.shape, device=policy.device)
        self.row_steps = torch.zeros_like(self.tokens[:, 0])  # number of steps that each row has taken
        self.forwards = 0

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


class _BucketSampler:
    """Sampler of the unfinished rows of a bucket: rows of similar length, which run together."""

    def __init__(
        self, policy: Policy, record: _Record, sampler: Renoise, all_rows: Int[Tensor, " R"], start: int
    ) -> None:
        """Read the prompts of `all_rows`, which begin in column `start`."""
        self.policy = policy
        self.record = record  # of all rows of the batch
        self.sampler = sampler
        (self.rows,) = copy_to_device(policy.device, all_rows)  # the unfinished ones
        prompts = record.prompts
        rows, copies = prompts.shared_rows(all_rows)  # the encoder reads a prompt once for all its completions
        tokens = prompts.tokens[rows.to(prompts.tokens.device), start:].to(policy.device)
        attention_mask = prompts.attention_mask[rows.to(prompts.tokens.device), start:].to(policy.device)
        self.prefix = Prefix.empty(policy, len(rows))  # the encoder's cache of the tokens before the current canvas
        self.prefix.read(policy, tokens, attention_mask)
        record.forwards += 1
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
        record.tokens[index] = canvas = self.random_tokens(0, offsets)
        previous_logits = None
        is_active = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        stability = self.sampler.stability_threshold or 0
        history = torch.full((stability, *canvas.shape), -1, device=rows.device)  # of `likeliest`
        for step, temperature in enumerate(record.temperatures):
            logits = self.prefix.logits(policy, record.tokens[index], previous_logits, temperature)
            record.forwards += 1
            likeliest, stops = self.write_step(index, step, logits, is_active, history)
            history = torch.cat([history, likeliest[None]])[1:] if stability else history
            is_active = is_active & ~stops
            previous_logits = conditioning(policy, logits)
            if after_step is not None:
                after_step()
            if not is_active.any():
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

    def write_step(
        self,
        index: tuple[Tensor, Tensor],
        step: int,
        logits: Float[Tensor, "R C V"],
        is_active: Bool[Tensor, " R"],
        history: Int[Tensor, "H R C"],
    ) -> tuple[Int[Tensor, "R C"], Bool[Tensor, " R"]]:
        """Draw the tokens of a step, and write and record those of the active rows.

        A row without a scored draw gets no entry in `seen` and `drawn`.

        Args:
            index: Rows and offsets of the canvas.
            step: Number of the step in its canvas.
            logits: Tempered logits of the canvas.
            is_active: Rows whose canvas is not finished.
            history: The likeliest tokens of the H previous steps.

        Returns:
            The likeliest tokens; the rows whose canvas this step finishes.
        """
        record, sampler, offsets = self.record, self.sampler, index[1]
        canvas = record.tokens[index]
        flat_logits = logits.flatten(0, 1)
        flat_drawn = invert_cdf(flat_logits.softmax(-1), self.uniforms(step, offsets, TOKEN_STREAM).flatten())
        logprobs = TokenLogprob.apply(flat_logits, flat_drawn).view(canvas.shape)  # as `Trajectory()` recomputes it
        drawn = flat_drawn.view(canvas.shape)
        likeliest = logits.argmax(-1)
        entropies = Categorical(logits=logits).entropy()
        stops = torch.full_like(is_active, step + 1 == len(record.temperatures))
        if sampler.confidence_threshold is not None:
            is_stable = (history == likeliest).all(-1).all(0)
            stops |= is_stable & (entropies.mean(-1) < sampler.confidence_threshold)
        stops_row = stops[:, None]
        accepted = accept(entropies, sampler.entropy_bound)
        scored = accepted & ~stops_row  # the last draws have no effect if the answer is the argmax
        if sampler.answer == "drawn":
            accepted = scored = accepted | stops_row
        noise = self.random_tokens(step + 1, offsets)
        answer = drawn if sampler.answer == "drawn" else likeliest
        after = torch.where(stops_row, answer, torch.where(accepted, drawn, noise))

        active = is_active[:, None]
        scored = scored & active
        row_steps = record.row_steps[self.rows]
        last_step = torch.where(accepted | stops_row, row_steps[:, None], -1)
        logprobs = logprobs.to(record.logprobs).masked_fill(~scored, 0.0)
        record.tokens[index] = torch.where(active, after, canvas)
        record.step[index] = torch.where(active, last_step, record.step[index])
        record.logprobs[index] += logprobs
        record.seen[(*index, step)] = torch.where(scored.any(-1, keepdim=True), canvas, -1).int()
        record.drawn[(*index, step)] = torch.where(scored, drawn, -1).int()
        record.step_logprobs[(*index, step)] = logprobs
        record.row_steps[self.rows] = row_steps + is_active
        return likeliest, stops


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
