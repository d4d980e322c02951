"""LoRA's settings."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Lora:
    """W + (alpha / r) B A on linear layers of the blocks: A is random, B zero, so that nothing changes at first.

    r        rank of the adapters
    alpha    their scale, times r
    targets  names of layers (`q_proj`), or full paths; None: the family's list. Routers, embeddings, heads have none.
    experts  adapt each expert of a stack too
    dropout  share of the adapters' inputs that is dropped, in differentiated forwards only; 0 with `experts`
    seed     of A, and of dropout
    Source: LoRA, arXiv 2106.09685 [paper]; A uniform in +-1/sqrt(in_features), as peft does.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    experts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r={self.r} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must lie in [0, 1)")
        if self.experts and self.dropout:  # merged weights see no single input that could be dropped
            raise ValueError(f"lora.dropout={self.dropout}: adapters on experts are merged in a forward; set it to 0")


def check_mergeable(lora: Lora) -> None:
    """Raise ValueError for dropout, which merged adapters cannot have."""
    if lora.dropout:
        raise ValueError(f"lora.dropout={lora.dropout}: an aligned forward merges adapters; set it to 0")


def lora_r16(*, r: int = 16, alpha: float = 32.0, dropout: float = 0.0, experts: bool = False) -> Lora:
    """Small adapters: r 16, alpha 32, no dropout by default.

    r        rank of the adapters
    alpha    their scale, times r
    dropout  share of the adapters' inputs that is dropped, in differentiated forwards only
    experts  adapt each expert of a mixture too
    """
    return Lora(r=r, alpha=alpha, dropout=dropout, experts=experts)


def lora_d1(*, r: int = 128, alpha: float = 64.0, dropout: float = 0.05) -> Lora:
    """d1's adapters (arXiv 2504.12216): r 128, alpha 64, dropout 0.05 by default.

    r        rank of the adapters
    alpha    their scale, times r
    dropout  share of the adapters' inputs that is dropped, in differentiated forwards only
    """
    return Lora(r=r, alpha=alpha, dropout=dropout)
