"""Models whose noise is random tokens (DiffusionGemma): an encoder reads the text, a decoder predicts a canvas.

The encoder is causal and fills a cache of keys and values. The decoder reads the cache, sees its full canvas, and is
conditioned on the logits of the step before (self-conditioning). Both have the same weights, except for the decoder's
layers of the self-conditioning. `encode` of such a family is called in two ways:

    encode(module, tokens, attention_mask, positions, [cache, use_cache=True])    the encoder; fills the cache
    encode(module, canvas, attention_mask, positions, cache=cache, previous=...)                   the decoder; reads it
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from dllm_rl.models.base import CACHE, Module, Policy, States, Tokens, position_ids
from dllm_rl.models.logprobs import wide


class SelfConditioning(NamedTuple):
    """Logits of the step before, and the rows that see them."""

    logits: Float[Tensor, "B T V"]
    rows: Bool[Tensor, " B"] | None = None  # None: all


def encode_denoiser(
    module: Module,
    tokens: Tokens,
    attention_mask: Bool[Tensor, "B S"] | None,
    positions: Tokens,
    *,
    cache: Any = None,
    use_cache: bool = False,
    previous: SelfConditioning | None = None,
) -> States:
    """Run DiffusionGemma's encoder, or, with a cache that is only read, its decoder. Only text is supported.

    With attention_mask None there is no padding.
    """
    cache_kwargs = {} if cache is None else {CACHE: cache}
    if cache is None or use_cache:
        inputs = {"attention_mask": attention_mask, "position_ids": positions} | cache_kwargs
        return module.model.encoder.language_model(input_ids=tokens, **inputs).last_hidden_state
    return module.model.decoder(
        decoder_input_ids=tokens,
        decoder_attention_mask=attention_mask,
        decoder_position_ids=positions,
        self_conditioning_logits=None if previous is None else previous.logits,
        self_conditioning_mask=None if previous is None else previous.rows,
        **cache_kwargs,
    ).last_hidden_state


def softcapped_head(module: Module, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    """Return cap * tanh(logits / cap), in fp32 or fp64, as transformers' `forward` computes it."""
    cap = module.final_logit_softcapping
    return torch.tanh(wide(module.get_output_embeddings()(hidden)) / cap) * cap


def share_layers(module: Module) -> None:
    """Make encoder and decoder share the layers whose weights they share, in place.

    A quantized or adapted layer then serves both sides. transformers ties only the weights, and keeps two layers around
    them.
    """
    reader, writer = module.model.encoder.language_model, module.model.decoder
    for name, layer in list(reader.named_modules()):
        if not name or any(layer is each for each in writer.modules()):
            continue  # inside a layer that is already shared
        try:
            other = writer.get_submodule(name)
        except AttributeError:
            continue
        ours, theirs = list(layer.parameters()), list(other.parameters())
        same = len(ours) == len(theirs) > 0 and all(a is b for a, b in zip(ours, theirs, strict=True))
        if type(layer) is type(other) and same and not list(layer.buffers()):
            reader.set_submodule(name, other)


@dataclass
class Prefix:
    """The columns that the encoder has read of R rows: its cache, and which columns are not padding.

    Args:
        cache: DynamicCache of transformers.
        mask: Columns (R, S), False on padding.
    """

    cache: Any
    mask: Bool[Tensor, "R S"]

    @classmethod
    def empty(cls, policy: Policy, rows: int) -> "Prefix":
        config = getattr(policy.module, "config", None)  # it names the layers with a sliding window
        cache = DynamicCache() if config is None else DynamicCache(config=config.get_text_config(decoder=True))
        return cls(cache, torch.zeros(rows, 0, dtype=torch.bool, device=policy.device))

    def read(self, policy: Policy, tokens: Int[Tensor, "R N"], mask: Bool[Tensor, "R N"]) -> Float[Tensor, "R N D"]:
        """Append columns, with `mask` False on padding, and return the encoder's states of them."""
        self.mask = torch.cat([self.mask, mask], dim=1)
        positions = position_ids(self.mask)[:, -tokens.shape[1] :]
        return policy.encode(tokens, self.mask, positions, cache=self.cache, use_cache=True)

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Select these rows, in this order. A row may be repeated."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def states(
        self,
        policy: Policy,
        canvas: Int[Tensor, "R C"],
        previous: Float[Tensor, "R C V"] | None,
        conditioned: Bool[Tensor, " R"] | None = None,
    ) -> Float[Tensor, "R C D"]:
        """Return the decoder's states of a canvas after these columns.

        `previous` has the logits of the step before, as `conditioning` returns them. `conditioned` marks the rows that
        see them; None: all.
        """
        mask = torch.cat([self.mask, torch.ones_like(canvas, dtype=torch.bool)], dim=1)
        positions = position_ids(mask)[:, -canvas.shape[1] :]
        seen = None if previous is None else SelfConditioning(previous, conditioned)
        return policy.encode(canvas, mask, positions, cache=self.cache, previous=seen)

    def logits(
        self,
        policy: Policy,
        canvas: Int[Tensor, "R C"],
        previous: Float[Tensor, "R C V"] | None,
        temperature: float,
    ) -> Float[Tensor, "R C V"]:
        """Return the head of `states`, divided by the temperature: fp32, or fp64 if the head's logits are.

        Sampler and scoring both use this function.
        """
        return wide(policy.head(self.states(policy, canvas, previous))) / temperature

    def cut(self) -> list[tuple[Tensor, Tensor]]:
        """Replace the cache's tensors by leaves, and return pairs (tensor, its leaf).

        Gradients then accumulate in the leaves, so that many backwards of the decoder go through the encoder once: see
        `backward_through`.
        """
        pairs = []
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                whole = getattr(layer, name)
                leaf = whole.detach().requires_grad_()
                setattr(layer, name, leaf)
                pairs.append((whole, leaf))
        return pairs


def backward_through(cuts: list[list[tuple[Tensor, Tensor]]]) -> None:
    """Propagate the gradients of each cut's leaves into the encoder. The last cut comes first, as it was read last."""
    for pairs in reversed(cuts):
        reached = [(whole, leaf.grad) for whole, leaf in pairs if leaf.grad is not None and whole.requires_grad]
        if reached:
            torch.autograd.backward([whole for whole, _ in reached], [gradient for _, gradient in reached])


def conditioning(policy: Policy, logits: Float[Tensor, "R C V"]) -> Float[Tensor, "R C V"]:
    """Return a step's logits as the next step receives them: in the weights' dtype."""
    return logits.to(next(p for p in policy.module.parameters() if p.is_floating_point()).dtype)


def has_images(module: nn.Module, tokens: Int[Tensor, "P S"]) -> bool:
    """Return whether the prompts contain the token that represents an image."""
    image = getattr(getattr(module, "config", None), "image_token_id", None)
    return image is not None and bool((tokens == image).any())
