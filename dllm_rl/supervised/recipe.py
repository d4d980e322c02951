"""SFT is supervised fine-tuning as one flat frozen record; fields that Recipe has too mean the same."""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from dllm_rl.members import described
from dllm_rl.recipe import Settings, _, documented


@dataclass(frozen=True, kw_only=True, repr=False)
class SFT(Settings):
    """What a model is shown, and how. Names are TRL's where the meaning is the same."""

    dataset: str | Any = _("rows with `messages`, `prompt` and `completion`, or `text`: data set, list, or .jsonl path")
    eval_dataset: str | Any = _("held-out rows; None: the last ones of dataset, see eval_split", None)
    eval_split: float | None = _(
        "rows of dataset that are held out: a share below 1, or a number; None: a tenth, at most 256",
        None,
        above=0,
    )
    max_length: int = _("longer rows, in tokens, are left out; with packing also the length of a row", 1024, at_least=2)
    completion_length: int | None = _(
        "end tokens fill diffusion completions to this length (RL's max_new_tokens); None: one", None, at_least=1
    )
    completion_only_loss: bool = _("of prompt and completion, the completion alone is learned", True)
    assistant_only_loss: bool = _("of messages, the assistant's alone are learned", True)
    corruption: float = _(
        "share of a diffusion model's visible tokens that is replaced; all are then predicted",
        0.0,
        at_least=0,
        below=1,
    )
    packing: bool = _("several sequences per row, which do not see each other: same gradients, less padding", False)
    micro_batch_size: int | None = _("rows per forward; None: all at once", None, at_least=1)

    def settings(self) -> dict[str, Any]:
        return described(self._without_rows())

    def __repr__(self) -> str:
        return Settings.__repr__(self._without_rows())

    def _without_rows(self) -> "SFT":
        return replace(self, dataset=digest_of(self.dataset), eval_dataset=digest_of(self.eval_dataset))


def digest_of(dataset: Any) -> str | None:
    """What distinguishes a data set: a path, or the number of rows and a digest of at most a hundred."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    count = len(dataset)
    # A run of a million rows must start at once; a hundred rows differ between any two data sets that one mixes up.
    looked_at = [dict(dataset[i]) for i in range(0, count, max(1, count // 100))]
    digest = hashlib.sha256(json.dumps(looked_at, sort_keys=True, default=str).encode())
    return f"{count} rows, {digest.hexdigest()[:16]}"


SFT.__doc__ = documented(SFT)
