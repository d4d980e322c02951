"""Problems to prompts, with blanks for infilling."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from dllm_rl.decoding.chat import NO_ARGUMENTS, Chat
from dllm_rl.decoding.tokens import BLANK, Piece, quoted, text_ids
from dllm_rl.decoding.vocabulary import begin_ids
from dllm_rl.models.base import Policy
from dllm_rl.tasks.base import Problem
from dllm_rl.types.rollouts import Prompts

# A causal model predicts each token from the tokens before it, so nothing predicts the first token of a row.
NEEDS_TOKEN = "a causal model samples after a token: begin the prompt with text, or let the tokenizer add BOS"


def encode(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    num_generations: int | Sequence[int] = 1,
    seeds: Sequence[int] | None = None,
    reads_order: bool = True,
) -> Prompts:
    """Tokenize the prompts of problems, each in `num_generations` rows: one number, or one for each problem.

    Chat messages are rendered with the chat template, and plain text begins with what the tokenizer adds before a text
    (`begin_ids`). Each blank becomes one mask token, which the sampler fills in. `reads_order` is explained in
    `Prompts`.
    """
    tokenized = [ids_and_blanks(policy, problem.prompt, problem.blank) for problem in problems]
    ids = [row_ids for row_ids, _ in tokenized]
    blanks = [row_blanks for _, row_blanks in tokenized]
    prompts = Prompts.from_ids(
        ids, pad_id=policy.pad_id, num_generations=num_generations, seeds=seeds, open_positions=blanks
    )
    return replace(prompts, reads_order=reads_order)


def prompt_ids(
    policy: Policy,
    prompt: str | list[dict[str, str]],
    blank: str | None = None,
    *,
    template_arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> list[int]:
    """Return the token ids of a prompt, as rollouts, evaluations, scores, the server and SFT read it.

    A plain text begins with `begin_ids`. Of a chat, only the template's special tokens are among the ids.
    `template_arguments` is explained in `conversation_ids`.
    """
    return ids_and_blanks(policy, prompt, blank, template_arguments=template_arguments)[0]


def ids_and_blanks(
    policy: Policy,
    prompt: str | list[dict[str, str]],
    blank: str | None,
    *,
    template_arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a prompt, and for each id whether it is a mask token that replaces the text `blank`.

    `template_arguments` is explained in `conversation_ids`. Raise ValueError for a prompt that the model cannot read.
    """
    if blank == "":
        raise ValueError(f"blank={blank!r} is empty; leave it at None")
    if blank is not None and policy.spec.mask_id is None:
        raise ValueError(
            f"blank={blank!r} is to be filled in, and the model has no mask token; leave it at None, or use a "
            "diffusion model"
        )
    if isinstance(prompt, str):
        pieces: list[Piece] = []
        for text in [prompt] if blank is None else prompt.split(blank):
            pieces += [BLANK, (text, {})]
        del pieces[0]  # the blank before the first text
    else:
        chat = Chat(policy, prompt, blank=blank, template_arguments=template_arguments)
        # The template would end an assistant's turn that the model continues, so this is appended after rendering.
        answer_start = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
        if not isinstance(answer_start, str):
            raise ValueError(
                f"prompt={quoted(prompt)}: the last assistant turn, which the model continues, is not text; give its "
                "content as text, or leave the turn out"
            )
        messages = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
        text = chat.render(messages, add_generation_prompt=True) + chat.mark_special_tokens(answer_start, answer=True)
        pieces = chat.pieces(text)
    ids = begin_ids(policy) if isinstance(prompt, str) else []
    blanks = [False] * len(ids)
    read = cache(partial(text_ids, policy))  # a prompt with many blanks has equal pieces, such as empty ones
    num_begin = len(ids)
    for piece, reading in pieces:
        if piece is not None:
            piece_ids = read(piece, **reading, continues=len(ids) > num_begin)
        else:
            assert policy.spec.mask_id is not None, "a blank was refused"
            piece_ids = [policy.spec.mask_id]
        ids += piece_ids
        blanks += [piece is None] * len(piece_ids)
    if not ids and policy.spec.attention == "causal":
        raise ValueError(f"prompt={prompt!r} has no token, and {NEEDS_TOKEN}")
    return ids, blanks
