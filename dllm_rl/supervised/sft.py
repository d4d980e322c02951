"""Settings of supervised fine-tuning, in one flat frozen record, `SFT`. Fields that Recipe also has mean the same."""

from typing import Any, cast

from dllm_rl.groups import Warmup
from dllm_rl.records import option
from dllm_rl.settings import Settings, documented
from dllm_rl.tasks.datasets import digest_of


class SFT(Settings):
    """The settings of supervised fine-tuning. Names follow TRL if the meaning is the same."""

    dataset: str | Any = option(
        help="data set, list of rows, or .jsonl path; a row has `messages`, or `prompt` and `completion`, or `text`"
    )
    eval_dataset: str | Any = option(default=None, help="held-out rows; None: the last rows of dataset (eval_split)")
    eval_split: float | None = option(
        default=None,
        help="rows of dataset to hold out: a share below 1, or a number; None: a tenth, at most 256",
        above=0,
    )
    max_length: int | None = option(
        default=None,
        help="rows of more tokens are left out; None: the model's positions, at most 1024",
        at_least=2,
    )
    completion_length: int | None = option(
        default=None,
        help="fill a diffusion model's completions with end tokens to this length (RL's max_new_tokens), and "
        "leave out rows with a longer one; None: one",
        at_least=1,
    )
    completion_only_loss: bool = option(
        default=True, help="learn only the completion of rows with prompt and completion"
    )
    assistant_only_loss: bool = option(default=True, help="learn only the assistant's messages of rows with messages")
    micro_batch_size: int | None = option(default=None, help="rows per forward; None: all", at_least=1)

    # What a run asks of RL's settings of these names. Without annotations, they are not fields.
    shard_size = 1
    dry_run = False
    warmup = Warmup()
    beta = 0.0
    torch_compile = False
    teacher = cast(Any, None)

    def conflicts(self) -> list[tuple[bool, str]]:
        unknown = [setting for setting, name in self.evaluated_metrics.items() if name != "loss"]
        return [
            *super().conflicts(),
            (bool(unknown), f"{', '.join(unknown)} is not the metric of the held-out rows, which is loss"),
        ]

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON, with an id in place of the rows."""
        return Settings.settings(self._without_rows())

    def __repr__(self) -> str:
        return Settings.__repr__(self._without_rows())

    def _without_rows(self) -> "SFT":
        return self.replace(dataset=digest_of(self.dataset), eval_dataset=digest_of(self.eval_dataset))


SFT.__doc__ = documented(SFT)
