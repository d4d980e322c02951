"""OpenAI's completions and chat completions API: read and check a request, and write the response.

This module tokenizes and decodes in the HTTP server's thread; only the sampler runs in the batcher's thread.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, takewhile
from typing import Annotated, Any, Literal

from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.decoding.texts import before_end, completion_token_ids, text_of, written_logprobs
from dllm_rl.decoding.tokens import text_ids
from dllm_rl.diagnostics.traces import trace_rows
from dllm_rl.integrations.serving.batching import Refused
from dllm_rl.integrations.serving.settings import ServerSettings
from dllm_rl.models.base import Policy
from dllm_rl.samplers import Sampler
from dllm_rl.samplers.with_settings import with_settings
from dllm_rl.types.rollouts import Rollout

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
except ModuleNotFoundError as error:
    raise ImportError(f"dllm-rl serve needs {error.name}: pip install -e '.[serve]'") from None

MAX_COMPLETIONS = 128  # per prompt, as in OpenAI's API
MAX_STOP_TEXTS = 4
MAX_CHARACTER_TOKENS = 4  # bytes of a character in UTF-8
SETTINGS = {"temperature", "top_p", "top_k", "block_size", "diffusion_steps", "rank", "commit", "cache"}  # of a sampler
# Fields that do not change the response.
IGNORED_FIELDS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields of features that the samplers lack, each with the values that turn the feature off. Other values are refused.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),  # of a chat; completions have it
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_logprobs": (0,),  # the sampler records the log-prob of the chosen token only
}


class TextPart(BaseModel):
    """A part of a chat message's content."""

    type: Literal["text"]
    text: str


Method = str | dict[str, Any]  # a class's name, or the form of `records.to_json`
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[int], Field(min_length=1)]
Prompts = Annotated[list[str | TokenIds], Field(min_length=1)]


class StreamOptions(BaseModel):
    """The field `stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None


class Message(BaseModel):
    """A chat message. A list of text parts counts as their joined text."""

    model_config = ConfigDict(strict=True, extra="allow")  # the chat template reads the other fields
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        message = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        return message


class Fields(BaseModel):
    """The fields that requests for completions and for chat completions share.

    If a field has a description, an error quotes it as what the value must be, in place of pydantic's message.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_COMPLETIONS)
    best_of: int | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Count | None = None
    block_size: Count | None = None
    diffusion_steps: Count | None = None
    rank: Method | None = None
    commit: Method | None = None
    cache: Method | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOP_TEXTS)] = Field(
        default=[], description=f"a text or up to {MAX_STOP_TEXTS} texts"
    )
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    trace: bool = False


class CompletionFields(Fields):
    """The fields of a request for completions."""

    prompt: str | TokenIds | Prompts = Field(
        description="a text, a list of texts, token ids, or a list of lists of them"
    )
    suffix: str = ""
    max_tokens: Count | None = None
    logprobs: int | None = Field(None, ge=0)


class ChatFields(Fields):
    """The fields of a request for chat completions."""

    messages: list[Message] = Field(min_length=1, description="a list of objects, each with role and a text as content")
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False


@dataclass(frozen=True)
class TextRequest:
    """A checked request for completions.

    Args:
        fields: The request's fields.
        prompts: Token ids of each prompt.
        suffix: Token ids of the text after the completion; empty if there is none.
        max_tokens: Largest number of tokens of a completion.
        sampler: Sampler of the completions.
    """

    fields: CompletionFields | ChatFields
    prompts: list[list[int]]
    suffix: list[int]
    max_tokens: int
    sampler: Sampler

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is chat messages."""
        return isinstance(self.fields, ChatFields)

    @property
    def logprobs(self) -> bool:
        """Whether the response has log-probs of the completion."""
        return self.fields.logprobs is not None and self.fields.logprobs is not False


def read_request(
    data: bytes, policy: Policy, defaults: Sampler, server: ServerSettings, *, is_chat: bool
) -> TextRequest:
    """Read and check a request's body.

    Args:
        data: Body of the request.
        policy: Policy with the tokenizer. Its module is not used.
        defaults: The server's sampler.
        server: Name of the model, and limits on a request.
        is_chat: Whether the request is for chat completions.

    Raises:
        Refused: A field is unknown, or has a value that the server does not support.
    """
    fields = _read_fields(ChatFields if is_chat else CompletionFields, data)
    if fields.model not in (None, server.name):
        raise Refused(404, f"model={fields.model!r} is not served here; use model={server.name!r}", "model")
    if fields.best_of not in (None, fields.n):
        raise Refused(400, f"best_of={fields.best_of!r} must be n={fields.n}; leave it out", "best_of")
    if fields.stream_options is not None and not fields.stream:
        raise Refused(400, "stream_options needs stream=true; leave it out", "stream_options")
    if not all(0 <= token < policy.vocab_size for token in fields.stop_token_ids):
        raise Refused(400, f"stop_token_ids: token ids must lie in [0, {policy.vocab_size})", "stop_token_ids")
    settings = fields.model_dump(include=SETTINGS, exclude_none=True)
    if fields.cache == "none":  # as the command's option: without the server's cache
        settings["cache"] = None
    if policy.spec.attention == "encoder_decoder" and not fields.temperature:
        settings.pop("temperature", None)  # `Renoise` has its own schedule of temperatures
    suffix: list[int] = []
    if isinstance(fields, ChatFields):
        messages = [message.for_template() for message in fields.messages]
        prompts = [_tokenized(policy, messages, "messages")]
        max_tokens = fields.max_completion_tokens or fields.max_tokens
    else:
        prompts = _prompts(fields.prompt, policy)
        suffix = _suffix_ids(fields, policy)
        max_tokens = fields.max_tokens
        temperature = settings.get("temperature", getattr(defaults, "temperature", None))
        if fields.logprobs is not None and (fields.logprobs > 1 or (fields.logprobs == 1 and temperature)):
            chosen = f"logprobs={fields.logprobs}: the sampler records the log-prob of the chosen token only"
            raise Refused(400, f"{chosen}; use 0, or 1 at temperature 0", "logprobs")
    longest = max(map(len, prompts)) + len(suffix)
    max_tokens = _checked_length(policy, longest, max_tokens, defaults.max_new_tokens, server)
    if (fields.diffusion_steps or 0) > server.max_tokens:
        steps = f"diffusion_steps={fields.diffusion_steps} is above the server's max_tokens={server.max_tokens}"
        raise Refused(400, f"{steps}; use less", "diffusion_steps")
    try:
        sampler = _sampler(policy, settings, defaults, max_tokens)
    except ValueError as error:
        raise Refused(400, str(error)) from None
    rows = len(prompts) * fields.n
    if rows > server.max_waiting:
        count = f"{len(prompts)} prompts x n={fields.n} are {rows} completions"
        raise Refused(400, f"{count}; ask for {server.max_waiting}", "n")
    return TextRequest(fields, prompts, suffix, max_tokens, sampler)


def _read_fields(model: type[CompletionFields] | type[ChatFields], data: bytes) -> CompletionFields | ChatFields:
    """Parse and check a body. A null, and a value that turns an unsupported feature off, count as left out."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON; send an object with Content-Type: application/json") from None
    if not isinstance(values, dict):
        raise Refused(400, f"the body is a JSON {type(values).__name__}; send an object")
    ignored = {name for name, value in values.items() if value is None or value in UNSUPPORTED_FIELDS.get(name, ())}
    values = {name: value for name, value in values.items() if name not in IGNORED_FIELDS | ignored}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _refusal(model, values, error) from None


def _refusal(model: type[Fields], values: Mapping[str, Any], error: ValidationError) -> Refused:
    """Convert the first error to a line with the field, its value, and what it should be."""
    first = error.errors()[0]
    if not first["loc"]:  # pydantic cannot print the name
        return Refused(400, "a field's name has half a character (a lone surrogate); leave the field out")
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))
        return Refused(400, f"{name}={_quoted(first['input'])} is not supported by this server; leave it out", field)
    given = f"{field}={_quoted(values[field])}" if field in values else field
    description = model.model_fields[field].description
    expected = f"must be {description}" if description else first["msg"].removeprefix("Input ")
    return Refused(400, f"{given} {expected}", field)


def _quoted(value: Any) -> str:
    """Return a JSON value as text of at most 80 characters, for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _prompts(prompt: str | list[int] | list[str | list[int]], policy: Policy) -> list[list[int]]:
    """Return the token ids of each prompt of a completions request."""
    ids = []
    for item in [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt:
        if isinstance(item, str):
            ids.append(_tokenized(policy, item, "prompt"))
            continue
        if not all(0 <= token < policy.vocab_size for token in item):
            raise Refused(400, f"prompt: token ids must lie in [0, {policy.vocab_size})", "prompt")
        if policy.spec.mask_id in item:
            mask = f"token {policy.spec.mask_id} is the mask token, which samplers fill in"
            raise Refused(400, f"prompt: {mask}; leave it out, or give the text after it as suffix", "prompt")
        ids.append(item)
    return ids


def _suffix_ids(fields: CompletionFields, policy: Policy) -> list[int]:
    """Return the token ids of the text after the completion, or an empty list if the request has none."""
    if not fields.suffix:
        return []
    if policy.spec.attention != "full":
        raise Refused(
            400,
            f"suffix: {policy.spec.attention!r} attention does not see the text after a completion; leave it out",
            "suffix",
        )
    if fields.cache not in (None, "none"):
        raise Refused(400, f"cache={_quoted(fields.cache)} does not work with a suffix; leave it out", "cache")
    return _tokenized(policy, fields.suffix, "suffix", read=partial(text_ids, continues=True))


def _tokenized(
    policy: Policy, prompt: Any, field: str, read: Callable[[Policy, Any], list[int]] = prompt_ids
) -> list[int]:
    try:
        return read(policy, prompt)
    except ValueError as error:
        raise Refused(400, f"{field}: {error}", field) from None


def _checked_length(policy: Policy, longest: int, requested: int | None, default: int, server: ServerSettings) -> int:
    """Return a completion's max_tokens: the requested number, else the server's default or what fits the model.

    `longest` is the largest number of tokens of a prompt, with its suffix.
    """
    canvas = policy.spec.block_size if policy.spec.attention == "encoder_decoder" else None
    tokens_left = None if policy.spec.max_length is None else policy.spec.max_length - longest
    if tokens_left is not None and canvas is not None:
        tokens_left = tokens_left // canvas * canvas
    needed = 1 if requested is None else requested
    if tokens_left is not None and tokens_left < needed:
        canvases = "" if canvas is None else f", in whole canvases of {canvas},"
        raise Refused(
            400,
            f"a prompt of {longest} tokens and max_tokens={needed}{canvases} exceed the model's "
            f"{policy.spec.max_length} positions; shorten them",
            "max_tokens" if tokens_left > 0 else "prompt",
        )
    if requested is None:
        return min(default, server.max_tokens, *([] if tokens_left is None else [tokens_left]))
    if requested > server.max_tokens:
        raise Refused(400, f"max_tokens={requested} is above the server's {server.max_tokens}; use less", "max_tokens")
    return requested


def _sampler(policy: Policy, settings: dict[str, Any], defaults: Sampler, max_tokens: int) -> Sampler:
    """Return the sampler of a request's completions.

    An encoder-decoder model samples whole canvases: `max_new_tokens` is rounded up, and `choice` cuts off the surplus.
    """
    length = max_tokens
    if policy.spec.attention == "encoder_decoder" and policy.spec.block_size is not None:
        length = math.ceil(length / policy.spec.block_size) * policy.spec.block_size
    return with_settings(policy, settings | {"max_new_tokens": length}, defaults)


@dataclass(frozen=True)
class Choice:
    """One completion of a response.

    Args:
        text: Text before the first end token, stop token and stop text, with the last two if the request says so.
        tokens: Text of each token up to and including the end or stop token, or of `text` if a stop text ended it
            (`token_texts`).
        offsets: Where in `text` each of `tokens` begins; and the end of the last.
        logprobs: Log-prob of each of `tokens` in nats (`written_logprobs`); None if it is not finite.
        num_tokens: Number of tokens up to and including the end or stop token. A stop text does not reduce it.
        is_ended: Whether an end token, a stop token or a stop text ended the completion. False: it reached its full
            length.
        trace: Trace of the completion, as in a `.jsonl` file. None: not requested.
    """

    text: str
    tokens: list[str]
    offsets: list[int]
    logprobs: list[float | None]
    num_tokens: int
    is_ended: bool
    trace: dict[str, Any] | None = None


def choice(policy: Policy, rollout: Rollout, request: TextRequest) -> Choice:
    """Convert a rollout of one row to a choice.

    Raises:
        Refused: A trace is requested, and the sampler rewrites tokens.
    """
    fields = request.fields
    sampled = completion_token_ids(rollout)[0][: request.max_tokens]
    before = before_end(policy, sampled)
    before = [*takewhile(lambda token: token not in fields.stop_token_ids, before)]
    is_ended = len(before) < len(sampled)
    ids = sampled[: len(before) + is_ended]  # includes the end token, because clients that score need its log-prob
    if is_ended and fields.include_stop_str_in_output and ids[-1] in fields.stop_token_ids:
        before = ids
    written = written_logprobs(rollout)[0][rollout.completion_mask[0]].tolist()
    logprobs = [x if math.isfinite(x) else None for x in written]
    text = text_of(policy, before)
    tokens, offsets = token_texts(policy, ids, text)
    if ids and not tokens[-1] and ids[-1] in fields.stop_token_ids:  # left out of the text, as an end token is
        tokens[-1] = policy.tokenizer.decode([ids[-1]], skip_special_tokens=False)
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop
    found = [(position, stop) for stop in stops if (position := text.find(stop)) >= 0]
    if found:
        position, stop = min(found)
        text = text[: position + len(stop) * fields.include_stop_str_in_output]
        tokens = tokens[: sum(end <= len(text) for end in offsets[1:])]
        while tokens and not tokens[-1]:  # the first bytes of a character after `text`
            tokens.pop()
    try:
        # The group would be that of the server's batch, which has prompts of other requests.
        trace = trace_rows(rollout)[0] | {"group": None} if fields.trace else None
    except ValueError as error:
        raise Refused(400, f"trace=true: {error}", "trace") from None
    return Choice(
        text,
        tokens,
        offsets[: len(tokens) + 1],
        logprobs[: len(tokens)],
        num_tokens=len(ids),
        is_ended=is_ended or bool(found),
        trace=trace,
    )


def token_texts(policy: Policy, ids: Sequence[int], text: str) -> tuple[list[str], list[int]]:
    """Return each token's part of `text`, which is the text of `ids`; where each part begins; and where the last ends.

    A character of several tokens is the part of the last of them. A special token that `text` leaves out has its own
    name as text, and ends where it begins.
    """
    decode = partial(text_of, policy)
    offsets = [0]
    # A token's text depends on its neighbors. It is therefore decoded after those tokens before it, from `start` to
    # `end`, whose text (`context`) is known to end at a character of `text`.
    start = end = 0
    context = ""
    for count in range(1, len(ids) + 1):
        if count - end > MAX_CHARACTER_TOKENS or count == len(ids):  # `context` was not the text that it became later
            start, end, context = 0, 0, ""
        added = decode(ids[start:count])[len(context) :]
        known = text[offsets[end] : offsets[end] + len(added)]
        # What differs stands for the bytes of an unfinished character.
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(added, known, strict=False)))
        offsets.append(offsets[end] + shared)
        if added and shared == len(added):
            start, end = end, count
            context = decode(ids[start:end])
    parts = [text[begin:stop] for begin, stop in pairwise(offsets)]
    for index, token in enumerate(ids):
        if not parts[index] and (token in policy.spec.eos_ids or not decode([token])):
            parts[index] = policy.tokenizer.decode([token], skip_special_tokens=False)
    return parts, offsets


def response(request: TextRequest, completions: Sequence[Choice]) -> dict[str, Any]:
    """Return the fields `choices` and `usage` of a response with these completions, `n` per prompt."""
    choices = []
    for index, completion in enumerate(completions):
        reason = "stop" if completion.is_ended else "length"
        fields: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if request.is_chat:
            fields["message"] = {"role": "assistant", "content": completion.text}
            if request.logprobs:
                fields["logprobs"] = {"content": _chat_logprobs(completion)}
        else:
            fields["text"] = completion.text
            if request.logprobs:
                fields["logprobs"] = _logprobs(completion)
        if request.fields.trace:
            fields["trace"] = completion.trace
        choices.append(fields)
    prompt_tokens = sum(len(ids) + len(request.suffix) for ids in request.prompts)
    completion_tokens = sum(completion.num_tokens for completion in completions)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {"choices": choices, "usage": usage}


def _chat_logprobs(completion: Choice) -> list[dict[str, Any]]:
    entries = []
    ends = pairwise(completion.offsets)
    for token, logprob, (start, end) in zip(completion.tokens, completion.logprobs, ends, strict=True):
        # The bytes of all tokens join to the text. A tokenizer may decode to a lone surrogate.
        data = completion.text[start:end].encode(errors="surrogatepass")
        entries.append({"token": token, "logprob": logprob, "bytes": [*data], "top_logprobs": []})
    return entries


def _logprobs(completion: Choice) -> dict[str, Any]:
    tokens, values = completion.tokens, completion.logprobs
    tops = [None if value is None else {token: value} for token, value in zip(tokens, values, strict=True)]
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": completion.offsets[:-1],
    }


def events(complete: dict[str, Any], request: TextRequest) -> list[str]:
    """Return a response as the events of a stream: two per completion (its text, then its finish_reason), and the end.

    A diffusion model does not write from left to right, so each text is sent only when it is complete.
    """
    common = {name: value for name, value in complete.items() if name not in ("choices", "usage")}
    if request.is_chat:
        common["object"] = "chat.completion.chunk"
    bodies: list[dict[str, Any]] = []
    for choice_fields in complete["choices"]:
        first = choice_fields | {"finish_reason": None}
        last = {"index": first["index"], "finish_reason": choice_fields["finish_reason"], "logprobs": None}
        if request.is_chat:
            first["delta"], last["delta"] = first.pop("message"), {}
        else:
            last["text"] = ""
        bodies += [common | {"choices": [first]}, common | {"choices": [last]}]
    stream_options = request.fields.stream_options
    if stream_options is not None and stream_options.include_usage:
        bodies = [body | {"usage": None} for body in bodies]
        bodies.append(common | {"choices": [], "usage": complete["usage"]})
    return [*(f"data: {json.dumps(body)}\n\n" for body in bodies), "data: [DONE]\n\n"]
