"""Supervised training of models whose noise is random tokens (DiffusionGemma).

An answer is one or more canvases, blocks of fixed length. Some tokens of a canvas are replaced by random tokens, and
the model predicts the clean canvas from the noisy canvas and the text before it.

The objective is that of TRL's example for this model and of NeMo AutoModel (both of 2026): one canvas of the answer is
drawn; each of its tokens is replaced with probability t by a random token; and the loss is the sum of

    - mean over the canvas of log p(token): the decoder's loss, on replaced and other tokens equally, without 1/t
    - mean over the text of log p(next token): the encoder's loss, as of a causal model

Half of the examples, drawn at random, are self-conditioned: a first pass without gradient gives the logits that the
second pass reads, just as a sampling step reads the logits of the previous step.
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
from dllm_rl.types.rollouts import SamplingParams

SELF_CONDITIONED_SHARE = 0.5  # share of the examples that are self-conditioned [TRL's example, NeMo]


class Noise(NamedTuple):
    """Random numbers for B examples; C is the length of a canvas. All but `level` are uniforms in [0, 1).
    `loss.draw_levels` draws the first three.

    Args:
        level: Probability with which a token of the canvas is replaced.
        replace: A token is replaced if this number is below the level.
        token: Decides which token replaces it.
        canvas: Decides which of the answer's canvases is predicted.
        self_condition: The example is self-conditioned if this number is below SELF_CONDITIONED_SHARE.
    """

    level: Float[Tensor, " B"]
    replace: Float[Tensor, "B C"]
    token: Float[Tensor, "B C"]
    canvas: Float[Tensor, " B"]
    self_condition: Float[Tensor, " B"]


@dataclass(frozen=True)
class DenoisingExample:
    """A training example: the text that the encoder reads, and the canvas after it, clean and noisy.

    Args:
        context: Token ids that the encoder reads.
        target: Token ids of the clean canvas.
        noisy: Token ids of the canvas that the decoder reads, with replaced tokens.
        num_answer_tokens: Number of the target's tokens that belong to the answer. End tokens fill the rest of the
            canvas; they count in the decoder's loss.
        self_conditioned: Whether the decoder reads the logits of a first pass.
    """

    context: Int[Tensor, " S"]
    target: Int[Tensor, " C"]
    noisy: Int[Tensor, " C"]
    num_answer_tokens: int
    self_conditioned: bool

    @property
    def num_tokens(self) -> int:
        return len(self.context) + len(self.target)


def denoising_examples(
    policy: Policy, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], noise: Noise
) -> list[DenoisingExample]:
    """Make an example of each (prompt, answer), two lists of token ids; the answer includes its end token. Pair i uses
    row i of the noise.
    """
    length = policy.spec.block_size
    assert length is not None, "`check_spec` requires it"
    end_token = policy.spec.eos_ids[0]
    examples = []
    for row, (prompt, answer) in enumerate(pairs):
        num_canvases = -(-len(answer) // length)
        start = int(noise.canvas[row] * num_canvases) * length
        answer_part = [*answer[start : start + length]]
        target = torch.tensor(answer_part + [end_token] * (length - len(answer_part)))
        random_tokens = (noise.token[row] * policy.vocab_size).long()  # from the full vocabulary, as `Renoise` draws
        noisy_tokens = torch.where(noise.replace[row] < noise.level[row], random_tokens, target)
        context = torch.tensor([*prompt, *answer[:start]])
        self_conditioned = bool(noise.self_condition[row] < SELF_CONDITIONED_SHARE)
        examples.append(DenoisingExample(context, target, noisy_tokens, len(answer_part), self_conditioned))
    return examples


def denoising_loss(policy: Policy, batch: Sequence[DenoisingExample]) -> Float[Tensor, ""]:
    """Return the loss of the module's docstring, in nats, as a sum over the examples. Divide it by their number for
    the mean.
    """
    device = policy.device
    context, is_context = left_padded([example.context for example in batch])
    context, is_context = context.to(device), is_context.to(device)
    target = torch.stack([example.target for example in batch]).to(device)
    noisy_tokens = torch.stack([example.noisy for example in batch]).to(device)
    self_conditioned = torch.tensor([example.self_conditioned for example in batch], device=device)
    prefix = Prefix.empty(policy, len(batch))
    text_states = prefix.read(policy, context, is_context)
    first_pass_logits = None
    if self_conditioned.any():
        with torch.no_grad():
            first_pass_logits = conditioning(policy, prefix.logits(policy, noisy_tokens, None, temperature=1.0))
    canvas_states = prefix.states(policy, noisy_tokens, first_pass_logits, self_conditioned)
    params = SamplingParams()  # temperature 1
    decoder_logprobs = token_logprobs(policy, canvas_states.flatten(0, 1), target.flatten(), params)
    decoder_logprobs = decoder_logprobs.view(target.shape).mean(-1)
    # The encoder also reads the clean canvas, so that its loss includes the answer's tokens. The end tokens that fill
    # the canvas are not text.
    is_answer = (
        torch.arange(target.shape[1], device=device)
        < torch.tensor([example.num_answer_tokens for example in batch], device=device)[:, None]
    )
    text_states = torch.cat([text_states, prefix.read(policy, target, torch.ones_like(is_answer))], dim=1)
    tokens = torch.cat([context, target], dim=1)
    is_text = torch.cat([is_context, is_answer], dim=1)
    has_next_token = is_text[:, :-1] & is_text[:, 1:]
    encoder_logprobs = torch.zeros_like(has_next_token, dtype=decoder_logprobs.dtype)
    encoder_logprobs[has_next_token] = token_logprobs(
        policy, text_states[:, :-1][has_next_token], tokens[:, 1:][has_next_token], params
    )
    return -(decoder_logprobs + encoder_logprobs.sum(-1) / has_next_token.sum(-1).clamp(min=1)).sum()


def left_padded(rows: Sequence[Tensor]) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Pad the rows with zeros on the left; return the tokens, and a mask that is False at the padding."""
    mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    tokens = pad_sequence(list(rows), batch_first=True, padding_side="left")
    return tokens, pad_sequence(mask, batch_first=True, padding_side="left")
