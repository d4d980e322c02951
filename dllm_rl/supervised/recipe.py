"""Settings of supervised fine-tuning, in one flat frozen record, `SFT`. Fields that Recipe also has mean the same."""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from dllm_rl.members import described
from dllm_rl.recipe import Settings, _, documented


@dataclass(frozen=True, kw_only=True, repr=False)
class SFT(Settings):
    """The settings of supervised fine-tuning. Names follow TRL if the meaning is the same."""

    dataset: str | Any = _(
        "data set, list of rows, or .jsonl path; a row has `messages`, or `prompt` and `completion`, or `text`"
    )
    eval_dataset: str | Any = _("held-out rows; None: the last rows of dataset (eval_split)", None)
    eval_split: float | None = _(
        "rows of dataset to hold out: a share below 1, or a number; None: a tenth, at most 256",
        None,
        above=0,
    )
    max_length: int = _(
        "rows of more tokens are left out; with packing also the length of a packed row", 1024, at_least=2
    )
    completion_length: int | None = _(
        "fill a diffusion model's completions with end tokens to this length (RL's max_new_tokens); None: one",
        None,
        at_least=1,
    )
    completion_only_loss: bool = _("learn only the completion of rows with prompt and completion", True)
    assistant_only_loss: bool = _("learn only the assistant's messages of rows with messages", True)
    corruption: float = _(
        "share of a diffusion model's visible tokens to replace by random ones; the model then predicts all tokens",
        0.0,
        at_least=0,
        below=1,
    )
    packing: bool = _(
        "put several sequences into a row, which do not attend to each other: same gradients, less padding", False
    )
    micro_batch_size: int | None = _("rows per forward; None: all", None, at_least=1)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON, with an id in place of the rows."""
        return described(self._without_rows())

    def __repr__(self) -> str:
        return Settings.__repr__(self._without_rows())

    def _without_rows(self) -> "SFT":
        return replace(self, dataset=digest_of(self.dataset), eval_dataset=digest_of(self.eval_dataset))


def digest_of(dataset: Any) -> str | None:
    """Return a text that identifies a data set: its path, or its number of rows and a digest of at
    most a hundred rows.
    """
    if dataset is None or isinstance(dataset, str):
        return dataset
    count = len(dataset)
    # Not all rows, since a run with a million rows must start quickly; a hundred rows are enough to tell data sets
    # apart.
    sampled_rows = [dict(dataset[i]) for i in range(0, count, max(1, count // 100))]
    digest = hashlib.sha256(json.dumps(sampled_rows, sort_keys=True, default=str).encode())
    return f"{count} rows, {digest.hexdigest()[:16]}"


SFT.__doc__ = documented(SFT)
