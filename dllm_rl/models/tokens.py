"""Text and tokens: problems -> Prompts, Rollout -> completions."""

import math
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dllm_rl.models.base import Policy
from dllm_rl.tasks import Task
from dllm_rl.tasks.base import Problem
from dllm_rl.types import Prompts, Rollout


def encode(
    policy: Policy, problems: Sequence[Problem], *, group_size: int = 1, seeds: Sequence[int] | None = None
) -> Prompts:
    """Tokenise prompts: chat messages through the tokenizer's template, text without added special tokens. Blanks
    become open positions."""
    found = [ids_and_blanks(policy, problem.prompt, problem.blank) for problem in problems]
    ids, blanks = zip(*found, strict=True) if found else ((), ())
    return Prompts.from_ids(ids, pad_id=policy.pad_id, group_size=group_size, seeds=seeds, open_positions=blanks)


def prompt_ids(policy: Policy, prompt: str | list[dict[str, str]], blank: str | None = None) -> list[int]:
    """The first of `ids_and_blanks`."""
    return ids_and_blanks(policy, prompt, blank)[0]


def ids_and_blanks(
    policy: Policy, prompt: str | list[dict[str, str]], blank: str | None
) -> tuple[list[int], list[bool]]:
    """Token ids of a prompt, and which of them are blanks: mask tokens in place of `blank`. A last message of the
    assistant begins the answer.

    Special tokens come from the chat template alone: a prompt's `<|im_end|>` is tokenised as its characters.

    Raises ValueError for chat messages without a chat template, for text outside the model's vocabulary, and for
    blanks where the model has no mask token.
    """
    if blank is not None and (not blank or policy.spec.mask_id is None):
        wrong = "is no text" if not blank else "is to be filled in, and the model has no mask token"
        raise ValueError(f"blank={blank!r} {wrong}; leave it at None" + (", or use a diffusion model" if blank else ""))
    gap: list[int] = [] if policy.spec.mask_id is None else [policy.spec.mask_id]
    if isinstance(prompt, str):
        texts = [prompt] if blank is None else prompt.split(blank)
        return _joined([text_ids(policy, text) for text in texts], [(gap, True)] * (len(texts) - 1))
    opening = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    chat = _Chat(policy, prompt, blank=blank)
    return chat.ids_and_blanks(chat.rendered(prompt[:-1] if opening else prompt, answered=True) + chat.hide(opening))


def _joined(parts: list[list[int]], between: list[tuple[list[int], bool]]) -> tuple[list[int], list[bool]]:
    """Ids of parts and of the ids between them, and for each id whether it is a blank."""
    ids, blanks = list(parts[0]), [False] * len(parts[0])
    for (more, blank), part in zip(between, parts[1:], strict=True):
        ids += [*more, *part]
        blanks += [blank] * len(more) + [False] * len(part)
    return ids, blanks


def conversation_ids(
    policy: Policy, messages: Sequence[dict[str, Any]], *, since: int = 0
) -> list[tuple[list[int], bool]]:
    """Token ids of a conversation in pieces, and for each piece whether an assistant wrote it in the messages from
    `since` on. An assistant's piece begins where `prompt_ids` of the earlier messages ends, and ends with the turn.

    Raises ValueError as `prompt_ids` does, and for a template that rewrites earlier turns.
    """
    chat, turns = _Chat(policy, messages), list(messages)
    whole, done, pieces = chat.rendered(turns), 0, list[tuple[list[int], bool]]()
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or i < since:
            continue
        before, after = chat.rendered(turns[:i], answered=True), chat.rendered(turns[: i + 1])
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"messages: the chat template does not write message {i} as the continuation of those before it; give "
                "a row for each turn, with prompt and completion as text"
            )
        pieces += [(chat.ids(whole[done : len(before)]), False), (chat.ids(whole[len(before) : len(after)]), True)]
        done = len(after)
    return [*pieces, (chat.ids(whole[done:]), False)]


class _Chat:
    """A tokenizer's chat template. A mark replaces the special tokens that messages spell, through the template, so
    that they are tokenised as text afterwards."""

    def __init__(self, policy: Policy, messages: Sequence[dict[str, Any]], *, blank: str | None = None) -> None:
        if not policy.tokenizer.chat_template:
            raise ValueError(
                "prompt is chat messages, but the model's tokenizer has no chat template; give plain text (chat=False)"
            )
        self.policy, self.blank = policy, blank
        self.specials = [*([] if blank is None else [blank]), *special_texts(policy.tokenizer)]
        said = [str(turn["content"]) for turn in messages]
        self.mark = next(c for c in map(chr, range(0xE000, 0xF900)) if not any(c in text for text in said))
        self.spelled = re.compile("|".join(map(re.escape, self.specials)) or r"(?!)")

    def hide(self, text: str) -> str:
        """The text, with a mark for each special token that it spells."""
        return self.spelled.sub(lambda found: f"{self.mark}{self.specials.index(found[0])}{self.mark}", text)

    def rendered(self, messages: Sequence[dict[str, Any]], *, answered: bool = False) -> str:
        """The template's text, with marks; `answered`: up to the start of the assistant's answer."""
        turns = [t | {"content": self.hide(t["content"])} if isinstance(t["content"], str) else t for t in messages]
        return str(self.policy.tokenizer.apply_chat_template(turns, add_generation_prompt=answered, tokenize=False))

    def ids(self, text: str) -> list[int]:
        """Token ids of a text of `rendered` and `hide`."""
        return self.ids_and_blanks(text)[0]

    def ids_and_blanks(self, text: str) -> tuple[list[int], list[bool]]:
        """The same, and for each id whether it is a blank."""
        parts = re.split(rf"{self.mark}(\d+){self.mark}", text)
        rendered = [text_ids(self.policy, part, special=True) for part in parts[::2]]
        shown = [self.specials[int(number)] for number in parts[1::2]]
        gap: list[int] = [] if self.policy.spec.mask_id is None else [self.policy.spec.mask_id]
        return _joined(rendered, [(gap, True) if s == self.blank else (text_ids(self.policy, s), False) for s in shown])


def text_ids(policy: Policy, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text; `special`: special tokens in the text are not split into characters. Raises ValueError for
    text outside the model's vocabulary."""
    try:
        return policy.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)
    except BaseException as error:  # the tokenizers library raises a bare Exception, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"text {text!r} cannot be tokenised by this model: {error}") from error


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the special tokens, longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda text: (-len(text), text))


def decode(policy: Policy, rollout: Rollout) -> list[str]:
    """Each row's completion as text: the policy's tokens up to the first end token, without special tokens."""
    return decode_ids(policy, chosen_ids(rollout))


def decode_ids(policy: Policy, chosen: list[list[int]]) -> list[str]:
    """The texts of `chosen_ids`."""
    return policy.tokenizer.batch_decode([before_end(policy, ids) for ids in chosen], skip_special_tokens=True)


def graded_texts(policy: Policy, rollout: Rollout, problems: Sequence[Problem], chosen: list[list[int]]) -> list[str]:
    """What a task grades per row: the completion (`chosen`), or the whole filled text of a problem with blanks."""
    texts = decode_ids(policy, chosen)
    if all(problem.blank is None for problem in problems):
        return texts
    whole, group = filled(policy, rollout), rollout.group_size
    return [text if problems[i // group].blank is None else whole[i] for i, text in enumerate(texts)]


def filled(policy: Policy, rollout: Rollout) -> list[str]:
    """Each row's whole text, prompt and completion, without special tokens. An end token ends the text only behind the
    prompt's last token."""
    masks = (rollout.tokens, rollout.attention_mask, rollout.completion_mask)
    rows = []
    for row in zip(*(mask.tolist() for mask in masks), strict=True):
        ids, chosen = zip(*((token, own) for token, kept, own in zip(*row, strict=True) if kept), strict=True)
        behind = max((i + 1 for i, own in enumerate(chosen) if not own), default=0)
        rows.append([*ids[:behind], *before_end(policy, list(ids[behind:]))])
    return policy.tokenizer.batch_decode(rows, skip_special_tokens=True)


def chosen_ids(rollout: Rollout) -> list[list[int]]:
    """Each row's tokens that the policy chose, moved to the host in one transfer."""
    tokens = rollout.tokens.masked_fill(~rollout.completion_mask, -1)
    return [[token for token in row if token >= 0] for row in tokens.tolist()]


def before_end(policy: Policy, ids: list[int]) -> list[int]:
    """The ids before the first end token."""
    return ids[: next((i for i, token in enumerate(ids) if token in policy.spec.eos_ids), len(ids))]


def written_tokens(policy: Policy, rollout: Rollout) -> list[list[dict[str, Any]]]:
    """Per row every token of the completion as plain data: id, text, the step that committed it (-1: still masked) and
    its probability as sampled (None if not finite)."""
    chosen = rollout.completion_mask.any(0)
    width, rows = int(chosen.nonzero()[0]) if chosen.any() else len(chosen), []
    parts = (rollout.tokens, rollout.unmask_step, rollout.logprobs.exp())
    for ids, steps, probabilities in zip(*(part.tolist() for part in parts), strict=True):
        kept = [j for j in range(width, len(ids)) if steps[j] >= 0 or ids[j] == policy.spec.mask_id]
        texts = [policy.tokenizer.decode([ids[j]]) for j in kept]
        rows.append(
            [
                {"id": ids[j], "text": text, "step": steps[j], "probability": p if math.isfinite(p) else None}
                for j, text, p in zip(kept, texts, (probabilities[j] for j in kept), strict=True)
            ]
        )
    return rows


def usual_length(policy: Policy, task: Task) -> int:
    """Tokens of the first problem's solution if the prompt is plain text, else 256; 0 with blanks."""
    problem = task[0]
    if problem.blank is not None:
        return 0
    if isinstance(problem.prompt, str) and problem.solution is not None:
        return len(prompt_ids(policy, problem.solution))
    return 256
