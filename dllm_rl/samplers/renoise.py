"""Sampling from random tokens, as in DiffusionGemma.

Each step predicts a full canvas, accepts the most certain draws and replaces the others by new random tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.distributions import Categorical

from dllm_rl.device import send
from dllm_rl.models.base import Policy
from dllm_rl.models.denoiser import Prefix, conditioning, has_images
from dllm_rl.models.forward.buckets import length_buckets
from dllm_rl.models.logprobs import TokenLogprob, invert
from dllm_rl.rng import row_seeds, uniforms
from dllm_rl.samplers.canvas import TIES, TOKENS
from dllm_rl.samplers.unmask import check_fits
from dllm_rl.types import Prompts, Renoised, Rollout

NOISE = TIES  # the second of the two streams of random numbers that a step has (`rng.uniforms`)


@torch.no_grad()
def renoise(  # noqa: PLR0913
    policy: Policy,
    prompts: Prompts,
    generator: Generator,
    *,
    max_new_tokens: int,
    diffusion_steps: int = 48,
    t_max: float = 0.8,
    t_min: float = 0.4,
    entropy_bound: float = 0.1,
    stability_threshold: int | None = 1,
    confidence_threshold: float | None = 0.005,
    answer: str = "argmax",
    on_step: Callable[[Rollout], None] | None = None,
) -> Rollout:
    """Complete every prompt `group_size` times, canvas by canvas (DiffusionGemma's sampler).

    Use it for encoder-decoder models whose noise is random tokens; use `unmask` where the noise is mask tokens. A
    canvas of `policy.spec.block_size` tokens begins at random. In step s of n a token is drawn at every position from
    softmax(logits / tau), tau = t_min + (t_max - t_min) (n - s) / n. The positions of lowest entropy keep their draw:
    as many as have (sum of their entropies) - (the largest) <= entropy_bound. The others get new random tokens. The
    next step sees the canvas and this step's logits. With equal random numbers the tokens are those of transformers'
    `generate`, except that tokens after a row's end token stay as they were sampled.

    `Rollout.renoised` records every step, and `trajectory()` replays it. A row depends only on its prompt, its seed and
    the weights; batching changes at most the last bits of a sum. A step needs memory for fp32 logits of all rows (R, C,
    V).

    Args:
        policy: Policy with an encoder and a decoder.
        prompts: Left-padded prompts, without open positions and images.
        generator: Generator that draws one seed per row. It is not used if `prompts.seeds` is set.
        max_new_tokens: Number of new tokens, a multiple of the canvas's length.
        diffusion_steps: Largest number of steps of a canvas.
        t_max: Temperature of the first step, at least t_min.
        t_min: Temperature just below that of the last step, above 0.
        entropy_bound: Bound on the accepted entropies in nats, above 0. Infinity accepts every draw.
        stability_threshold: A row's canvas ends when the likeliest tokens were the same in this many earlier steps and
            the mean entropy is below confidence_threshold. None, for both: every canvas takes diffusion_steps.
        confidence_threshold: Mean entropy in nats below which a row's canvas may end, see stability_threshold.
        answer: "argmax": the likeliest tokens of a canvas's last step, as the authors do; no draw decides them.
            "drawn": the last step accepts every draw, and the draws are the answer [ours]. Use "drawn" for training.
        on_step: Function that is called with the current rollout after every step. None: no call.

    Returns:
        Rollout of P * group_size rows.

    Raises:
        ValueError: The model is of another kind, a prompt has images or open positions, or a number is out of range.

    Source: transformers 5.23 [paper].
    """
    _check(policy, prompts, max_new_tokens)
    _check_settings(diffusion_steps, t_max, t_min, entropy_bound, answer)
    if (stability_threshold is None) != (confidence_threshold is None):
        raise ValueError(
            f"stability_threshold={stability_threshold} and confidence_threshold={confidence_threshold} stop a canvas "
            "together; give both, or None for both"
        )
    temperatures = tuple(
        t_min + (t_max - t_min) * ((diffusion_steps - step) / diffusion_steps) for step in range(diffusion_steps)
    )
    seeds = row_seeds(generator, prompts.num_rows) if prompts.seeds is None else prompts.seeds
    record = _Record.blank(policy, prompts, seeds, max_new_tokens, temperatures)
    starts = prompts.attention_mask.cpu().long().argmax(-1).repeat_interleave(prompts.group_size)
    # The buckets of `likelihoods.views.row_chunks`: a row is scored at the width at which it was sampled.
    for bucket in length_buckets(starts, prompts.tokens.shape[1] + max_new_tokens, policy.device):
        (rows,) = send(policy.device, bucket.rows)
        stops = (stability_threshold, confidence_threshold)
        loop = _Loop(policy, record, rows, bucket.start, entropy_bound, answer, stops)
        for block in range(max_new_tokens // record.length):
            if not len(loop.rows):
                break
            loop.canvas(block, (lambda: on_step(record.rollout(policy))) if on_step else None)
    return record.rollout(policy)


@dataclass
class _Record:
    """The recorded state of the L positions of every completion (B, L)."""

    prompts: Prompts
    seeds: Int[Tensor, " B"]
    length: int  # of a canvas
    temperatures: tuple[float, ...]
    tokens: Int[Tensor, "B L"]  # the canvas, and finally the answer
    begun: Bool[Tensor, "B L"]
    step: Int[Tensor, "B L"]  # of the last accepted draw, or of the answer; -1 while a token is noise
    logprobs: Float[Tensor, "B L"]  # sums over the steps
    seen: Int[Tensor, "B L W"]
    drawn: Int[Tensor, "B L W"]
    logps: Float[Tensor, "B L W"]
    clock: Int[Tensor, " B"]  # steps that the row has taken
    pad_id: int
    forwards: int = 0

    @classmethod
    def blank(
        cls, policy: Policy, prompts: Prompts, seeds: Tensor, length: int, temperatures: tuple[float, ...]
    ) -> "_Record":
        assert policy.spec.block_size is not None, "`check_spec` asks for it"
        shape = (prompts.num_rows, length)
        whole = torch.full(shape, policy.pad_id, device=policy.device)
        steps = torch.full((*shape, len(temperatures)), -1, dtype=torch.int32, device=policy.device)
        return cls(
            prompts=prompts,
            seeds=seeds.to(policy.device),
            length=policy.spec.block_size,
            temperatures=temperatures,
            tokens=whole,
            begun=torch.zeros_like(whole, dtype=torch.bool),
            step=torch.full_like(whole, -1),
            logprobs=torch.zeros(shape, device=policy.device),
            seen=steps,
            drawn=steps.clone(),
            logps=torch.zeros(steps.shape, device=policy.device),
            clock=torch.zeros_like(whole[:, 0]),
            pad_id=policy.pad_id,
        )

    def rollout(self, policy: Policy) -> Rollout:
        """Return the rollout so far, with the prompts on the left."""
        prompts = self.prompts
        width = prompts.tokens.shape[1]
        both = (prompts.tokens, prompts.attention_mask)
        before, real = (repeat(x.to(policy.device), "p s -> (p g) s", g=prompts.group_size) for x in both)
        used = max(1, int((self.seen >= 0).any(0).any(0).sum()))  # steps after the last one taken are cut off
        block = torch.arange(self.tokens.shape[1], device=policy.device) // self.length
        part = Renoised(
            block=torch.where(self.begun, block, -1),
            seen=self.seen[..., :used],
            drawn=self.drawn[..., :used],
            logprobs=self.logps[..., :used],
            temperatures=self.temperatures,
        )
        return Rollout(
            tokens=torch.cat([before, self.tokens], dim=1),
            attention_mask=torch.cat([real, self.begun], dim=1),
            completion_mask=F.pad(self.begun, (width, 0)),
            unmask_step=F.pad(self.step, (width, 0), value=-1),
            logprobs=F.pad(self.logprobs, (width, 0)),
            group_size=prompts.group_size,
            weights_version=policy.weights_version,
            forwards=self.forwards,
            renoised=part.padded(width),
        )


class _Step(NamedTuple):
    """A step of R rows on the C positions of their canvas."""

    canvas: Int[Tensor, "R C"]  # the tokens that the step saw
    after: Int[Tensor, "R C"]
    decided: Bool[Tensor, "R C"]  # positions whose token is not noise
    drawn: Int[Tensor, "R C"]
    counts: Bool[Tensor, "R C"]  # draws that the likelihood scores
    logps: Float[Tensor, "R C"]  # of the draws, nats


@dataclass
class _Loop:
    """The unfinished rows of a bucket, and what the encoder has read of them."""

    policy: Policy
    record: _Record
    rows: Int[Tensor, " R"]
    start: int  # the first column of the bucket's prompts
    entropy_bound: float
    answer: str
    stops: tuple[int | None, float | None]  # stability and confidence thresholds
    prefix: Prefix = field(init=False)

    def __post_init__(self) -> None:
        prompts = self.record.prompts
        group = prompts.group_size
        firsts = self.rows[::group] // group  # the prompt is read once for the rows of its group
        tokens = prompts.tokens.to(self.policy.device)[firsts, self.start :]
        self.prefix = Prefix.empty(self.policy, len(firsts))
        self.prefix.read(self.policy, tokens, prompts.attention_mask.to(self.policy.device)[firsts, self.start :])
        self.record.forwards += 1
        if group > 1:
            self.prefix.keep(torch.arange(len(firsts), device=tokens.device).repeat_interleave(group))

    def canvas(self, block: int, watch: Callable[[], None] | None) -> None:
        """Denoise one canvas of every row. Rows that wrote an end token leave."""
        policy, record, rows = self.policy, self.record, self.rows
        places = block * record.length + torch.arange(record.length, device=rows.device)
        if block:
            before = record.tokens[rows[:, None], places - record.length]
            self.prefix.read(policy, before, torch.ones_like(before, dtype=torch.bool))
            record.forwards += 1
        where = (rows[:, None], places)
        record.begun[where] = torch.ones_like(record.begun[where])
        canvas = self.noise(0, places)
        previous = None
        done = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        stability, _ = self.stops
        history = torch.full((stability or 0, *canvas.shape), -1, device=rows.device)  # of likeliest tokens
        for step, temperature in enumerate(record.temperatures):
            logits = self.prefix.logits(policy, canvas, previous, temperature)
            record.forwards += 1
            drawn, logps = self.draw(logits, step, places)
            best = logits.argmax(-1)
            entropies = Categorical(logits=logits).entropy()
            stops = self.stop(best, entropies, history)
            if step + 1 == len(record.temperatures):
                stops = torch.ones_like(stops)
            accepted = accept(entropies, self.entropy_bound)
            counts = accepted & ~stops[:, None]  # the last draw decides nothing if the answer is the argmax
            if self.answer == "drawn":
                accepted = counts = accepted | stops[:, None]
            final = drawn if self.answer == "drawn" else best
            noise = self.noise(step + 1, places)
            after = torch.where(stops[:, None], final, torch.where(accepted, drawn, noise))
            decided = accepted | stops[:, None]
            self.note(where, step, ~done, _Step(canvas, after, decided, drawn, counts, logps))
            history = torch.cat([history, best[None]])[1:] if stability else history
            canvas = torch.where(done[:, None], canvas, after)
            done = done | stops
            previous = conditioning(policy, logits)
            if watch is not None:
                watch()
            if done.all():
                break
        eos = torch.tensor(policy.spec.eos_ids, device=rows.device)
        left = (~torch.isin(record.tokens[where], eos).any(-1)).nonzero()[:, 0]
        if len(left) < len(rows):
            self.rows = rows[left]
            self.prefix.keep(left)

    def noise(self, step: int, places: Int[Tensor, " C"]) -> Int[Tensor, "R C"]:
        """Return random tokens, uniform over the vocabulary."""
        return (self.uniforms(step, places, NOISE) * self.policy.vocab_size).long()

    def uniforms(self, step: int, places: Int[Tensor, " C"], stream: int) -> Float[Tensor, "R C"]:
        """Return numbers that depend only on the row's seed, the canvas's step and the position."""
        seeds = self.record.seeds[self.rows].repeat_interleave(len(places))
        numbers = uniforms(seeds, torch.full_like(seeds, step), places.repeat(len(self.rows)), stream=stream)
        return numbers.view(len(self.rows), len(places))

    def draw(
        self, logits: Float[Tensor, "R C V"], step: int, places: Int[Tensor, " C"]
    ) -> tuple[Int[Tensor, "R C"], Float[Tensor, "R C"]]:
        """Draw a token at every position. Return it and its log-prob in nats, as `trajectory()` recomputes it."""
        flat = logits.flatten(0, 1)
        tokens = invert(flat.softmax(-1), self.uniforms(step, places, TOKENS).flatten())
        logps = TokenLogprob.apply(flat, tokens)
        return tokens.view(logits.shape[:2]), logps.view(logits.shape[:2])

    def stop(
        self, best: Int[Tensor, "R C"], entropies: Float[Tensor, "R C"], history: Int[Tensor, "H R C"]
    ) -> Bool[Tensor, " R"]:
        """Return the rows whose likeliest tokens were the same in all steps of the history, with a low mean entropy."""
        stability, confidence = self.stops
        if stability is None or confidence is None:
            return torch.zeros_like(best[:, 0], dtype=torch.bool)
        return (history == best).all(-1).all(0) & (entropies.mean(-1) < confidence)

    def note(
        self,
        where: tuple[Tensor, Tensor],
        step: int,
        live: Bool[Tensor, " R"],
        taken: _Step,
    ) -> None:
        """Record a step of the live rows. A step without a counted draw leaves no trace in `Renoised`."""
        record = self.record
        there = live[:, None].expand_as(taken.counts)
        scored = taken.counts & there
        kept = there & taken.counts.any(-1, keepdim=True)
        added = taken.logps.to(record.logprobs).masked_fill(~scored, 0.0)
        clock = record.clock[self.rows]
        record.tokens[where] = torch.where(there, taken.after, record.tokens[where])
        record.step[where] = torch.where(there, torch.where(taken.decided, clock[:, None], -1), record.step[where])
        record.logprobs[where] += added
        record.seen[(*where, step)] = torch.where(kept, taken.canvas, -1).int()
        record.drawn[(*where, step)] = torch.where(scored, taken.drawn, -1).int()
        record.logps[(*where, step)] = added
        record.clock[self.rows] = clock + live


def accept(entropies: Float[Tensor, "R C"], bound: float) -> Bool[Tensor, "R C"]:
    """Return the positions of lowest entropy, as many as have (sum) - (largest) <= bound, and at least one.

    Source: arXiv 2505.24857 [paper].
    """
    ordered, index = entropies.sort(dim=-1)
    among = ordered.cumsum(-1) - ordered <= bound
    return torch.zeros_like(among).scatter(-1, index, among)


def _check(policy: Policy, prompts: Prompts, length: int) -> None:
    """Raise ValueError as documented in `renoise`."""
    spec = policy.spec
    if spec.attention != "encoder_decoder":
        raise ValueError(
            f"policy {spec.name!r} has {spec.attention!r} attention; renoise is for models whose noise is random "
            f"tokens: use {'autoregress' if spec.attention == 'causal' else 'unmask'}"
        )
    size = spec.block_size
    assert size is not None, "`check_spec` asks for it"
    if length < 1 or length % size:
        lower = length // size * size
        near = f"{lower}, {lower + size}" if lower > 0 else f"{size}"
        raise ValueError(f"max_new_tokens={length} must be a multiple of the canvas's {size} tokens; nearest: {near}")
    if prompts.infill_mask is not None:
        raise ValueError("prompts have open positions, which need a mask token; give prompts without blanks")
    if has_images(policy.module, prompts.tokens):
        raise ValueError("a prompt holds the image token, and images are not supported; give text alone")
    check_fits(policy, prompts, length)


def _check_settings(diffusion_steps: int, t_max: float, t_min: float, entropy_bound: float, answer: str) -> None:
    if diffusion_steps < 1:
        raise ValueError(f"diffusion_steps={diffusion_steps} must be at least 1")
    if not (0 < t_min <= t_max < math.inf):
        raise ValueError(f"t_max={t_max} and t_min={t_min} must be temperatures with 0 < t_min <= t_max")
    if not entropy_bound > 0:
        raise ValueError(f"entropy_bound={entropy_bound} must be above 0 nats")
    if answer not in ("argmax", "drawn"):
        raise ValueError(f"answer={answer!r} must be 'argmax' or 'drawn'")
