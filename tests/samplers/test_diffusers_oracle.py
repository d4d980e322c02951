"""diffusers decodes as LLaDA2 does, with code that is not ours: which tokens, at which step, with which probability.

`LLaDA2Pipeline` and `BlockRefinementScheduler` (diffusers 0.42.1) define these otherwise than `threshold` and `edit`.
Tests bridge each difference by a setting:

- A probability must be above the threshold; here at least equal to it. No probability of these models equals one.
- Each step commits at least its share of `block_length` in `num_inference_steps`, prompt positions counted; here one.
  Bridge: more steps than a block has positions, which needs `gen_length` to be longer than a block.
- Batches wait for their slowest row; here a row moves on by itself. Bridge: one row per call.
- The mask token may be proposed, and then written or kept. Here it is never drawn, though its probability counts for
  the confidence. Bridge: it is never the likeliest, or its logit is -inf.
- The confidence is the probability at the temperature, after top_k and top_p; here it is that of the plain softmax.
  Bridge: a rank that says so, see `tempered`.
- Without editing, a forward that changes nothing ends each block. Such forwards are not counted.
- After the last mask of a block `max_post_steps` + 1 forwards may edit (LLaDA2.1's own code: `max_post_steps`). None
  may where the masks took all `num_inference_steps`. Here `diffusion_steps` bounds both: edits get what masks leave.
  Bridge: bounds that no block reaches, or `max_post_steps` counted from our rollout.
- A row stops in the step that writes its end token, if nothing before it is masked, and else goes on. Here it stops
  after the block, as in LLaDA2.1's own code. Bridge: no end token, or the steps of both and the text up to that token.
- The last block is whole: positions behind `gen_length` are committed, too, and may be the best of a step. Here it is
  shorter. Bridge: prompt and completion end with a block.
- A model of full attention does not see the blocks behind its own; here it does. Bridge: a single block.
- `editing_threshold` 0 never edits; `tau_edit=0` edits wherever the proposal differs.

What is equal without a bridge: editing from the first step on, in the same forward as commits, of no prompt position,
by the proposal's probability alone; blocks that count from the prompt's start.
"""

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from dllm_rl.models.base import encode_block_causal
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.rng import uniforms
from dllm_rl.samplers import revise, rules
from dllm_rl.samplers.canvas import TOKEN_STREAM
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts

pytestmark = pytest.mark.slow  # what editing writes is worked by hand in test_revise.py
MASK, EOS = 1, 2
BLOCK = 6
SIZES = {"characters": "0123456789abcdef", "num_layers": 2, "hidden_size": 32, "max_length": 40}
GREEDY = {"temperature": 0.0}
BOUND = 100  # steps per block


def with_head(policy, *, mask: float, end: float = -torch.inf):
    """The policy with the mask's logit `mask` above the best other one, and the end token's `end` above its own."""

    def head(module, hidden, plain=policy.spec.head):
        logits = plain(module, hidden).clone()
        logits[..., MASK] = -torch.inf
        logits[..., EOS] += end
        logits[..., MASK] = logits.amax(-1) + mask
        return logits

    policy.spec = replace(policy.spec, head=head)
    return policy


def block_causal(*, head_std: float = 0.6, **changes):
    policy = tiny_llama(causal=False, head_std=head_std, **SIZES)
    spec = replace(policy.spec, name="toy", attention="block_causal", block_size=BLOCK)
    policy.spec = replace(spec, encode=partial(encode_block_causal, spec=spec))
    return with_head(policy, **changes)


def full(**changes):
    return with_head(tiny_masked_lm(head_std=0.6, **SIZES), **changes)


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 19, (length,), generator=generator).tolist() for length in lengths]


def tempered(logits, tokens, *, scheduler, temperature, top_k, top_p):
    """A rank: log-probability of the token in the distribution that it was drawn from, as diffusers filters it."""
    filtered = scheduler._top_p_filtering(scheduler._top_k_filtering(logits / temperature, top_k), top_p)
    return filtered.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


class Model:
    """A policy as the pipeline calls it. Counts steps, by which our sampler's random numbers are known."""

    def __init__(self, policy, prompt: list[int], seed: int, editing: bool):
        self.policy, self.prompt, self.seed, self.editing = policy, prompt, seed, editing
        self.steps, self.end = 0, 0

    def __call__(self, tokens, *, attention_mask, position_ids):
        assert attention_mask.all() and torch.equal(position_ids[0], torch.arange(tokens.shape[1]))
        self.end = tokens.shape[1] - len(self.prompt)
        self.step = torch.tensor(self.steps)
        self.steps += self.editing or bool((tokens == MASK).any())
        return SimpleNamespace(logits=self.policy.logits(tokens, attention_mask.bool()))

    def multinomial(self, probs, num_samples, generator=None):
        """In place of torch.multinomial: the inverse of the cumulative sum at our uniforms."""
        places = torch.arange(self.end - BLOCK, self.end).clamp(min=0)  # what the prompt would get is not used
        seeds = torch.full_like(places, self.seed)
        drawn = uniforms(seeds, self.step.expand(len(places)), places, stream=TOKEN_STREAM)
        mass = probs.double().cumsum(-1)
        return torch.searchsorted(mass, drawn[:, None] * mass[:, -1:], right=True)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", minversion="0.42", reason="diffusers comes with the extra `test`")


@pytest.fixture
def theirs(diffusers, monkeypatch):
    """What the pipeline does with a prompt: {(step, place, kind, token): probability}, the completion, the steps."""
    names = ["transfer_index", "editing_transfer_index", "sampled_tokens", "sampled_probs"]

    def run(policy, prompt, seed, length, *, tau, tau_edit=None, end=None, **options):
        model, events = Model(policy, prompt, seed, tau_edit is not None), {}

        def note(pipeline, number, timestep, seen):
            columns = zip(*(seen[name][0].tolist() for name in names), strict=True)
            for i, (commits, edits, token, p) in enumerate(columns):
                if commits or edits:
                    kind = "edit" if edits else "commit"
                    events[int(model.step), model.end - BLOCK + i, kind, token] = p
            return {}

        pipeline = diffusers.LLaDA2Pipeline(model, diffusers.BlockRefinementScheduler(block_length=BLOCK))
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": BOUND, "max_post_steps": BOUND, "sampling_method": "auto"} | options
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", model.multinomial)
            found = pipeline(
                input_ids=torch.tensor([prompt]), gen_length=length, threshold=tau, editing_threshold=tau_edit,
                eos_early_stop=end is not None, eos_token_id=end, mask_token_id=MASK, output_type="seq",
                callback_on_step_end=note, callback_on_step_end_tensor_inputs=names, **options,
            )  # fmt: skip
        return events, found.sequences[0].tolist(), model.steps

    return run


def ours(policy, ids, length, *, tau, tau_edit=None, diffusion_steps=None, **options):
    """`theirs` of each row in one batch, whose seeds are the rows' numbers; and the forwards of the batch."""
    rule = rules.Threshold(tau=tau)
    if tau_edit is not None:
        rule = revise.Edit(tau=tau, tau_edit=tau_edit)
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, seeds=range(len(ids)))
    rollout = Unmask(
        max_new_tokens=length, diffusion_steps=diffusion_steps, commit=rule, **{"rank": rules.Confidence(), **options}
    )(policy, prompts, torch.Generator())
    record = [rollout.unmask_step[..., None], rollout.tokens[..., None], rollout.logprobs[..., None]]
    if rollout.events is not None:
        record = [rollout.events.step, rollout.events.token, rollout.events.logprobs]
    found = []
    for steps, tokens, logprobs in zip(*(x[:, -length:].tolist() for x in record), strict=True):
        found.append({})
        for place, events in enumerate(zip(steps, tokens, logprobs, strict=True)):
            for number, (step, token, logprob) in enumerate(zip(*events, strict=True)):
                if step >= 0:
                    found[-1][step, place, "edit" if number else "commit", token] = math.exp(logprob)
    return found, rollout.tokens[:, -length:].tolist(), rollout.forwards


def steps_with_masks(events) -> int:
    """Steps that a row with one block took until its last mask was written."""
    return 1 + max(step for step, _, kind, _ in events if kind == "commit")


def of(kind, events):
    return [event for event in events if event[2] == kind]


def check(found, tokens, forwards, wanted, *, edits: bool):
    assert [set(events) for events in found] == [set(events) for events, _, _ in wanted]
    assert tokens == [sequence for _, sequence, _ in wanted] and forwards == max(steps for *_, steps in wanted)
    assert forwards < BOUND and any(of("edit", events) for events in found) == edits
    commits = [Counter(step for step, *_ in of("commit", events)).values() for events in found]
    assert any(max(many) > 1 for many in commits) and any(min(many) == 1 for many in commits)


EDITING = pytest.mark.parametrize("editing", [False, True], ids=["threshold", "edit"])


@EDITING
@pytest.mark.parametrize(("offset", "head_std", "tau_edit"), [(0, 1.0, 0.7), (2, 1.0, 0.7), (5, 0.6, 0.5)])
def test_greedy(theirs, offset, head_std, tau_edit, editing):
    """Several blocks, prompts that end within one, rows of several lengths. The mask token has much probability."""
    policy = block_causal(mask=-1.0, head_std=head_std)
    thresholds = {"tau": 0.4, "tau_edit": tau_edit if editing else None}
    ids, length = prompts_of(*[offset + BLOCK, offset + 2 * BLOCK] * 2), 3 * BLOCK - offset
    found, tokens, forwards = ours(policy, ids, length, diffusion_steps=3 * BOUND, **GREEDY, **thresholds)
    wanted = [theirs(policy, row, seed, length, **thresholds) for seed, row in enumerate(ids)]
    check(found, tokens, forwards, wanted, edits=editing)


SAMPLING = [(1.0, None, None), (0.7, None, None), (1.3, 6, 0.8)]


@EDITING
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SAMPLING)
def test_sampled(diffusers, theirs, temperature, top_k, top_p, editing):
    """The same uniforms draw the tokens. At temperature 1 without filters the rank is our own `confidence`."""
    policy, offset, thresholds = block_causal(mask=-torch.inf), 2, {"tau": 0.7, "tau_edit": 0.7 if editing else None}
    ids, length = prompts_of(*[offset + BLOCK, offset + 2 * BLOCK] * 2), 3 * BLOCK - offset
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    rank = rules.Confidence()
    if temperature != 1:
        rank = partial(tempered, scheduler=diffusers.BlockRefinementScheduler, **options)
    options |= thresholds
    found, tokens, forwards = ours(policy, ids, length, diffusion_steps=3 * BOUND, rank=rank, **options)
    wanted = [theirs(policy, row, seed, length, **options) for seed, row in enumerate(ids)]
    check(found, tokens, forwards, wanted, edits=editing)
    for events, (same, _, _) in zip(found, wanted, strict=True):
        assert events == pytest.approx(same, rel=1e-4)  # the probabilities; 2e-6 apart where measured


@pytest.mark.parametrize("make", [block_causal, full])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_bound_of_edits(theirs, make, temperature):
    """One block, and edits that go on until the bound. Every step counts for `diffusion_steps`."""
    policy, diffusion_steps, ended = make(mask=-torch.inf), 9, []
    ids, thresholds = prompts_of(*[BLOCK] * 6), {"tau": 0.4, "tau_edit": 0.05}
    found, tokens, _ = ours(policy, ids, BLOCK, diffusion_steps=diffusion_steps, temperature=temperature, **thresholds)
    for seed, (row, events) in enumerate(zip(ids, found, strict=True)):
        if (masks := steps_with_masks(events)) < BLOCK:
            more = {"max_post_steps": diffusion_steps - masks - 1, "temperature": temperature}
            wanted, sequence, steps = theirs(policy, row, seed, BLOCK, **thresholds, **more)
            assert set(events) == set(wanted) and tokens[seed] == sequence
            assert events == pytest.approx(wanted, rel=1e-4)
            ended.append((steps, max(step for step, *_ in events)))
    assert (diffusion_steps, diffusion_steps - 1) in ended  # the last step that was left still edited


def test_an_end_token(theirs):
    """What is written up to the end token is the same, though diffusers stops there, or goes on where it came early."""
    policy, length, shorter, longer = block_causal(mask=-torch.inf, end=5.0), 2 * BLOCK, 0, 0
    ids, options = prompts_of(*[BLOCK] * 12), {"tau": 0.7, "temperature": 1.0}
    found, tokens, _ = ours(policy, ids, length, **options)
    for seed, (row, events) in enumerate(zip(ids, found, strict=True)):
        wanted, sequence, _ = theirs(policy, row, seed, length, end=EOS, **options)
        last = [max(step for step, *_ in one) for one in (events, wanted)]
        assert {e for e in events if e[0] <= min(last)} == {e for e in wanted if e[0] <= min(last)}
        texts = [x[: x.index(EOS) + 1] if EOS in x else x for x in (sequence, tokens[seed])]
        assert texts[0] == texts[1]
        shorter, longer = shorter + (last[1] < last[0]), longer + (last[1] > last[0])
    assert shorter and longer
