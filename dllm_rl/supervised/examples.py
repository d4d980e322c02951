"""Convert rows of a data set, or problems with solutions, to the tokens that a supervised step learns from."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as quote
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_rl.decoding.chat import check_chat, conversation_ids
from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.decoding.tokens import text_ids
from dllm_rl.decoding.vocabulary import begin_ids
from dllm_rl.models.base import Policy
from dllm_rl.supervised.sft import SFT
from dllm_rl.tasks.base import Problem
from dllm_rl.tasks.datasets import DATASET, Source

DEFAULT_MAX_LENGTH = 1024  # of a model of more positions
Piece = tuple[list[int], bool]  # token ids, and whether they are an answer
# Marks of a message that is learned (1) or only read (0): OpenAI's, then axolotl's two, then ms-swift's.
LEARNED_MARKS = ("weight", "train", "training", "loss")
UNSUPPORTED_MARKS = ("train_detail", "training_detail", "loss_scale", "loss_mask", "loss_weight")
# Columns that say what to learn or what the model reads, and that are not supported: what to do about each.
UNSUPPORTED_COLUMNS = {
    "label": "KTO's mark of a completion that is not to be learned; leave such rows out, or drop the column",
    **dict.fromkeys(
        (*LEARNED_MARKS, *UNSUPPORTED_MARKS, "sample_weight"),
        "rows count alike; leave out rows that are not to be learned, and drop the column",
    ),
    **dict.fromkeys(
        ("labels", "completion_mask", "assistant_mask", "assistant_masks"),
        "what is learned follows from messages, or from prompt and completion; give these, and drop the column",
    ),
    **dict.fromkeys(
        ("system", "system_prompt", "history", "functions", "documents"),
        "put it into a message before the answer, or drop the column",
    ),
    "suffix": "a completion between two texts is not learned; drop the column, or leave such rows out",
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"),
        "the model reads only text; leave such rows out, or drop the column",
    ),
}


@dataclass(frozen=True)
class Example:
    """A row of the data set as tokens, and which of them the model learns."""

    tokens: Int[Tensor, " T"]
    learned: Bool[Tensor, " T"]


def read_examples(
    recipe: SFT,
    policy: Policy,
    dataset: Any,
    source: Source = DATASET,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> list[Example]:
    """Convert the rows of a data set to examples. Leave out rows longer than max_length, or whose completion is longer
    than completion_length, and report their number.

    Args:
        recipe: Recipe with the options for rows.
        policy: Policy with the tokenizer.
        dataset: Rows to convert.
        source: The recipe's field with the rows, for messages.
        say: Function that reports the number of rows that are left out.

    Raises:
        ValueError: A row is invalid, or all rows are too long.
    """
    longest = most_tokens(recipe.max_length, policy)
    if recipe.completion_length and policy.spec.attention == "encoder_decoder":
        raise ValueError(
            f"completion_length={recipe.completion_length} is not for {policy.spec.name!r}: end tokens fill its last "
            "canvas anyway; leave it out"
        )
    examples: list[Example] = []
    for index in range(len(dataset)):
        try:
            read = example(recipe, policy, dataset[index])
        except CompletionTooLong:
            continue
        # A missing role, a number in place of text, no messages.
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{source.row(index)}: {error}") from None
        if len(read.tokens) <= longest:  # not truncated, since the model would learn to stop in the middle
            examples.append(read)
    limits = f"max_length={longest}"
    if recipe.completion_length is not None:
        limits += f", or their completion than completion_length={recipe.completion_length},"
    if not examples:
        raise ValueError(f"{source.name}: all of {len(dataset)} rows are longer than {limits.rstrip(',')}; raise it")
    if num_longer := len(dataset) - len(examples):
        say(f"{source.name}: {num_longer} of {len(dataset)} rows are longer than {limits} and left out")
    return examples


class CompletionTooLong(ValueError):
    """The completion of a row has more tokens than `completion_length`."""


def most_tokens(max_length: int | None, policy: Policy) -> int:
    """Return the most tokens of a row. Raises ValueError if `max_length` is above the model's positions."""
    positions = policy.spec.max_length
    if max_length is not None and positions is not None and max_length > positions:
        raise ValueError(f"max_length={max_length} is more than the model's {positions} positions; lower it")
    return max_length or min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)


def prompt_and_answer(policy: Policy, item: Example) -> tuple[list[int], list[int]]:
    """Split an example into the tokens before the learned ones, and the learned tokens. Raises ValueError unless the
    learned tokens are one answer at the end.
    """
    first = int(item.learned.long().argmax())
    if not item.learned[first:].all():
        raise ValueError(
            f"has several answers, and {policy.spec.name!r} learns one, at the row's end: give prompt and completion, "
            "with earlier turns in the prompt"
        )
    return item.tokens[:first].tolist(), item.tokens[first:].tolist()


def example(recipe: SFT, policy: Policy, row: Mapping[str, Any]) -> Example:
    """Convert a row to an example, up to the end token of its last answer. A causal model does not learn the first
    token.
    """
    completion_length = recipe.completion_length
    row = {name: _without_none(value) for name, value in row.items() if value is not None}
    _check_columns(row)
    arguments = _template_arguments(row)
    only_answers = True
    if "messages" in row and "completion" in row:
        raise ValueError("has messages and a completion, and one of them would not be learned; drop the other column")
    if "messages" in row:
        only_answers = recipe.assistant_only_loss
        messages, answers = _answers(row["messages"], only_answers=only_answers)
        pieces = conversation_ids(policy, messages, answers, template_arguments=arguments)
    elif "prompt" in row and "completion" in row:
        only_answers = recipe.completion_only_loss
        pieces = _pair(policy, row["prompt"], row["completion"], arguments, only_answers=only_answers)
    elif "text" in row:
        _check_plain_text(arguments)
        if not isinstance(row["text"], str):
            raise ValueError(f"text={quote(row['text'])} is not text")
        pieces = [(begin_ids(policy), False), (text_ids(policy, row["text"]), True)]
    else:
        raise ValueError(f"has no columns messages, prompt and completion, or text, only {', '.join(sorted(row))}")
    # A diffusion model learns end tokens up to completion_length.
    fills_completion = policy.spec.attention not in ("causal", "encoder_decoder")
    tokens, learned, has_end = _joined(pieces, policy.spec.eos_ids, only_answers=only_answers)
    if tokens:
        num_end_tokens = 0 if has_end else 1
        if completion_length is not None and fills_completion:
            # The completion is the last answer, also if the prompt is learned; a chat without an answer is one itself.
            is_answer = _joined(pieces, policy.spec.eos_ids, only_answers=True)[1] or learned
            length = [*reversed(is_answer), False].index(False)
            num_end_tokens = completion_length - length
            if num_end_tokens < 0:
                raise CompletionTooLong(f"its completion has {length} tokens, not {completion_length} at most")
        tokens += [policy.spec.eos_ids[0]] * num_end_tokens
        learned += [True] * num_end_tokens
        learned[0] = learned[0] and fills_completion  # a causal model or encoder has no state before the first token
    if not any(learned):
        raise ValueError("has nothing to learn: no assistant's message, or an empty text")
    result = Example(torch.tensor(tokens), torch.tensor(learned))
    if policy.spec.attention == "encoder_decoder":
        prompt_and_answer(policy, result)
    return result


def _without_none(value: Any) -> Any:
    """Return a value without the keys that are None, which files and data sets fill in where rows differ. The content
    of a message may be None if it has calls.
    """
    if isinstance(value, Mapping):
        return {
            key: _without_none(each) for key, each in value.items() if each is not None or key in ("content", "role")
        }
    return [_without_none(each) for each in value] if isinstance(value, list | tuple) else value


def _check_columns(row: Mapping[str, Any]) -> None:
    """Raise ValueError for a column that says what to learn or to read, and that is not supported."""
    for name, advice in UNSUPPORTED_COLUMNS.items():
        value = row.get(name)
        is_empty = value is None or (isinstance(value, list | tuple | str) and not value)
        # 1 is what an unmarked row has. The label of a text is its class.
        is_usual = isinstance(value, bool | int | float) and (value == 1 or (name == "label" and "text" in row))
        if not is_empty and not is_usual:
            raise ValueError(f"{name}={quote(value)} is not supported: {advice}")


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the chat template that a row gives: its tools and its `chat_template_kwargs`.

    Raises:
        ValueError: One of them is malformed.
    """
    arguments = row.get("chat_template_kwargs", {})
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(f"chat_template_kwargs={quote(arguments)} must be a dict of the template's variables")
    if not (tools := row.get("tools")):
        return dict(arguments)
    try:
        read = json.loads(tools) if isinstance(tools, str) else tools  # TRL's rows may have them as JSON text
    except ValueError:
        read = None
    if not isinstance(read, list) or not all(isinstance(tool, Mapping) for tool in read):
        raise ValueError(f"tools={quote(tools)} must be a list of JSON schemas, or its JSON text")
    return {**arguments, **({"tools": read} if read else {})}


def _check_plain_text(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of a chat template beside a text, which no template renders."""
    for name, value in arguments.items():
        raise ValueError(f"{name}={quote(value)} needs chat messages, and the row is plain text; drop it")


def _answers(
    messages: Any, *, only_answers: bool, since: int = 0, columns: str = "messages"
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return messages without their LEARNED_MARKS, and the indices of those that are learned as answers: the
    assistant's from the index `since` on, except those of mark 0.

    Raises:
        ValueError: A message is malformed, or its mark contradicts what is learned.
    """
    check_chat(messages, columns)
    answers = []
    for number, message in enumerate(messages):
        is_answer = message["role"] == "assistant" and number >= since
        marks = {name: message[name] for name in LEARNED_MARKS if name in message}
        for name, value in marks.items():
            problem = ""
            if value not in (0, 1):
                problem = "must be 0 or 1"
            elif value and only_answers and not is_answer:
                problem = "asks to learn it, and only the assistant's messages after the prompt are learned"
            elif not value and not only_answers:
                problem = "needs assistant_only_loss=True, or completion_only_loss=True of prompt and completion"
            if problem:
                raise ValueError(f"{name}={quote(value)} of message {number}, of role {message['role']!r}, {problem}")
        for name in filter(message.__contains__, UNSUPPORTED_MARKS):
            raise ValueError(
                f"{name}={quote(message[name])} of message {number} is not supported: all of a message is learned, or, "
                "with weight=0, none; leave it out"
            )
        if is_answer and all(marks.values()):
            answers.append(number)
    unmarked = [{key: value for key, value in message.items() if key not in LEARNED_MARKS} for message in messages]
    return unmarked, answers


def _pair(
    policy: Policy, prompt: Any, completion: Any, arguments: Mapping[str, Any], *, only_answers: bool
) -> list[Piece]:
    """Return the pieces of a prompt and its completion, each text or messages. A text completion of chat messages
    becomes the assistant's message.
    """
    for name, value in {"prompt": prompt, "completion": completion}.items():
        if not isinstance(value, str | list | tuple):
            raise ValueError(f"{name}={quote(value)} is neither text nor chat messages")
    turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    before = [] if isinstance(prompt, str) else [*prompt]
    messages, answers = _answers(
        [*before, *turns], only_answers=only_answers, since=len(before), columns="prompt and completion"
    )
    last = messages[-1]
    is_answer = len(turns) == 1 and last["role"] == "assistant" and isinstance(last["content"], str)
    if isinstance(prompt, str):
        _check_plain_text(arguments)
        if not is_answer or last.keys() != {"role", "content"}:
            raise ValueError(
                f"completion={quote(completion)} must be text, or one assistant's message of text, since the prompt is "
                "text; or give the prompt as messages"
            )
        begin = [*begin_ids(policy), *text_ids(policy, prompt)]  # as `prompt_ids`, which refuses an empty prompt
        return [(begin, False), (text_ids(policy, last["content"], continues=prompt != ""), bool(answers))]
    if before and before[-1]["role"] == "assistant" and is_answer:  # the completion continues the turn
        start = prompt_ids(policy, messages[:-1], template_arguments=arguments)
        return [(start, False), (text_ids(policy, last["content"], continues=True), bool(answers))]
    return conversation_ids(policy, messages, answers, template_arguments=arguments)


def _joined(
    pieces: list[Piece], end_tokens: Sequence[int], *, only_answers: bool
) -> tuple[list[int], list[bool], bool]:
    """Join the pieces up to the end token of the last answer; return the tokens, which of them are learned, and whether
    there is such an end token.
    """
    if not only_answers and not any(is_answer for _, is_answer in pieces):  # a chat without an assistant's message
        everything = [token for ids, _ in pieces for token in ids]
        return everything, [True] * len(everything), not {*everything}.isdisjoint(end_tokens)
    while pieces and not pieces[-1][1]:
        pieces = pieces[:-1]  # drop what follows the last answer
    tokens: list[int] = []
    learned: list[bool] = []
    end_positions: list[int] = []
    num_after_end = 0
    for ids, is_answer in pieces:
        end_positions = [position for position, token in enumerate(ids, 1) if is_answer and token in end_tokens]
        # Tokens of the chat template after the end token, such as a line break.
        num_after_end = len(ids) - end_positions[0] if end_positions else 0
        tokens += ids
        learned += [is_answer or not only_answers] * (len(ids) - num_after_end) + [not only_answers] * num_after_end
    length = len(tokens) - num_after_end
    return tokens[:length], learned[:length], bool(end_positions)


def check_no_blanks(problems: Sequence[Problem]) -> None:
    """Raise ValueError if a problem has blanks, which a warm-up cannot learn. It needs no model."""
    if any(problem.blank is not None for problem in problems):
        raise ValueError("a problem has blanks, and the warm-up appends solutions to the prompt; use warmup.steps=0")


def solution_examples(policy: Policy, problems: Sequence[Problem], *, max_new_tokens: int) -> list[Example]:
    """Return the problems' solutions as examples of `max_new_tokens` learned tokens, as if the policy had sampled them.

    A diffusion model learns all end tokens after a solution; another model stops at the first.

    Raises:
        ValueError: A solution is missing or too long, or a problem has blanks.
    """
    check_no_blanks(problems)
    attention = policy.spec.attention
    end_token = policy.spec.eos_ids[0] if policy.spec.eos_ids else policy.pad_id
    examples = []
    for problem in problems:
        prompt = prompt_ids(policy, problem.prompt)
        if problem.solution is None:
            raise ValueError(
                f"solution is None for the problem {problem.prompt!r}; warm-up needs a reference completion"
            )
        solution = text_ids(policy, problem.solution, continues=problem.prompt != "")
        num_end_tokens = max_new_tokens - len(solution)
        if num_end_tokens < 0:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} is too short for a solution of {len(solution)}: {problem.solution!r}"
            )
        num_learned = max_new_tokens
        if attention in ("causal", "encoder_decoder"):
            num_learned = min(max_new_tokens, len(solution) + 1)
        tokens = torch.tensor([*prompt, *solution, *[end_token] * num_end_tokens])
        positions = torch.arange(len(tokens)) - len(prompt)
        learned = (positions >= 0) & (positions < num_learned)
        if attention == "encoder_decoder":  # end tokens fill its last canvas anyway
            tokens, learned = tokens[: len(prompt) + num_learned], learned[: len(prompt) + num_learned]
        examples.append(Example(tokens, learned))
    return examples
