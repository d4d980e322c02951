"""Is it the model that one thinks? A trained model finds hidden tokens of plain text, and not those of shuffled text.

Four mistakes leave a model that runs and writes noise: a wrong mask token, logits that are shifted by one position or
not, attention that sees another side than in training, and a head that is not the trained one. For each of them the
section also tries the alternative. A fifth mistake has no alternative to try: a tokenizer of another model. Then the
model still tells its own completions from shuffled ones.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dllm_rl.decoding.chat import conversation_ids
from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.doctor.subject import NUM_GENERATIONS, Finding, Subject, is_stock
from dllm_rl.models.base import Policy, linear_head
from dllm_rl.models.checkpoint.families import FAMILIES
from dllm_rl.models.convert import as_causal, module_with_attention
from dllm_rl.testing.tiny_checkpoint import CHAT, PARAGRAPH

FOLDS = 4  # each token is hidden once, together with a quarter of the others
# Nats per token. Without a model of the language both texts are equally hard; the difference is above 4 nats for a
# model of billions of weights, and 2 to 3 for one of a hundred million. With about 150 hidden tokens its standard error
# is 0.2 to 0.3, so that 1 is not an accident.
MIN_GAIN = 1.0
# Nats per token by which an alternative must be better. The right one of two is better by more than 1 nat, and two
# views of the same tokens differ by chance by about 0.1.
MARGIN = 0.5
# Share of hidden tokens. The most frequent word of English is 6 % of a text; a model of a hundred million weights finds
# a third and more.
MIN_ACCURACY = 0.2
MAX_MASKS = 8  # tokens that are tried as the mask


@dataclass(frozen=True)
class Scores:
    """How well a policy finds hidden tokens: share of likeliest tokens that are right, and mean log-prob in nats."""

    accuracy: float
    logprob: float


@dataclass(frozen=True)
class Alternative:
    """Another reading of the same weights.

    Args:
        reason: The mistake that it would mend, in the report's words.
        policy: The policy to try.
        advice: What to do if it predicts the text better.
    """

    reason: str
    policy: Policy
    advice: str


def text_section(subject: Subject) -> Finding:
    """Hide tokens of a paragraph of English, of a chat and of the model's own completions, and compare with the same
    tokens in a random order.
    """
    policy = subject.policy
    if policy.spec.attention == "encoder_decoder":
        line = "not measured: this model denoises random tokens, and no token of a text is hidden from it"
        return Finding("look", line, "read the completion below", "no masks")
    uniform = -torch.tensor(float(policy.vocab_size)).log().item()
    numbers: dict[str, Any] = {"uniform_logprob": uniform}
    try:
        ids = prompt_ids(policy, PARAGRAPH)
    except ValueError:
        line = "the tokenizer cannot write English prose, so that hidden words could not be tried"
        advice = "for a model of proteins, DNA or digits this is right; else the tokenizer is of another model"
        return Finding("look", line, advice, "no English tokenizer", numbers)
    ids = ids[: policy.spec.max_length]
    tokens = torch.tensor([ids], device=policy.device)
    text, shuffled = text_and_shuffled(policy, tokens, subject.generator("text"))
    numbers |= {"tokens": len(ids), "accuracy": text.accuracy, "logprob": text.logprob}
    numbers |= {"accuracy_shuffled": shuffled.accuracy, "logprob_shuffled": shuffled.logprob}
    found = f"finds {text.accuracy:.0%} of the hidden tokens of a text, {shuffled.accuracy:.0%} of a shuffled one"
    found += f"; log-prob {text.logprob:.2f} and {shuffled.logprob:.2f} nats per token, {uniform:.2f} by chance"
    better = best_alternative(subject, tokens, text)
    if better is not None:
        alternative, scores = better
        numbers |= {"alternative_accuracy": scores.accuracy, "alternative_logprob": scores.logprob}
        found += f"; with the change below, {scores.accuracy:.0%} and {scores.logprob:.2f} nats"
        is_usable = alternative.reason == "autoregressive weights" and text.logprob - shuffled.logprob >= MIN_GAIN
        return Finding("look" if is_usable else "wrong", found, alternative.advice, alternative.reason, numbers)
    own = None if text.logprob - shuffled.logprob >= MIN_GAIN else own_gain(subject)
    numbers["own_gain"] = own
    finding = judge(text, shuffled, own)
    chat = chat_scores(subject)
    if chat is not None:
        in_chat, in_shuffled_chat = chat
        numbers |= {"chat_accuracy": in_chat.accuracy, "chat_logprob": in_chat.logprob}
        numbers |= {"chat_logprob_shuffled": in_shuffled_chat.logprob}
        found += f"; of a chat {in_chat.accuracy:.0%}"
        if finding.verdict == "ok" and in_chat.logprob - in_shuffled_chat.logprob < MIN_GAIN:
            advice = "compare the chat template with the one that the model was trained with"
            finding = Finding("look", "", advice, "chat template")
    return replace(finding, line=f"{found}{finding.line}", numbers=numbers)


def judge(text: Scores, shuffled: Scores, own_gain: float | None) -> Finding:
    """Return the verdict on a model of which no alternative reading predicts the text better. `own_gain` is None if it
    predicts the text MIN_GAIN better than shuffled text.

    - ok: It does, and finds MIN_ACCURACY of the tokens.
    - wrong: It does not, and yet predicts its own completions MIN_GAIN better than shuffled ones: it is trained, but
      these ids are not its text.
    - look: Neither, as with random weights; or it finds few tokens, as a small model or one of other texts may.
    """
    if own_gain is None:
        if text.accuracy >= MIN_ACCURACY:
            return Finding("ok", "")
        advice = f"a model of English finds more than {MIN_ACCURACY:.0%}: read the completion of the sampler below"
        return Finding("look", "", advice, "few tokens found")
    if own_gain >= MIN_GAIN:
        line = f", and yet its own completions are {own_gain:.1f} nats likelier than shuffled ones"
        advice = (
            "the model is trained, but not on these tokens: put the tokenizer of this model into its folder (the ids "
            "of the present one are other words); nothing is wrong only if it never saw English, or if its weights "
            "are random and large"
        )
        return Finding("wrong", line, advice, "tokenizer")
    line = ": it tells neither this text nor its own completions from shuffled ones"
    advice = (
        "with random weights this is right, and the sections below then say nothing about quality; a trained model "
        "that does this has lost weights, or its config.json is of another one"
    )
    return Finding("look", line, advice, "untrained")


def own_gain(subject: Subject) -> float:
    """Return by how many nats per token the model's own completions are likelier than shuffled ones, if a part of them
    is hidden. One completion of each prompt is taken.
    """
    rollout, _ = subject.sampled
    rollout = rollout.rows(torch.arange(0, len(rollout.tokens), NUM_GENERATIONS, device=rollout.tokens.device))
    rows = rollout.tokens, rollout.attention_mask, rollout.completion_mask
    generator = subject.generator("own text")
    written = hidden_scores(subject.policy, *rows, generator)
    shuffled = hidden_scores(subject.policy, shuffle(rows[0], rows[2], generator), *rows[1:], generator)
    return written.logprob - shuffled.logprob


def chat_scores(subject: Subject) -> tuple[Scores, Scores] | None:
    """Return the scores of a chat and of the shuffled chat; None without a template that writes it."""
    policy = subject.policy
    if not getattr(policy.tokenizer, "chat_template", None):
        return None
    try:
        pieces = conversation_ids(policy, CHAT, [1])
    except ValueError:  # the template or the tokenizer does not write it
        return None
    ids = [token for piece, _ in pieces for token in piece][: policy.spec.max_length]
    return text_and_shuffled(policy, torch.tensor([ids], device=policy.device), subject.generator("chat"))


def text_and_shuffled(policy: Policy, tokens: Int[Tensor, "1 T"], generator: Generator) -> tuple[Scores, Scores]:
    """Return the scores of a text, and of its tokens in a random order. The first token is neither hidden nor moved: no
    position before it predicts it.
    """
    is_token = torch.ones_like(tokens, dtype=torch.bool)
    hidden = is_token.clone()
    hidden[:, 0] = False
    return (
        hidden_scores(policy, tokens, is_token, hidden, generator),
        hidden_scores(policy, shuffle(tokens, hidden, generator), is_token, hidden, generator),
    )


def shuffle(tokens: Int[Tensor, "B T"], moved: Bool[Tensor, "B T"], generator: Generator) -> Int[Tensor, "B T"]:
    """Return the tokens with those at `moved` in a random order in each row."""
    shuffled = tokens.clone()
    for row, at in enumerate(moved):
        places = at.nonzero()[:, 0]
        order = torch.randperm(len(places), generator=generator).to(tokens.device)
        shuffled[row, places] = tokens[row, places[order]]
    return shuffled


@torch.no_grad()
def hidden_scores(
    policy: Policy,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    hidden: Bool[Tensor, "B T"],
    generator: Generator,
) -> Scores:
    """Hide each token at `hidden` once, in one of FOLDS forwards, and return the scores of the predictions.

    A causal model predicts each token from those before it, in one forward.
    """
    mask_id, is_causal = policy.spec.mask_id, policy.spec.attention == "causal"
    fold = torch.zeros_like(tokens)
    if not is_causal:
        keys = torch.rand(tokens.shape, generator=generator).to(tokens.device).masked_fill(~hidden, 2)
        fold = keys.argsort(-1).argsort(-1) % FOLDS
    logprobs, right = [], []
    for number in range(1 if is_causal else FOLDS):
        at = hidden & (fold == number)
        if not at.any():
            continue
        shown = tokens if is_causal or mask_id is None else tokens.masked_fill(at, mask_id)
        logits = policy.logits(shown, attention_mask, at).float()
        if mask_id is not None:
            logits[:, mask_id] = -torch.inf  # it is never written
        right.append(logits.argmax(-1) == tokens[at])
        logprobs.append(logits.log_softmax(-1).gather(1, tokens[at][:, None])[:, 0])
    return Scores(torch.cat(right).double().mean().item(), torch.cat(logprobs).double().mean().item())


def best_alternative(subject: Subject, tokens: Int[Tensor, "1 T"], own: Scores) -> tuple[Alternative, Scores] | None:
    """Return the reading of the weights that predicts the text best, and its scores. None if none is MARGIN better than
    the model's own reading, and MIN_GAIN better than on shuffled text.
    """
    best: tuple[Alternative, Scores] | None = None
    least = own.logprob + MARGIN
    for alternative in alternatives(subject.policy):
        text, shuffled = text_and_shuffled(alternative.policy, tokens, subject.generator("text"))
        if text.logprob > least and text.logprob - shuffled.logprob >= MIN_GAIN:
            best, least = (alternative, text), text.logprob
    return best


def alternatives(policy: Policy) -> Iterator[Alternative]:
    """Yield other readings of the same weights. They share all tensors with the policy."""
    spec = policy.spec
    if spec.attention != "causal":
        shift = "the state before a token predicts it" if not spec.shift else "a state predicts its own position"
        advice = f"shift={spec.shift} of this family is wrong for these weights, in which {shift}: give them a spec "
        advice += f"with shift={not spec.shift} (shifted_head in config.json), or the config.json of their family"
        yield Alternative("shift", with_spec(policy, shift=not spec.shift), advice)
        for token in mask_candidates(policy):
            text = policy.tokenizer.decode([token], skip_special_tokens=False)
            advice = f"the mask token is not {spec.mask_id} but {token}, {text!r}: set mask_token_id in config.json"
            yield Alternative("mask token", with_spec(policy, mask_id=token), advice)
    if spec.is_also_causal:
        advice = (
            "the weights predict text better as an autoregressive model: before RL as a diffusion model, fine-tune "
            "them as one; if they were fine-tuned on other texts than prose, nothing is wrong"
        )
        yield Alternative("autoregressive weights", as_causal(policy), advice)
    if spec.attention == "causal" and is_stock(policy):
        module = module_with_attention(policy, causal=False)
        advice = (
            "the attention is causal, and these weights predict text better with full attention: they are of a "
            'diffusion model; add "is_causal": false and "mask_token_id" to config.json, as its authors have it'
        )
        for is_shifted in (False, True):
            for token in mask_candidates(policy)[:2]:
                other = with_spec(policy, attention="full", shift=is_shifted, mask_id=token)
                other.module = module
                yield Alternative("causal attention", other, advice)
    if (head := embedding_as_head(policy)) is not None:
        advice = (
            "the head is not the trained one, and the embedding predicts text better in its place: the head was tied "
            "to the embedding and got lost; set tie_word_embeddings to true in config.json"
        )
        yield Alternative("head", head, advice)


def with_spec(policy: Policy, **changes: object) -> Policy:
    """Return a policy that shares the module and has another spec."""
    other = copy.copy(policy)
    other.spec = replace(policy.spec, **changes)  # type: ignore[arg-type]
    return other


def mask_candidates(policy: Policy) -> list[int]:
    """Return tokens that may be the mask: the tokenizer's, those whose name says so, and the families' ids."""
    tokenizer, size = policy.tokenizer, policy.vocab_size
    found = [getattr(tokenizer, "mask_token_id", None)]
    if hasattr(tokenizer, "get_vocab"):
        names = tokenizer.get_vocab().items()
        special = [token for name, token in names if re.fullmatch(r"[<\[].*mask.*[>\]]", name, re.IGNORECASE)]
        found += sorted(special, reverse=True)
    found += [family.mask_id for family in FAMILIES if family.files.mask_vocabulary == size]
    usual = (token for token in found if token is not None and 0 <= token < size and token != policy.spec.mask_id)
    return list(dict.fromkeys(usual))[:MAX_MASKS]


def embedding_as_head(policy: Policy) -> Policy | None:
    """Return a policy whose head is the embedding. None if it is so already, or if the head is of another kind."""
    module = policy.module
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if policy.spec.head is not linear_head or head is None:
        return None
    embedding = module.get_input_embeddings().weight
    if embedding.shape != head.weight.shape or embedding.data_ptr() == head.weight.data_ptr():
        return None

    def project(module: object, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        return F.linear(hidden, embedding.to(hidden.dtype))

    other = with_spec(policy, head=project)
    other.float32_head = False  # it would replace the product of the module's own head
    return other
