"""A policy as a model of lm-evaluation-harness: `lm_eval.simple_evaluate(model=HarnessModel(...), tasks=[...])`."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

try:
    import lm_eval.models  # noqa: F401 - the harness registers its models only if no other model was registered before
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("lm_eval.py needs lm-evaluation-harness: pip install -e '.[harness]'") from error

from dllm_rl.decoding.chat_template import fixed_template
from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.decoding.texts import decode
from dllm_rl.decoding.tokens import as_rollout, text_ids
from dllm_rl.decoding.vocabulary import begin_ids
from dllm_rl.evaluation.evaluate import row_seeds
from dllm_rl.likelihoods.estimators import LikelihoodEstimator, Trajectory
from dllm_rl.models.base import Policy
from dllm_rl.rng import generator_for
from dllm_rl.samplers import Autoregress, Sampler, Unmask
from dllm_rl.tasks.answers import cut
from dllm_rl.types.rollouts import Prompts

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness's, all the same
# Generation settings that the samplers lack, with the value that turns each off.
OFF = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "min_p": 0,
}


class HarnessModel(TemplateLM):
    """Policy as a model of lm-evaluation-harness, in one process.

    `generate_until` requests are answered by a sampler, `loglikelihood` and `loglikelihood_rolling` requests by a
    likelihood estimator. As in `evaluate`, a completion's random numbers depend on the seed, the task's row and the
    sample, not on the batch.

    Args:
        policy: Policy to evaluate.
        sampler: `Unmask` or `Autoregress`. Its completions end at `until` of a task's generation settings.
        likelihood: Estimator of log-probs in nats that needs no recorded unmasking: Causal(), ELBO(), Coupled(),
        is_task_length: Whether `max_gen_toks` of a task's generation settings (or another of `LENGTH_NAMES`) replaces
            the sampler's max_new_tokens. Default: False.
        batch_size: Rows per forward. Default: 32.
        greedy: Whether to test if greedy decoding gives the continuation of a `loglikelihood` request, which costs one
            forward per token. False: no continuation is reported as greedy. Default: True.
        seed: Seed of completions and masks. Default: 0.

    Raises:
        ValueError: The estimator does not fit this policy, a text is too long, or a task has another temperature, top_p
            or top_k than the sampler, or a generation setting that the samplers lack.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        sampler: Sampler,
        likelihood: LikelihoodEstimator,
        is_task_length: bool = False,
        batch_size: int = 32,
        greedy: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if policy.spec.attention == "encoder_decoder":
            raise ValueError(
                f"{policy.spec.name!r} replaces tokens, and no estimator scores texts that it did not sample, as the "
                "harness needs; use dllm-rl evaluate"
            )
        likelihood.check_policy(policy)
        if isinstance(likelihood, Trajectory):
            raise ValueError("likelihood=Trajectory() replays a recorded unmasking: use ELBO() or Coupled()")
        self.policy = policy
        self.sampler = sampler
        self.likelihood = likelihood
        self.is_task_length = is_task_length
        self.batch_size = batch_size
        self.greedy = greedy
        self.seed = seed
        self.tokenizer = policy.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.policy.spec.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS as the tokenizer adds or names it, else an end token."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return [self.eot_token_id if bos is None else bos, *begin_ids(self.policy)][-1]

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text that the harness has written, which may be a chat that it has rendered.

        As in the harness's `hf` model, the ids begin with what the tokenizer adds before a text (`begin_ids`), unless
        the text begins with it, as most rendered chats do, or `add_special_tokens` is False.
        """
        ids = text_ids(self.policy, string, special=True)
        begin = [] if add_special_tokens is False else begin_ids(self.policy)
        return ids if ids[: len(begin)] == begin else [*begin, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        prompt_ids(self.policy, chat_history)  # refuses a template that leaves out a message
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        options |= fixed_template(self.tokenizer)
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        settings = [request.args[1] for request in requests]
        num_samples: Counter[tuple[str, int]] = Counter()  # so far, for each row of each task
        problems_and_samples = []
        for request in requests:
            task_row = (request.task_name, request.doc_id)
            problems_and_samples.append((request.doc_id, num_samples[task_row]))
            num_samples[task_row] += 1
        texts = [""] * len(requests)
        for length, indices in _batches(list(map(self._length, settings)), self.batch_size):
            ids = [self.tok_encode(requests[index].args[0]) for index in indices]
            seeds = row_seeds(self.seed, [problems_and_samples[index] for index in indices])
            prompts = Prompts.from_ids(ids, pad_id=self.policy.pad_id, seeds=seeds)
            generator = generator_for(self.seed, "evaluate")
            rollout = self.sampler.replace(max_new_tokens=length)(self.policy, prompts, generator)
            for index, text in zip(indices, decode(self.policy, rollout), strict=True):
                until = settings[index].get("until") or []
                stops = [until] if isinstance(until, str) else until
                texts[index] = cut(text, 0, tuple(filter(None, stops)))  # an empty text stops nothing
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _length(self, generation_settings: Mapping[str, Any]) -> int:
        """Return max_new_tokens for a request with these generation settings of its task.

        Raises:
            ValueError: The task's sampling settings are not those of the sampler, or are not supported.
        """
        given = {name: value for name, value in generation_settings.items() if value is not None}
        if not given.pop("do_sample", True):
            given["temperature"] = 0.0
        is_greedy = not getattr(self.sampler, "temperature", None)  # top_k and top_p then change nothing
        for name, off in (("temperature", 0.0), ("top_k", 0), ("top_p", 1.0)):
            here = getattr(self.sampler, name, None) or off
            value = given.pop(name, here)
            if value != here and (name == "temperature" or not is_greedy):
                raise ValueError(
                    f"the task samples at {name}={value:g}, the model at {here:g}; give the model {name}={value:g}, or "
                    "--gen_kwargs do_sample=False"
                )
        lengths = {name: given.pop(name) for name in LENGTH_NAMES if name in given}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the task sets several lengths, {lengths}; give all of them one value in --gen_kwargs")
        for name, value in given.items():
            if name != "until" and (name not in OFF or value != OFF[name]):
                remedy = f"give --gen_kwargs {name}={OFF[name]}" if name in OFF else "leave it out of generation_kwargs"
                raise ValueError(f"the task's {name}={value!r} is not a setting of the samplers; {remedy}")
        own_length = self.sampler.max_new_tokens
        return int(next(iter(lengths.values()), own_length)) if self.is_task_length else own_length

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Pair] = []
        request_of_window: list[int] = []
        for request_index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)  # `prefix_token` comes before it
            max_window = (self.policy.spec.max_length or len(tokens) + 1) - 1
            token_windows = get_rolling_token_windows(
                tokens, prefix_token=self.prefix_token_id, max_seq_len=max_window, context_len=1
            )
            windows += map(make_disjoint_window, token_windows)
            # A text longer than the model's context has several windows.
            request_of_window += [request_index] * (len(windows) - len(request_of_window))
        totals = [0.0] * len(requests)
        for request_index, value in zip(request_of_window, self._logprobs(windows), strict=True):
            totals[request_index] += value
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = [request[1:] for request in requests]
        greedy = self._is_greedy(pairs) if self.greedy else [False] * len(pairs)
        return list(zip(self._logprobs(pairs), greedy, strict=True))

    def _logprobs(self, pairs: Sequence[Pair]) -> list[float]:
        """Return estimates of log p(continuation | context), in nats."""
        values: list[float] = []
        for start in range(0, len(pairs), self.batch_size):
            rollout = as_rollout(self.policy, pairs[start : start + self.batch_size])
            noise = self.likelihood.draw_views(rollout, generator_for(self.seed, "score", start))
            values += self.likelihood.logprobs(self.policy, rollout, noise).sum(-1).tolist()
        return values

    def _is_greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Return for each pair whether greedy decoding of the context, one token at a time, gives the continuation."""
        make_decoder = Unmask if self.policy.spec.attention != "causal" else Autoregress
        is_greedy = [False] * len(pairs)
        for length, indices in _batches([len(continuation) for _, continuation in pairs], self.batch_size):
            prompts = Prompts.from_ids([pairs[index][0] for index in indices], pad_id=self.policy.pad_id)
            decoder = make_decoder(max_new_tokens=length, temperature=0.0)
            decoded = decoder(self.policy, prompts, generator_for(self.seed)).tokens
            for index, tokens in zip(indices, decoded[:, prompts.tokens.shape[1] :].tolist(), strict=True):
                is_greedy[index] = tokens == list(pairs[index][1])
        return is_greedy


def _batches(lengths: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Group indices by their length, and yield each length with at most `size` indices.

    Lengths are not mixed, because a diffusion model's tokens depend on the length of the completion.
    """
    by_length = defaultdict(list)
    for index, length in enumerate(lengths):
        by_length[length].append(index)
    for length, indices in sorted(by_length.items()):
        for start in range(0, len(indices), size):
            yield length, indices[start : start + size]
