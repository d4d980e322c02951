"""OpenAI's completions and chat completions API: read and check a request, and write the response.

This module tokenizes and decodes in the HTTP server's thread; only the sampler runs in the batcher's thread.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from dllm_rl.diagnostics.traces import trace_rows
from dllm_rl.models.base import Policy
from dllm_rl.models.tokens import before_end, completion_token_ids, decode_ids, prompt_ids
from dllm_rl.samplers.by_name import required_rank
from dllm_rl.screen import line_of
from dllm_rl.serving.batching import PromptScores
from dllm_rl.serving.settings import known_settings, read_settings
from dllm_rl.types import Rollout

MAX_COMPLETIONS = 128  # per prompt, as in OpenAI's API
MAX_STOP_TEXTS = 4
# Fields that do not change the response.
IGNORED_FIELDS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "best_of"}
# Fields of features that the samplers lack, each with the values that turn the feature off. Other values are refused.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),  # of a chat; completions have it
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class Refused(Exception):
    """Raised if a request gets an error response, in OpenAI's format.

    Args:
        status: HTTP status.
        message: One line with the field, its value and a remedy.
        param: Field of the request that is at fault. None: no single field.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the response's JSON object."""
        types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "invalid_request_error" if self.status < 500 else "server_error"
        error_type = types.get(self.status, default)
        return {"error": {"message": line_of(self), "type": error_type, "param": self.param, "code": self.status}}


@dataclass(frozen=True)
class Limits:
    """Limits on a request.

    Args:
        max_tokens: Largest number of tokens of a completion.
        max_waiting: Largest number of waiting completions of all requests, and so of one request.
    """

    max_tokens: int = 1024
    max_waiting: int = 256


@dataclass(frozen=True)
class TextRequest:
    """A checked request for completions.

    Args:
        is_chat: Whether the prompt is chat messages.
        prompts: Token ids of each prompt.
        suffix: Token ids of the text after the completion; empty if there is none.
        texts: Text of each prompt, for `echo`.
        n: Number of completions per prompt.
        seed: Seed of the request. None: derived from the server's seed and the request's number.
        max_tokens: Largest number of tokens of a completion.
        settings: Sampler settings of the request (`read_settings`).
        stop: Stop texts. A completion ends before the first of them.
        echo: Whether the response repeats the prompt.
        logprobs: Whether the response has log-probs of the completion.
        score_prompt: Whether the response also has log-probs of the prompt.
        stream: Whether the response is a stream of events.
        include_usage: Whether the stream ends with the token counts.
        trace: Whether each choice also has its trace (`diagnostics.traces`).
    """

    is_chat: bool
    prompts: list[list[int]]
    suffix: list[int]
    texts: list[str]
    n: int
    seed: int | None
    max_tokens: int
    settings: dict[str, Any]
    stop: tuple[str, ...]
    echo: bool
    logprobs: bool
    score_prompt: bool
    stream: bool
    include_usage: bool
    trace: bool


def read_request(
    data: bytes, policy: Policy, defaults: Mapping[str, Any], limits: Limits, *, name: str, is_chat: bool
) -> TextRequest:
    """Read and check a request's body.

    Args:
        data: Body of the request.
        policy: Policy with the tokenizer. Its module is not used.
        defaults: The server's sampler keywords.
        limits: Limits on the request.
        name: Name of the model.
        is_chat: Whether the request is for chat completions.

    Raises:
        Refused: A field is unknown, or has a value that the server does not support.
    """
    fields = _Fields(read_json_object(data))
    if (model := fields.text("model")) not in (None, name):
        raise Refused(404, f"model={model!r} is not served here; use model={name!r}", "model")
    n = fields.integer("n", low=1, high=MAX_COMPLETIONS) or 1
    if fields.values.get("best_of") not in (None, n):
        raise Refused(400, f"best_of={fields.values['best_of']!r} must be n={n}; leave it out", "best_of")
    stream_options = fields.values.pop("stream_options", None) or {}
    if not isinstance(stream_options, dict):
        raise Refused(400, "stream_options must be an object; leave it out", "stream_options")
    temperature = fields.number("temperature", low=0, high=2)
    settings: dict[str, Any] = {"temperature": temperature, "top_p": fields.number("top_p", low=0, high=1, above=True)}
    settings |= {key: fields.integer(key, low=1) for key in ("top_k", "block_size")}
    settings["diffusion_steps"] = fields.integer("diffusion_steps", low=1, high=limits.max_tokens)
    settings |= {key: fields.text(key) for key in ("rank", "commit", "cache")}
    settings = {key: value for key, value in settings.items() if value is not None}
    if policy.spec.attention == "encoder_decoder" and not temperature:  # `renoise` has its own schedule of temperatures
        settings.pop("temperature", None)
    if "commit" in settings and "rank" not in settings and (rank := required_rank(settings["commit"])):
        settings["rank"] = rank
    echo = score_prompt = False
    suffix: list[int] = []
    if is_chat:
        prompts, texts = _chat_prompt(fields, policy)
        lengths = [fields.integer(key, low=1) for key in ("max_completion_tokens", "max_tokens")]
        max_tokens = lengths[0] or lengths[1]
        logprobs = fields.flag("logprobs")
        if fields.integer("top_logprobs", low=0):
            raise Refused(
                400, "top_logprobs: the sampler records the log-prob of the chosen token only; use 0", "top_logprobs"
            )
    else:
        prompts, texts = _prompts(fields, policy)
        suffix = _suffix_ids(fields, policy, settings)
        max_tokens = fields.integer("max_tokens", low=0)
        echo = fields.flag("echo")
        count = fields.integer("logprobs", low=0)
        logprobs, score_prompt = count is not None, echo and count is not None
        _check_logprobs(policy, count, score_prompt, settings.get("temperature", defaults.get("temperature")))
        if max_tokens == 0 and not score_prompt:
            raise Refused(400, "max_tokens=0 needs echo=true and logprobs=1, to score a prompt; use 1", "max_tokens")
    longest = max(map(len, prompts)) + len(suffix)
    request = TextRequest(
        is_chat=is_chat,
        prompts=prompts,
        suffix=suffix,
        texts=texts,
        n=n,
        seed=fields.integer("seed", low=-(2**63), high=2**63 - 1),
        max_tokens=_checked_length(policy, longest, max_tokens, defaults["max_new_tokens"], limits),
        settings=settings,
        stop=_stop_texts(fields),
        echo=echo,
        logprobs=logprobs,
        score_prompt=score_prompt,
        stream=fields.flag("stream"),
        include_usage=bool(stream_options.get("include_usage")),
        trace=fields.flag("trace"),
    )
    fields.check_rest()
    if (rows := len(prompts) * (n + score_prompt)) > limits.max_waiting:
        raise Refused(400, f"{len(prompts)} prompts x n={n} are {rows} completions; ask for {limits.max_waiting}", "n")
    try:
        read_settings(policy, settings)
    except ValueError as error:
        raise Refused(400, str(error)) from None
    return request


def read_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raise Refused for anything else, including NaN and brackets nested too deeply."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON; send an object with Content-Type: application/json") from None
    if not isinstance(value, dict):
        raise Refused(400, f"the body is a JSON {type(value).__name__}; send an object")
    return value


def _refuse_constant(text: str) -> None:
    """Refuse NaN and infinity, which Python's parser accepts although JSON lacks them."""
    raise ValueError(f"{text} is not JSON")


class _Fields:
    """The fields of a request. Each method removes the field that it reads; a null counts as left out."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = {name: value for name, value in values.items() if value is not None}

    def _pop(self, name: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
        value = self.values.pop(name, None)
        if value is not None and not is_valid(value):
            raise Refused(400, f"{name}={_quoted(value)} must be {expected}", name)
        return value

    def text(self, name: str) -> str | None:
        return self._pop(name, lambda x: isinstance(x, str), "a text")

    def flag(self, name: str) -> bool:
        return bool(self._pop(name, lambda x: isinstance(x, bool), "true or false"))

    def integer(self, name: str, *, low: int, high: int = 2**31 - 1) -> int | None:
        return self._pop(name, lambda x: type(x) is int and low <= x <= high, f"a whole number from {low} to {high}")

    def number(self, name: str, *, low: int, high: int, above: bool = False) -> float | None:
        expected = f"a number {'above' if above else 'from'} {low} {'and at most' if above else 'to'} {high}"
        is_valid = lambda x: type(x) in (int, float) and low <= x <= high and not (above and x == low)  # noqa: E731
        value = self._pop(name, is_valid, expected)
        return None if value is None else float(value)

    def check_rest(self) -> None:
        """Raise Refused if an unread field would change the response."""
        for name, value in self.values.items():
            if name in IGNORED_FIELDS or (name in UNSUPPORTED_FIELDS and value in UNSUPPORTED_FIELDS[name]):
                continue
            raise Refused(400, f"{name}={_quoted(value)} is not supported by this server; leave it out", name)


def _quoted(value: Any) -> str:
    """Return a JSON value as text of at most 80 characters, for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _prompts(fields: _Fields, policy: Policy) -> tuple[list[list[int]], list[str]]:
    """Return the token ids and the text of each prompt of a completions request."""
    prompt = fields.values.pop("prompt", None)
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise Refused(400, "prompt must be a text, a list of texts, token ids, or a list of lists of them", "prompt")
    ids, texts = [], []
    for item in prompt:
        if isinstance(item, str):
            ids.append(_tokenized(policy, item, "prompt"))
            texts.append(item)
        elif _is_ids(item):
            if not all(0 <= token < policy.vocab_size for token in item):
                raise Refused(400, f"prompt: token ids must lie in [0, {policy.vocab_size})", "prompt")
            ids.append(item)
            texts.append(policy.tokenizer.decode(item))
        else:
            raise Refused(400, f"prompt: {_quoted(item)} is neither a text nor a list of token ids", "prompt")
    return ids, texts


def _suffix_ids(fields: _Fields, policy: Policy, settings: Mapping[str, Any]) -> list[int]:
    """Return the token ids of the text after the completion, or an empty list if the request has none."""
    text = fields.text("suffix")
    if not text:
        return []
    if policy.spec.attention != "full":
        raise Refused(
            400,
            f"suffix: {policy.spec.attention!r} attention does not see the text after a completion; leave it out",
            "suffix",
        )
    if "cache" in settings:
        raise Refused(400, f"cache={_quoted(settings['cache'])} does not work with a suffix; leave it out", "cache")
    return _tokenized(policy, text, "suffix")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(token) is int for token in value)


def _chat_prompt(fields: _Fields, policy: Policy) -> tuple[list[list[int]], list[str]]:
    messages = fields.values.pop("messages", None)
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise Refused(400, "messages must be a list of objects, each with role and content", "messages")
    messages = [message | {"content": _joined_text(message.get("content"))} for message in messages]
    return [_tokenized(policy, messages, "messages")], [""]  # no prompt text: chat completions have no `echo`


def _joined_text(content: Any) -> Any:
    """Join a message's content if it is a list of text parts. Return any other content unchanged."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            raise Refused(400, f"messages: the part {_quoted(part)} of a content is not text; give text", "messages")
    return "".join(part["text"] for part in content)


def _tokenized(policy: Policy, prompt: Any, field: str) -> list[int]:
    try:
        return prompt_ids(policy, prompt)
    except ValueError as error:
        raise Refused(400, f"{field}: {error}", field) from None


def _stop_texts(fields: _Fields) -> tuple[str, ...]:
    stop = fields.values.pop("stop", None)
    texts = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(texts, list) or len(texts) > MAX_STOP_TEXTS or not all(isinstance(x, str) and x for x in texts):
        raise Refused(400, f"stop={_quoted(stop)} must be a text or up to {MAX_STOP_TEXTS} texts", "stop")
    return tuple(texts)


def _check_logprobs(policy: Policy, count: int | None, score_prompt: bool, temperature: float | None) -> None:
    """Raise Refused if `logprobs`=`count` needs log-probs that the sampler does not record."""
    if count is None:
        return
    if score_prompt and policy.spec.attention != "causal":
        raise Refused(
            400,
            "echo with logprobs: the likelihood of a prompt under a diffusion model is an estimate, which this server "
            "does not make; use `dllm-rl lm-eval --model dllm_rl`, or leave echo out",
            "echo",
        )
    if count > 1 or (count == 1 and temperature):
        advice = "use 0, or 1 at temperature 0"
        raise Refused(
            400, f"logprobs={count}: the sampler records the log-prob of the chosen token only; {advice}", "logprobs"
        )


def _checked_length(policy: Policy, longest: int, requested: int | None, default: int, limits: Limits) -> int:
    """Return a completion's max_tokens: the requested number, else the server's default or what fits the model.

    `longest` is the largest number of tokens of a prompt, with its suffix.
    """
    canvas = policy.spec.block_size if policy.spec.attention == "encoder_decoder" else None
    tokens_left = None if policy.spec.max_length is None else policy.spec.max_length - longest
    if tokens_left is not None and canvas is not None:
        tokens_left = tokens_left // canvas * canvas
    if tokens_left is not None and tokens_left < max(1, requested or 0):
        canvases = "" if canvas is None else f", in whole canvases of {canvas},"
        raise Refused(
            400,
            f"a prompt of {longest} tokens and max_tokens={1 if requested is None else requested}{canvases} exceed the "
            f"model's {policy.spec.max_length} positions; shorten them",
            "max_tokens" if tokens_left > 0 else "prompt",
        )
    if requested is None:
        return min(default, limits.max_tokens, *([] if tokens_left is None else [tokens_left]))
    if requested > limits.max_tokens:
        raise Refused(400, f"max_tokens={requested} is above the server's {limits.max_tokens}; use less", "max_tokens")
    return requested


def sampler_settings(policy: Policy, request: TextRequest, defaults: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the sampler settings of a request's completions, sorted by name.

    If the request sets a length but no `diffusion_steps`, the server's `diffusion_steps` are scaled with the length and
    rounded up, so that the tokens per step stay the same. An encoder-decoder model samples whole canvases:
    `max_new_tokens` is rounded up, and `choice` cuts off the surplus.
    """
    settings = dict(request.settings)
    length = max(1, request.max_tokens)
    if policy.spec.attention == "encoder_decoder" and policy.spec.block_size is not None:
        length = math.ceil(length / policy.spec.block_size) * policy.spec.block_size
    settings["max_new_tokens"] = length
    default_steps, default_length = defaults.get("diffusion_steps"), defaults["max_new_tokens"]
    is_scaled = "diffusion_steps" in known_settings(policy) and policy.spec.attention != "encoder_decoder"
    if is_scaled and "diffusion_steps" not in settings and default_steps is not None and length != default_length:
        block_size = settings.get("block_size") or defaults.get("block_size") or policy.spec.block_size or length
        num_blocks = math.ceil(length / block_size)  # a block needs at least one step
        settings["diffusion_steps"] = max(math.ceil(length * default_steps / default_length), num_blocks)
    return tuple(sorted(settings.items()))


@dataclass(frozen=True)
class Choice:
    """One completion of a response.

    Args:
        text: Text before the first end token and before the first stop text.
        ids: Token ids up to and including the end token, or up to the stop text.
        logprobs: Log-prob of each of `ids` in nats; None if it is not finite.
        num_tokens: Number of tokens up to and including the end token. A stop text does not reduce it.
        is_ended: Whether an end token or a stop text ended the completion. False: it reached its full length.
        trace: Trace of the completion, as in a `.jsonl` file. None: not requested.
    """

    text: str
    ids: list[int]
    logprobs: list[float | None]
    num_tokens: int
    is_ended: bool
    trace: dict[str, Any] | None = None


def choice(policy: Policy, rollout: Rollout, request: TextRequest) -> Choice:
    """Convert a rollout of one row to a choice.

    Raises:
        Refused: A trace is requested, and the sampler rewrites tokens.
    """
    sampled = completion_token_ids(rollout)[0][: request.max_tokens]
    before = before_end(policy, sampled)
    is_ended = len(before) < len(sampled)
    ids = sampled[: len(before) + is_ended]  # includes the end token, because clients that score need its log-prob
    num_tokens = len(ids)
    logprobs = [x if math.isfinite(x) else None for x in rollout.logprobs[0][rollout.completion_mask[0]].tolist()]
    text = decode_ids(policy, [before])[0]
    stop_positions = [position for stop in request.stop if (position := text.find(stop)) >= 0]
    if stop_positions:
        text = text[: min(stop_positions)]
        token_ends = accumulate(_text_lengths(policy, ids))
        ids = ids[: sum(end <= len(text) for end in token_ends)]
    try:
        trace = trace_rows(rollout)[0] if request.trace else None
    except ValueError as error:
        raise Refused(400, f"trace=true: {error}", "trace") from None
    return Choice(text, ids, logprobs[: len(ids)], num_tokens, is_ended or bool(stop_positions), trace)


@dataclass(frozen=True)
class CompletedRequest:
    """A request and its results: everything that a response needs.

    Args:
        request: The request.
        name: Name of the model.
        number: Number of the request, used in the response's id.
        created: Time of the response, in seconds since 1970.
        versions: Versions of the weights that sampled or scored; several if an update came between two batches.
        choices: The completions, `n` per prompt.
        scores: Log-probs of each prompt; empty if not requested.
    """

    request: TextRequest
    name: str
    number: int
    created: int
    versions: tuple[int, ...]
    choices: list[Choice]
    scores: list[PromptScores]


def response(policy: Policy, completed: CompletedRequest) -> dict[str, Any]:
    """Return the response's JSON object."""
    request = completed.request
    choices = []
    for index, completion in enumerate(completed.choices):
        reason = "stop" if completion.is_ended else "length"
        prompt_index = index // request.n
        fields: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if request.is_chat:
            fields["message"] = {"role": "assistant", "content": completion.text}
            if request.logprobs:
                fields["logprobs"] = {"content": _chat_logprobs(policy, completion)}
        else:
            fields["text"] = (request.texts[prompt_index] if request.echo else "") + completion.text
            if request.logprobs:
                scores = completed.scores[prompt_index] if completed.scores else None
                fields["logprobs"] = _logprobs(policy, completion, request, prompt_index, scores)
        if request.trace:
            fields["trace"] = completion.trace
        choices.append(fields)
    prompt_tokens = sum(len(ids) + len(request.suffix) for ids in request.prompts)
    completion_tokens = sum(completion.num_tokens for completion in completed.choices)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return _common_fields(completed, "chat.completion" if request.is_chat else "text_completion") | {
        "choices": choices,
        "usage": usage,
    }


def _common_fields(completed: CompletedRequest, object_type: str) -> dict[str, Any]:
    """Return the fields that a response has in common with every event of its stream."""
    prefix = "chatcmpl" if completed.request.is_chat else "cmpl"
    return {
        "id": f"{prefix}-{completed.number}",
        "object": object_type,
        "created": completed.created,
        "model": completed.name,
        "system_fingerprint": f"weights_version={','.join(map(str, completed.versions))}",
    }


def _chat_logprobs(policy: Policy, completion: Choice) -> list[dict[str, Any]]:
    entries = []
    for text, logprob in zip(_token_texts(policy, completion.ids), completion.logprobs, strict=True):
        entries.append({"token": text, "logprob": logprob, "bytes": [*text.encode()], "top_logprobs": []})
    return entries


def _logprobs(
    policy: Policy, completion: Choice, request: TextRequest, prompt_index: int, scores: PromptScores | None
) -> dict[str, Any]:
    """Return the log-probs of a completion, preceded by those of its prompt if `scores` has them."""
    tokens, values = _token_texts(policy, completion.ids), list(completion.logprobs)
    tops: list[dict[str, float] | None] = [
        None if value is None else {token: value} for token, value in zip(tokens, values, strict=True)
    ]
    if scores is not None:
        prompt_tokens = _token_texts(policy, request.prompts[prompt_index])
        prompt_tops: list[dict[str, float] | None] = []
        for token, value, best in zip(prompt_tokens, scores.logprobs, scores.best, strict=True):
            # The most likely token overwrites the prompt's token if both have the same text.
            top = {} if best is None else {_token_texts(policy, [best[0]])[0]: best[1]}
            prompt_tops.append({token: value, **top} if value is not None and best is not None else None)
        tokens, values, tops = prompt_tokens + tokens, scores.logprobs + values, prompt_tops + tops
    all_ids = [*(request.prompts[prompt_index] if scores is not None else []), *completion.ids]
    offsets = [0, *accumulate(_text_lengths(policy, all_ids))]
    start = len(request.texts[prompt_index]) if request.echo and scores is None else 0
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": [start + offset for offset in offsets[:-1]],
    }


def _token_texts(policy: Policy, ids: Sequence[int]) -> list[str]:
    return [policy.tokenizer.decode([token]) for token in ids]


def _text_lengths(policy: Policy, ids: Sequence[int]) -> list[int]:
    """Return the number of characters of each token in a completion's text, which leaves special tokens out."""
    return [len(policy.tokenizer.decode([token], skip_special_tokens=True)) for token in ids]


def events(policy: Policy, completed: CompletedRequest) -> list[str]:
    """Return the events of a stream: two per completion (its text, then its finish_reason), and the end of the stream.

    A diffusion model does not write from left to right, so each text is sent only when it is complete.
    """
    request = completed.request
    complete = response(policy, completed)
    common = _common_fields(completed, "chat.completion.chunk" if request.is_chat else "text_completion")
    bodies: list[dict[str, Any]] = []
    for fields in complete["choices"]:
        index, reason = fields["index"], fields["finish_reason"]
        trace = {"trace": fields["trace"]} if request.trace else {}
        first: dict[str, Any] = {"index": index, "finish_reason": None, "logprobs": fields["logprobs"]} | trace
        last: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if request.is_chat:
            first["delta"], last["delta"] = fields["message"], {}
        else:
            first["text"], last["text"] = fields["text"], ""
        bodies += [common | {"choices": [first]}, common | {"choices": [last]}]
    if request.include_usage:
        bodies.append(common | {"choices": [], "usage": complete["usage"]})
    return [*(f"data: {json.dumps(body)}\n\n" for body in bodies), "data: [DONE]\n\n"]
