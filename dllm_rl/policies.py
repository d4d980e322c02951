"""One interface over every backbone: logits for the token AT each position, whatever the family's own convention."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dllm_rl.models.families import FamilySpec, load_module, spec_of


@runtime_checkable
class Policy(Protocol):
    """A model with its tokenizer and the facts that a sampler or an estimator needs. `version` counts weight updates."""

    module: nn.Module
    spec: FamilySpec
    tokenizer: PreTrainedTokenizerBase
    version: int

    def hidden(self, tokens: Tensor, attention_mask: Tensor) -> Tensor: ...

    def head(self, hidden: Tensor) -> Tensor: ...

    def logits(self, tokens: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> Tensor: ...


class _Backbone:
    """The part that diffusion and autoregressive policies share: a stock module, its head, its device."""

    def __init__(self, module: nn.Module, spec: FamilySpec, tokenizer: PreTrainedTokenizerBase) -> None:
        self.module, self.spec, self.tokenizer, self.version = module.eval(), spec, tokenizer, 0

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def vocab_size(self) -> int:
        return self.module.config.vocab_size

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.spec.eos_ids[0]

    def hidden(self, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Final hidden states; `head` of the one at t gives logits for the token at t. Padding is never attended to."""
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        states = self.spec.encode(self.module, tokens, attention_mask, positions)
        # A shifted family predicts position t from the state at t-1; the first position has only its own.
        return torch.cat([states[:, :1], states[:, :-1]], dim=1) if self.spec.shift else states

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits from hidden states, in the module's dtype."""
        return self.spec.head(self.module, hidden)

    def logits(
        self,
        tokens: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B T"],
        positions: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"] | Float[Tensor, "K V"]:
        """Logits for the token AT each position (B, T, V), or only at the K marked positions, row by row: (K, V)."""
        hidden = self.hidden(tokens, attention_mask)
        return self.head(hidden if positions is None else hidden[positions])

    def save_pretrained(self, directory: str | Path) -> None:
        """Write weights (safetensors), config and tokenizer; `load_policy(directory)` opens them bit for bit."""
        self.module.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def to(self, device: torch.device | str):
        self.module.to(device)
        return self


class DiffusionPolicy(_Backbone):
    """A masked-diffusion model: every position sees every other one (or its block and those before)."""


class AutoregressivePolicy(_Backbone):
    """A causal model under the same interface: its logits at t are the predictions FOR t, made from what precedes."""


def make_policy(module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> DiffusionPolicy | AutoregressivePolicy:
    """Wrap a module whose family is known, after proving that its attention is what the family says."""
    spec = spec_of(module.config, tokenizer)
    policy = (AutoregressivePolicy if spec.attention == "causal" else DiffusionPolicy)(module, spec, tokenizer)
    check_attention(policy)
    return policy


def load_policy(
    path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DiffusionPolicy | AutoregressivePolicy:
    """Open a checkpoint with stock transformers classes, and prove that it attends as its family says.

    Raises ValueError on an unknown architecture, missing or unexpected tensors, a mask id outside the vocabulary,
    or attention that is not what the family needs.
    """
    module, tokenizer = load_module(path_or_id, dtype=dtype)
    return make_policy(module.to(device), tokenizer)


@torch.no_grad()
def check_attention(policy: _Backbone) -> None:
    """Change the last token; a bidirectional model's first state must move, a causal one's must not."""
    device, size = policy.device, policy.vocab_size
    length = 8 if policy.spec.block_size is None else min(8, policy.spec.block_size)
    tokens = (torch.arange(length, device=device) % max(1, size - 1))[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    changed = tokens.clone()
    changed[0, -1] = (tokens[0, -1] + 1) % size
    first = policy.hidden(torch.cat([tokens, changed]), mask.expand(2, -1))[:, 0].float()
    moved, causal = not torch.allclose(first[0], first[1], rtol=1e-4, atol=1e-6), policy.spec.attention == "causal"
    if moved == causal:
        raise ValueError(
            f"attention={policy.spec.attention!r} is what {type(policy.module).__name__} should have, but changing the last "
            f"token {'moved' if moved else 'did not move'} the first position's state; "
            + ("load it as a diffusion model" if causal else "upgrade transformers (>= 5.2 honours config.is_causal=False)")
        )
