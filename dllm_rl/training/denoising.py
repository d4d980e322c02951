"""Supervised training of models whose noise is random tokens (DiffusionGemma). Some tokens of a canvas of the answer
are replaced by random tokens, and the model predicts the canvas from the text before it.

The objective is the objective of TRL's example for this model and of NeMo AutoModel (both of 2026): for an answer of
one or more canvases, one canvas is drawn; each of its tokens is replaced with probability t by a random token; and the
loss is

    - mean over the canvas of log p(token): the decoder's, of replaced and of other tokens equally, without 1/t
    - mean over the text of log p(next token): the encoder's, as a causal model

Half of the examples, drawn at random, are self-conditioned: a first pass without gradient gives the logits that the
second pass sees, just as a sampling step sees the logits of the step before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_rl.models.base import Policy
from dllm_rl.models.denoiser import Prefix, conditioning
from dllm_rl.models.logprobs import token_logprobs
from dllm_rl.types import SamplingParams

CONDITIONED = 0.5  # share of the examples whose second pass sees the first one's logits [TRL's example, NeMo]


class Noise(NamedTuple):
    """Random numbers of the lessons of B examples; C is the canvas's length. All but `level` are uniforms in [0, 1).
    `warmup.draw_levels` draws the first three.

    Args:
        level: Probability with which a token of the canvas is replaced.
        hit: A position is replaced if this number is below the level.
        token: Decides which token replaces it.
        canvas: Decides which of the answer's canvases is predicted.
        passes: The example is self-conditioned if this number is below CONDITIONED.
    """

    level: Float[Tensor, " B"]
    hit: Float[Tensor, "B C"]
    token: Float[Tensor, "B C"]
    canvas: Float[Tensor, " B"]
    passes: Float[Tensor, " B"]


@dataclass(frozen=True)
class Lesson:
    """An example: the encoder's input (S,), and the canvas after it, as the target and as the decoder sees it (C,).

    Args:
        context: Token ids that the encoder reads.
        target: Token ids of the canvas.
        seen: Token ids of the canvas as the decoder sees it, with replaced tokens.
        real: Number of the target's tokens that belong to the answer. End tokens fill the rest, and count for the
            decoder.
        conditioned: Whether the decoder sees the logits of a first pass.
    """

    context: Int[Tensor, " S"]
    target: Int[Tensor, " C"]
    seen: Int[Tensor, " C"]
    real: int
    conditioned: bool


def lessons(policy: Policy, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], noise: Noise) -> list[Lesson]:
    """Make a lesson for each prompt and answer (token ids; the answer with its end token), with its row's noise."""
    length = policy.spec.block_size
    assert length is not None, "`check_spec` asks for it"
    fill = policy.spec.eos_ids[0]
    found = []
    for row, (prompt, answer) in enumerate(pairs):
        canvases = -(-len(answer) // length)
        begin = int(noise.canvas[row] * canvases) * length
        part = [*answer[begin : begin + length]]
        target = torch.tensor(part + [fill] * (length - len(part)))
        random = (noise.token[row] * policy.vocab_size).long()  # from the full vocabulary, as `renoise` draws
        seen = torch.where(noise.hit[row] < noise.level[row], random, target)
        context = torch.tensor([*prompt, *answer[:begin]])
        found.append(Lesson(context, target, seen, len(part), bool(noise.passes[row] < CONDITIONED)))
    return found


def denoising_loss(policy: Policy, batch: Sequence[Lesson]) -> Float[Tensor, ""]:
    """Return the sum over the lessons of the decoder's and the encoder's loss, in nats. Divide by the number of lessons
    for the mean.
    """
    device = policy.device
    context, real = left_padded([one.context for one in batch])
    context, real = context.to(device), real.to(device)
    target = torch.stack([one.target for one in batch]).to(device)
    seen = torch.stack([one.seen for one in batch]).to(device)
    conditioned = torch.tensor([one.conditioned for one in batch], device=device)
    prefix = Prefix.empty(policy, len(batch))
    read = prefix.read(policy, context, real)
    previous = None
    if conditioned.any():
        with torch.no_grad():
            previous = conditioning(policy, prefix.logits(policy, seen, None, temperature=1.0))
    states = prefix.states(policy, seen, previous, conditioned)
    decoder = logprobs(policy, states, target).mean(-1)
    # The encoder reads the canvas too, so that it learns the canvas's text. The fill after the answer is not text.
    text = (
        torch.arange(target.shape[1], device=device) < torch.tensor([one.real for one in batch], device=device)[:, None]
    )
    read = torch.cat([read, prefix.read(policy, target, torch.ones_like(text))], dim=1)
    tokens = torch.cat([context, target], dim=1)
    whole = torch.cat([real, text], dim=1)
    pairs = whole[:, :-1] & whole[:, 1:]
    encoder = torch.zeros_like(pairs, dtype=decoder.dtype)
    encoder[pairs] = scored(policy, read[:, :-1][pairs], tokens[:, 1:][pairs])
    return -(decoder + encoder.sum(-1) / pairs.sum(-1).clamp(min=1)).sum()


def logprobs(policy: Policy, states: Float[Tensor, "B C D"], tokens: Int[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    return scored(policy, states.flatten(0, 1), tokens.flatten()).view(tokens.shape)


def scored(policy: Policy, states: Float[Tensor, "K D"], tokens: Int[Tensor, " K"]) -> Float[Tensor, " K"]:
    return token_logprobs(policy, states, tokens, SamplingParams())


def left_padded(rows: Sequence[Tensor]) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Pad the rows with zeros on the left; return the tokens and the mask of the rows' tokens."""
    mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    tokens = pad_sequence(list(rows), batch_first=True, padding_side="left")
    return tokens, pad_sequence(mask, batch_first=True, padding_side="left")
