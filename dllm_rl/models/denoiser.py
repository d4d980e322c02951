"""Diffusion models with random-token noise (DiffusionGemma): an encoder reads the text, a decoder predicts a canvas.

The canvas is the block of tokens that is denoised. The encoder is causal and fills a cache of keys and values. The
decoder reads the cache and the full canvas, and is conditioned on its logits of the previous step (self-conditioning).
Both have the same weights, except for the layers of the self-conditioning, which only the decoder has. `encode` of such
a family is called in two ways:

    encode(module, tokens, attention_mask, positions, [cache=cache])                      the encoder; fills the cache
    encode(module, canvas, attention_mask, positions, cache=cache, previous=previous)     the decoder; reads it
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dllm_rl.models.base import CACHE, Module, Policy, States, Tokens, position_ids
from dllm_rl.models.cache import ColumnCache, TokenCache
from dllm_rl.models.logprobs import upcast


class SelfConditioning(NamedTuple):
    """The logits of the previous step (None in the first), and the rows that are conditioned on them."""

    logits: Float[Tensor, "B T V"] | None
    rows: Bool[Tensor, " B"] | None = None  # None: all


def encode_denoiser(
    module: Module,
    tokens: Tokens,
    attention_mask: Bool[Tensor, "B S"] | None,
    positions: Tokens,
    *,
    cache: ColumnCache | None = None,
    previous: SelfConditioning | None = None,
) -> States:
    """Run DiffusionGemma's encoder, or its decoder if `previous` is passed. Only text is supported.

    Args:
        module: Stock DiffusionGemma module.
        tokens: New tokens of the text, or the canvas.
        attention_mask: False on padding. None: there is no padding.
        positions: Positions of `tokens`.
        cache: Cache that the encoder fills, or the decoder reads. None: the encoder runs without a cache.
        previous: What the decoder is conditioned on. None: the encoder runs.
    """
    cache_kwargs = {} if cache is None else {CACHE: cache}
    if previous is None:
        encoder = module.model.encoder.language_model
        states = encoder(input_ids=tokens, attention_mask=attention_mask, position_ids=positions, **cache_kwargs)
        return states.last_hidden_state
    return module.model.decoder(
        decoder_input_ids=tokens,
        decoder_attention_mask=attention_mask,
        decoder_position_ids=positions,
        self_conditioning_logits=previous.logits,
        self_conditioning_mask=previous.rows,
        **cache_kwargs,
    ).last_hidden_state


def softcapped_head(module: Module, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    """Return cap * tanh(logits / cap), in fp32 or fp64, as transformers' `forward` computes it."""
    cap = module.final_logit_softcapping
    return torch.tanh(upcast(module.get_output_embeddings()(hidden)) / cap) * cap


def share_layers(module: Module) -> None:
    """Make encoder and decoder share the layers whose weights they share, in place.

    A quantized or adapted layer then serves both. transformers ties only the weights: it has two
    layers with the same weights.
    """
    encoder, decoder = module.model.encoder.language_model, module.model.decoder
    for name, layer in list(encoder.named_modules()):
        if not name or any(layer is submodule for submodule in decoder.modules()):
            continue  # inside a layer that is already shared
        try:
            decoder_layer = decoder.get_submodule(name)
        except AttributeError:
            continue
        weights, decoder_weights = list(layer.parameters()), list(decoder_layer.parameters())
        has_same_number = len(weights) == len(decoder_weights) > 0
        is_tied = has_same_number and all(a is b for a, b in zip(weights, decoder_weights, strict=True))
        if type(layer) is type(decoder_layer) and is_tied and not list(layer.buffers()):
            encoder.set_submodule(name, decoder_layer)


@dataclass
class Prefix:
    """The S columns that the encoder has read, for R rows.

    Args:
        cache: Keys and values of the columns.
        mask: False on padding.
    """

    cache: ColumnCache
    mask: Bool[Tensor, "R S"]

    @classmethod
    def empty(cls, policy: Policy, rows: int) -> "Prefix":
        cache = policy.spec.new_cache(policy.module)
        if isinstance(cache, TokenCache):
            raise ValueError(
                f"new_cache of the spec {policy.spec.name!r}: the decoder reads keys and values, and a module without "
                "a config of transformers gets a cache of tokens; name a cache, such as dllm_rl.models.kv_cache.KVCache"
            )
        return cls(cache, torch.zeros(rows, 0, dtype=torch.bool, device=policy.device))

    def read(self, policy: Policy, tokens: Int[Tensor, "R N"], mask: Bool[Tensor, "R N"]) -> Float[Tensor, "R N D"]:
        """Run the encoder on new columns. Append them to the prefix, and return their states.

        `mask` is False on padding.
        """
        self.mask = torch.cat([self.mask, mask], dim=1)
        positions = position_ids(self.mask)[:, -tokens.shape[1] :]
        return policy.encode(tokens, self.mask, positions, cache=self.cache)

    def select_rows(self, rows: Int[Tensor, " K"]) -> None:
        """Select these rows, in this order. A row may be repeated."""
        self.cache.set_tensors([x[rows] for x in self.cache.tensors()])
        self.mask = self.mask[rows]

    def states(
        self,
        policy: Policy,
        canvas: Int[Tensor, "R C"],
        previous: Float[Tensor, "R C V"] | None,
        conditioned: Bool[Tensor, " R"] | None = None,
    ) -> Float[Tensor, "R C D"]:
        """Return the decoder's states of a canvas that follows this prefix.

        `previous` are the logits of the previous step, as `conditioning` returns them. `conditioned` marks the rows
        that are conditioned on them. None: all rows.
        """
        mask = torch.cat([self.mask, torch.ones_like(canvas, dtype=torch.bool)], dim=1)
        positions = position_ids(mask)[:, -canvas.shape[1] :]
        return policy.encode(
            canvas, mask, positions, cache=self.cache, previous=SelfConditioning(previous, conditioned)
        )

    def logits(
        self,
        policy: Policy,
        canvas: Int[Tensor, "R C"],
        previous: Float[Tensor, "R C V"] | None,
        temperature: float,
    ) -> Float[Tensor, "R C V"]:
        """Return the logits of `states`, divided by the temperature, in fp32 or fp64.

        Sampling and scoring both use this function.
        """
        return upcast(policy.head(self.states(policy, canvas, previous))) / temperature

    def detach_cache(self) -> list[tuple[Tensor, Tensor]]:
        """Replace the cache's tensors by detached leaves of the autograd graph. Return the pairs (tensor, leaf).

        The decoder can then run many backward passes whose gradients accumulate in the leaves. `backward_through`
        propagates them through the encoder once.
        """
        pairs = [(tensor, tensor.detach().requires_grad_()) for tensor in self.cache.tensors()]
        self.cache.set_tensors([leaf for _, leaf in pairs])
        return pairs


def backward_through(detached: list[list[tuple[Tensor, Tensor]]]) -> None:
    """Propagate gradients into the encoder. `detached` has the results of `Prefix.detach_cache`, in their order."""
    for pairs in reversed(detached):
        with_grad = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None and tensor.requires_grad]
        if with_grad:
            torch.autograd.backward([tensor for tensor, _ in with_grad], [gradient for _, gradient in with_grad])


def conditioning(policy: Policy, logits: Float[Tensor, "R C V"]) -> Float[Tensor, "R C V"]:
    """Return a step's logits in the dtype of the weights, in which they condition the next step."""
    return logits.to(next(p for p in policy.module.parameters() if p.is_floating_point()).dtype)


def has_images(module: nn.Module, tokens: Int[Tensor, "P S"]) -> bool:
    """Return whether the prompts contain the token that represents an image."""
    image = getattr(getattr(module, "config", None), "image_token_id", None)
    return image is not None and bool((tokens == image).any())
