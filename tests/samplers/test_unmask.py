"""The sampler against LLaDA's published algorithm, written out row by row; its rows are independent."""

import copy
from dataclasses import replace

import pytest
import torch
from likelihood_toys import TablePolicy
from order_toys import stayed_of
from repetitions import few, pairwise, slow

from dllm_rl.likelihoods.estimators import Trajectory, recorded
from dllm_rl.models import logprobs as head
from dllm_rl.models.base import FORWARD_COST
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers import rules, whole_step
from dllm_rl.samplers.cache import DualCache
from dllm_rl.samplers.canvas import BlockTracker, make_canvas
from dllm_rl.samplers.choose import StepSampler
from dllm_rl.samplers.unmask import RaggedSteps, Unmask, check_fits
from dllm_rl.types.rollouts import Prompts, SamplingParams

CHARACTERS = "0123456789 abcdefghijklmnop"
LENGTH = 32
# Head and embeddings large enough that confidences differ widely and tokens depend on their neighbors.
SIZES = {"characters": CHARACTERS, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "head_std": 0.5}
IDS = [[3, 4, 5, 6], [7], [8, 9, 10, 11, 12, 13, 14], [15, 16], [4, 4, 4], [20, 21, 22, 23, 24], [9, 8], [5, 17, 3, 11]]


@pytest.fixture(scope="module", params=few(["masked_lm", "llama"], ["masked_lm"]))
def policy(request):
    return tiny_llama(causal=False, **SIZES) if request.param == "llama" else tiny_masked_lm(**SIZES)


def published(policy, prompt, *, length, steps, block_length):
    """LLaDA's generate at temperature 0 with low-confidence remasking, one row, no padding; its steps are shared by
    blocks, equal numbers of tokens a step, the remainder on the first steps. The mask token cannot be chosen."""
    mask_id = policy.spec.mask_id
    x = list(prompt) + [mask_id] * length
    num_blocks = length // block_length
    assert length % block_length == 0 and steps % num_blocks == 0
    order, step = {}, 0
    for block in range(num_blocks):
        begin, end = len(prompt) + block * block_length, len(prompt) + (block + 1) * block_length
        in_block = steps // num_blocks
        transfers = [block_length // in_block + (i < block_length % in_block) for i in range(in_block)]
        for transfer in transfers:
            tokens = torch.tensor([x])
            logits = policy.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[0].double()
            probs = logits.softmax(-1)
            logits[:, mask_id] = -torch.inf
            candidates = []
            for position in range(begin, end):
                if x[position] == mask_id:
                    token = int(logits[position].argmax())
                    candidates.append((-float(probs[position, token]), position, token))
            for _, position, token in sorted(candidates)[:transfer]:
                x[position], order[position - len(prompt)] = token, step
            step += 1
    return x[len(prompt) :], [order[i] for i in range(length)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("block_length", "steps"),
    pairwise([8, 16, 32, None], [32, 16, 20, 12], kept=[(8, 12), (None, 12)]),
)
def test_equals_published_algorithm(policy, block_length, steps):
    """Blocks of 8, 16 and 32, and one open block; steps equal to, below, and not dividing the length; batch 1 and 8."""
    ids = IDS if block_length in (8, 32) else IDS[:1]
    rollout = Unmask(max_new_tokens=LENGTH, diffusion_steps=steps, block_size=block_length)(
        policy, Prompts.from_ids(ids, pad_id=0), torch.Generator()
    )
    start = rollout.tokens.shape[1] - LENGTH
    picked = (0, 2) if len(ids) > 1 else (0,)
    for row in picked:
        tokens, order = published(policy, ids[row], length=LENGTH, steps=steps, block_length=block_length or LENGTH)
        assert rollout.tokens[row, start:].tolist() == tokens
        assert rollout.unmask_step[row, start:].tolist() == order
    assert rollout.forwards == steps
    assert len(set(rollout.tokens[0, start:].tolist())) > 2  # the comparison is not one of constant rows


def test_blocks_and_steps_that_do_not_divide(policy):
    """20 positions in blocks of 8, 8, 4; 7 steps are 3, 2, 2; the shares are 3,3,2 | 4,4 | 2,2."""
    rollout = Unmask(max_new_tokens=20, diffusion_steps=7, block_size=8)(
        policy, Prompts.from_ids([[3, 4]], pad_id=0), torch.Generator()
    )
    steps = rollout.unmask_step[0, 2:]
    assert [int((steps == s).sum()) for s in range(7)] == [3, 3, 2, 4, 4, 2, 2]
    assert steps[:8].max() == 2 and steps[8:16].min() == 3 and steps[8:16].max() == 4 and steps[16:].min() == 5


def test_left_to_right_writes_the_leftmost_masks_of_every_block(policy):
    """The shares of the test above, of rows of different lengths."""
    rollout = sample(policy, IDS[:3], [1, 2, 3], diffusion_steps=7, rank=rules.LeftToRight())
    assert rollout.unmask_step[:, -20:].tolist() == 3 * [[0] * 3 + [1] * 3 + [2] * 2 + [3] * 4 + [4] * 4 + [5, 5, 6, 6]]


class EvenFirst(rules.Rank):
    """The likeliest positions, but every even one before the odd ones."""

    order = "deterministic"

    def __call__(self, logits, normalizer, positions):
        return logits.amax(-1) - normalizer + 1000.0 * (positions % 2 == 0)


@pytest.mark.parametrize("options", [{}, {"compile_step": True}, {"cache": DualCache(refresh=2)}, {"temperature": 0.0}])
def test_a_rank_reads_the_places_of_the_positions(policy, monkeypatch, options):
    """In blocks of 8, 8 and 4, of rows of different lengths."""
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    rollout = sample(policy, IDS[:3], [1, 2, 3], diffusion_steps=20, rank=EvenFirst(), **options)
    steps = rollout.unmask_step[:, -20:]
    for start, end in ((0, 8), (8, 16), (16, 20)):
        assert (steps[:, start:end:2].amax(-1) < steps[:, start + 1 : end : 2].amin(-1)).all()
    assert len({tuple(row) for row in steps.tolist()}) == 3, "the weights order the even ones"
    backwards = sample(policy, IDS[:3], [1, 2, 3], diffusion_steps=20, rank=lambda positions: positions, **options)
    for start, end in ((0, 8), (8, 16), (16, 20)):
        block = backwards.unmask_step[:, -20:][:, start:end]
        assert (block.diff(dim=-1) <= 0).all() and (block[:, 0] > block[:, -1]).all()


RULES = {
    "confidence": {"rank": rules.Confidence()},
    "max_prob": {"rank": rules.MaxProb(), "temperature": 0.7},
    "margin": {"rank": rules.Margin(), "commit": rules.LateSchedule()},
    "entropy": {"rank": rules.Entropy(), "commit": rules.EntropyBound(gamma=6.0)},
    "random": {"rank": rules.RandomOrder()},
    "plackett_luce": {"rank": rules.PlackettLuce(temperature=0.3), "temperature": 0.7, "top_k": 9},
    "origin": {"rank": rules.RandomOrder(), "commit": rules.Origin()},
    "threshold": {"rank": rules.Confidence(), "commit": rules.Threshold(tau=0.3)},
    "soft_threshold": {"rank": rules.MaxProb(), "commit": rules.SoftThreshold(tau=0.3, temperature=1.0)},
    "greedy": {"temperature": 0.0, "commit": rules.Threshold(tau=0.3), "suppress": (2, 5)},
}


OFTEN_ENDING = {"suppress": tuple(range(3, 20)), "temperature": 4.0}


def sample(policy, ids, seeds, *, width=0, length=20, on_step=None, **options):
    options = {"temperature": 1.0, "block_size": 8, "diffusion_steps": 9} | options
    prompts = Prompts.from_ids(ids, pad_id=0, seeds=seeds)
    if width:
        pad = lambda x: torch.nn.functional.pad(x, (width - x.shape[1], 0))  # noqa: E731
        prompts = replace(prompts, tokens=pad(prompts.tokens), attention_mask=pad(prompts.attention_mask))
    return Unmask(max_new_tokens=length, **options)(policy, prompts, torch.Generator(), on_step=on_step)


@pytest.mark.parametrize("name", few(RULES, ["plackett_luce", "threshold"]))
def test_row_depends_on_itself_only(policy, name):
    """Alone, among eight, permuted and left-padded: the same tokens, order and log-probs."""
    seeds = [11, 22, 33, 44, 55, 66, 77, 88]
    length, size, steps = (20, 8, 9) if name in ("soft_threshold", "entropy") else (12, 5, 6)
    options = {"length": length, "block_size": size, "diffusion_steps": steps} | RULES[name]
    together = sample(policy, IDS, seeds, **options)
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    permuted = sample(policy, [IDS[i] for i in order], [seeds[i] for i in order], **options)
    padded = sample(policy, IDS, seeds, width=12, **options)
    ends = set()
    for row in (0, 2, 5):
        alone = sample(policy, [IDS[row]], [seeds[row]], **options)
        for other, index in ((together, row), (permuted, order.index(row)), (padded, row)):
            for column in ("tokens", "unmask_step", "logprobs"):
                ours, theirs = getattr(alone, column)[0, -length:], getattr(other, column)[index, -length:]
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if column == "logprobs" else 0)
        ends.add(alone.forwards)
    if name in ("threshold", "soft_threshold", "entropy"):
        assert len(ends) > 1 and together.forwards == int(together.unmask_step.max()) + 1 < 8 * length  # ragged ends


@pytest.mark.parametrize("name", few(RULES, ["confidence"]))
@pytest.mark.usefixtures("exact_arithmetic")
def test_replay_gives_recorded_logprobs_bitwise(policy, name):
    assert_replayed(policy, name, atol=0)


@pytest.mark.parametrize("name", few(RULES, ["plackett_luce"]))
def test_replay_gives_recorded_logprobs_to_rounding(policy, name):
    assert_replayed(policy, name, atol=1e-5)


def assert_replayed(policy, name, *, atol):
    prompts = Prompts.from_ids(IDS[:3], pad_id=0, num_generations=2)
    options = {"temperature": 1.0, "block_size": 8, "diffusion_steps": 5} | RULES[name]
    rollout = Unmask(max_new_tokens=12, **options)(policy, prompts, torch.Generator().manual_seed(0))
    estimator = Trajectory()
    noise = estimator.draw_views(rollout, torch.Generator())
    for size in (None, 2):
        found = estimator.logprobs(policy, rollout, noise, micro_batch_size=size)
        torch.testing.assert_close(found, recorded(rollout, noise), rtol=0, atol=atol)
    assert (stayed_of(noise) is None) == (name not in ("confidence", "plackett_luce", "soft_threshold"))
    given = Trajectory(include_order=False)
    tokens = given.logprobs(policy, rollout, given.draw_views(rollout, torch.Generator()))
    torch.testing.assert_close(tokens, rollout.logprobs, rtol=0, atol=atol)


def test_group_shares_first_forward(policy, monkeypatch):
    """The first state is read once per prompt, and every later one by rows; completions of a group differ."""
    rows, hidden = [], policy.hidden
    monkeypatch.setitem(vars(policy), "hidden", lambda tokens, mask: rows.append(len(tokens)) or hidden(tokens, mask))
    prompts = Prompts.from_ids(IDS[:2], pad_id=0, num_generations=3)
    rollout = Unmask(max_new_tokens=4, diffusion_steps=4, temperature=3.0)(
        policy, prompts, torch.Generator().manual_seed(0)
    )
    assert rows == [2, 6, 6, 6]
    assert not torch.equal(rollout.tokens[0], rollout.tokens[1])


def test_rows_share_a_forward_if_group_and_prompt_are_equal():
    prompts = Prompts.from_ids([[3, 4], [5], [5]], pad_id=0, num_generations=[3, 1, 2])
    rows, copies = prompts.shared_rows(torch.arange(6))
    assert rows.tolist() == [0, 3, 4] and copies.tolist() == [0, 0, 0, 1, 2, 2]
    rows, copies = prompts.shared_rows(torch.tensor([1, 2, 5]))
    assert rows.tolist() == [1, 5] and copies.tolist() == [0, 0, 1]
    one_group = replace(prompts, group=torch.zeros(6, dtype=torch.long))
    rows, copies = one_group.shared_rows(torch.arange(6))
    assert rows.tolist() == [0, 3] and copies.tolist() == [0, 0, 0, 1, 1, 1]
    gaps = replace(one_group, infill_mask=torch.arange(12).view(6, 2) == 9)  # in row 4
    assert gaps.shared_rows(torch.arange(6))[0].tolist() == [0, 3, 4, 5]


def test_groups_of_different_sizes_are_sampled_like_rows_of_their_own(policy, monkeypatch):
    rows, hidden = [], policy.hidden
    monkeypatch.setitem(vars(policy), "hidden", lambda tokens, mask: rows.append(len(tokens)) or hidden(tokens, mask))
    sampler = Unmask(max_new_tokens=4, diffusion_steps=4, temperature=3.0)
    prompts = Prompts.from_ids(IDS[:3], pad_id=0, num_generations=[3, 1, 2], seeds=range(6))
    together = sampler(policy, prompts, torch.Generator())
    assert rows == [3, 6, 6, 6] and together.group.tolist() == [0, 0, 0, 1, 2, 2]
    apart = sampler(policy, replace(prompts, group=torch.arange(6)), torch.Generator())
    assert torch.equal(together.tokens, apart.tokens)
    torch.testing.assert_close(together.logprobs, apart.logprobs, rtol=0, atol=1e-5)


def test_finished_rows_leave_the_batch(policy, monkeypatch):
    rows, hidden = [], policy.hidden
    monkeypatch.setitem(vars(policy), "hidden", lambda tokens, mask: rows.append(len(tokens)) or hidden(tokens, mask))
    rollout = sample(policy, IDS, list(range(8)), commit=rules.Threshold(tau=0.3))
    steps = rollout.unmask_step.amax(-1) + 1
    assert rows == [int((steps > n).sum()) for n in range(int(steps.max()))] and rows[-1] < 8


def test_state_only_rank_draws_only_where_it_commits(policy, monkeypatch):
    """Inverting the cumulative distribution, the costly part of a draw, sees committed positions, padded to ROWS."""
    from dllm_rl.samplers import choose

    drawn, invert_cdf = [], choose.invert_cdf
    monkeypatch.setattr(choose, "invert_cdf", lambda mass, u: drawn.append(len(u)) or invert_cdf(mass, u))
    for rank, count in ((rules.Entropy(), 32), (rules.Confidence(), 64)):
        drawn.clear()
        Unmask(max_new_tokens=32, diffusion_steps=2, temperature=1.0, rank=rank)(
            policy, Prompts.from_ids(IDS[:2], pad_id=0), torch.Generator()
        )
        assert drawn[0] == count


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}, {"top_p": 1.0}]
)
def test_a_rank_reads_the_models_own_probabilities(policy, options):
    """Whatever is sampled from, logits and normalizer are untempered and unfiltered, with the mask token in them; the
    fresh numbers of a rank are not those that tokens are drawn with."""
    seen, alike = [], []

    def look(logits, normalizer, tokens, uniforms):
        drawn = logits.index_fill(-1, torch.tensor([policy.spec.mask_id]), -torch.inf)
        alike.append(torch.equal(head.sample(drawn, uniforms), tokens))
        assert logits.dtype == torch.float32 and logits[:, policy.spec.mask_id].isfinite().all()
        seen.append((normalizer - logits.logsumexp(-1)).abs().max().item())
        assert logits[:, 3].isneginf().all() and (tokens != 3).all()
        return uniforms

    sample(policy, IDS[:2], [5, 6], rank=look, suppress=(3,), **options)
    assert len(seen) == 9 and max(seen) < 1e-5 and not all(alike)


@pytest.mark.parametrize("float32_head", [True, False])
def test_half_precision_logits_are_ranked_in_fp32(policy, float32_head):
    half, dtypes = copy.copy(policy), set()
    half.module, half.float32_head = copy.deepcopy(policy.module).bfloat16(), float32_head

    def look(logits, tokens):
        dtypes.add(logits.dtype)
        return logits[:, 3]

    sample(half, IDS[:1], [5], rank=look)
    assert dtypes == {torch.float32}


def test_greedy_tokens_come_with_the_ranks_own_logits(policy, monkeypatch):
    """At temperature 0 a rank that reads logits costs one pass of the head a step: 32 positions, then the other 16."""
    rows, run = [], policy.head
    monkeypatch.setitem(vars(policy), "head", lambda h: rows.append(len(h)) or run(h))
    prompts = Prompts.from_ids(IDS[:1], pad_id=0)
    Unmask(max_new_tokens=32, diffusion_steps=2, rank=rules.MaxProb())(policy, prompts, torch.Generator())
    assert rows == [32, 16]


def test_what_a_rule_chooses_beyond_the_open_masks_is_not_written(policy):
    """A rule that marks every position writes a block a step, each position once; one that marks all but the open
    masks, and the first of these, a position a step."""
    rollout = sample(policy, IDS[:3], [1, 2, 3], commit=lambda scores, masked, steps_left: torch.ones_like(masked))
    assert rollout.forwards == 3
    assert rollout.unmask_step[:, -20:].tolist() == [[0] * 8 + [1] * 8 + [2] * 4] * 3
    first = lambda scores, masked, steps_left: ~masked | (masked.cumsum(-1) == 1)  # noqa: E731
    rollout = sample(policy, IDS[:3], [1, 2, 3], commit=first)
    assert rollout.unmask_step[:, -20:].tolist() == [list(range(20))] * 3


class FourPerStep(rules.Commit):
    order = "deterministic"

    @staticmethod
    def count(num_masked, steps_left):
        return torch.full_like(num_masked, 4)

    def __call__(self, scores, masked, steps_left):
        return rules.highest(scores, masked, count=self.count(masked.sum(-1), steps_left))


@pytest.mark.parametrize("length", [6, 0])
def test_a_count_beyond_the_open_masks_writes_those_alone(policy, length):
    """Two steps of 4 and 2 positions; without new tokens, a step for 3 blanks, and two for 5."""
    ids = [[3, 4], [5, 6, 7]] if length else [[1, 1, 1, 5, 6], [1, 1, 1, 1, 1]]
    mask_id = None if length else policy.spec.mask_id
    prompts = Prompts.from_ids(ids, pad_id=0, num_generations=2, seeds=range(4), mask_id=mask_id)
    sampler = Unmask(max_new_tokens=length, temperature=1.0, commit=FourPerStep())
    rollout = sampler(policy, prompts, torch.Generator())
    per_step = [[int((steps == s).sum()) for s in (0, 1)] for steps in rollout.unmask_step]
    assert per_step == ([[4, 2]] * 4 if length else [[3, 0]] * 2 + [[4, 1]] * 2)
    views = Trajectory().draw_views(rollout, torch.Generator())
    torch.testing.assert_close(
        Trajectory().logprobs(policy, rollout, views), recorded(rollout, views), rtol=0, atol=1e-4
    )


def test_a_compiled_step_ends_a_row_whose_count_is_beyond_the_open_masks(policy, monkeypatch):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    options = {"block_size": 6, "commit": FourPerStep(), "approximate_early_exit": True} | OFTEN_ENDING
    ragged, fixed = (sample(policy, IDS, list(range(8)), compile_step=on, **options) for on in (False, True))
    assert torch.equal(fixed.tokens, ragged.tokens) and not fixed.completion_mask[:, -20:].all()


def at_random(scores, masked, steps_left):
    return masked & (torch.rand(masked.shape) < 0.5) | (masked & (steps_left[:, None] == 1))


def lowest(scores, masked, steps_left):
    return rules.Schedule()(-scores.masked_fill(~masked, torch.inf), masked, steps_left)


def two_highest(scores, masked, steps_left):
    return rules.highest(scores, masked, count=torch.full_like(steps_left, 2))


class LastPosition(FourPerStep):
    """It inherits the claims of its parent."""

    order = "deterministic"

    def __call__(self, scores, masked, steps_left):
        return masked & (masked.flip(-1).cumsum(-1).flip(-1) <= 4)


def remasks_at_random(scores, masked, steps_left, remaskable):
    return masked | (remaskable & (torch.rand(masked.shape) < 0.5) & (steps_left[:, None] > 1))


def count_of_three(num_masked, steps_left):
    return torch.full_like(num_masked, 3)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            rules.FunctionCommit(function=at_random, order="deterministic"),
            "commit=at_random is declared deterministic, but",
        ),
        (
            rules.FunctionCommit(function=remasks_at_random, order="deterministic"),
            "commit=remasks_at_random is declared",
        ),
        (
            rules.FunctionCommit(function=lowest, order="deterministic", count=rules.Schedule.count),
            "commit=lowest chose other",
        ),
        (
            rules.FunctionCommit(function=two_highest, order="deterministic", count=count_of_three),
            "commit=two_highest chose",
        ),
        (rules.FunctionCommit(function=two_highest, count=count_of_three), "commit=two_highest chose other positions"),
        (LastPosition(), "commit=LastPosition chose other positions"),
        (
            rules.FunctionCommit(function=two_highest, count=lambda masked, left: 2),
            "count of commit=two_highest must return",
        ),
        (lambda scores, masked, steps_left: masked[0], r"returned torch.bool of the shape \(8,\); return torch.bool"),
        (lambda scores, masked, steps_left: masked.float(), "returned torch.float32 of the shape"),
        (lambda scores, masked, steps_left, redrawable: masked.any(-1, keepdim=True), "returned torch.bool of the sh"),
        (lambda scores, masked, steps_left: None, "returned NoneType"),
    ],
)
@pytest.mark.parametrize("compile_step", [False, True])
def test_a_commit_rule_that_contradicts_what_it_declares_is_named(policy, monkeypatch, rule, message, compile_step):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    sampler = Unmask(max_new_tokens=8, temperature=1.0, commit=rule, compile_step=compile_step)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="which rewrites" if compile_step and sampler.commit.revises else message):
        sampler(policy, Prompts.from_ids(IDS[:2], pad_id=0), torch.Generator())


@pytest.mark.parametrize("wrap", [lambda rank: rank, lambda rank: rules.PlackettLuce(temperature=1.0, base_rank=rank)])
def test_a_rank_of_random_numbers_that_is_declared_deterministic_is_named(policy, wrap):
    rank = rules.FunctionRank(function=lambda logits: logits[:, 0] + torch.randn(len(logits)), order="deterministic")
    with pytest.raises(ValueError, match="rank=<lambda> is declared deterministic, but gave different scores"):
        sample(policy, IDS[:2], [5, 6], rank=wrap(rank))


def test_rank_without_logits_runs_no_head(policy, monkeypatch):
    rows, run = [], policy.head
    monkeypatch.setitem(vars(policy), "head", lambda h: rows.append(len(h)) or run(h))
    Unmask(max_new_tokens=32, diffusion_steps=2, rank=rules.RandomOrder())(
        policy, Prompts.from_ids(IDS[:1], pad_id=0), torch.Generator()
    )
    assert rows == [head.MIN_HEAD_ROWS, head.MIN_HEAD_ROWS]


def test_suppressed_and_mask_tokens_are_never_drawn(policy):
    rollout = sample(policy, IDS, list(range(8)), temperature=5.0, suppress=(3, 4, 5, 6, 7))
    drawn = rollout.tokens[rollout.completion_mask]
    assert not torch.isin(drawn, torch.tensor([3, 4, 5, 6, 7, policy.spec.mask_id])).any()
    assert (
        rollout.sampling_params.suppress == (3, 4, 5, 6, 7, policy.spec.mask_id)
        and rollout.sampling_params.temperature == 5.0
    )


@pytest.mark.usefixtures("exact_arithmetic")
def test_approximate_early_exit_keeps_the_tail_masked(policy):
    """Rows stop after the block in which an end token stands; what was written before is what would have been, and
    replay, which sees the same masks behind, is exact."""
    eos, length, ids = policy.spec.eos_ids[0], 24, IDS[:4]
    options = {"length": length, "diffusion_steps": 6} | OFTEN_ENDING
    full = sample(policy, ids, range(4), **options)
    short = sample(policy, ids, range(4), **options, approximate_early_exit=True)
    lengths = set()
    for row in range(4):
        completion = full.tokens[row, -length:].tolist()
        blocks = [b for b in range(3) if eos in completion[8 * b : 8 * b + 8]]
        kept = 8 * (blocks[0] + 1) if blocks else length
        lengths.add(kept)
        assert short.tokens[row, -length:].tolist() == completion[:kept] + [policy.spec.mask_id] * (length - kept)
        assert short.completion_mask[row, -length:].tolist() == [True] * kept + [False] * (length - kept)
        assert short.attention_mask[row, -length:].all()
    assert len(lengths) > 1  # rows end in different blocks
    estimator = Trajectory()
    noise = estimator.draw_views(short, torch.Generator())
    assert torch.equal(estimator.logprobs(policy, short, noise), recorded(short, noise))


def test_watch_sees_every_step(policy):
    seen = []
    rollout = sample(policy, IDS[:2], [0, 1], on_step=seen.append)
    assert [int((r.unmask_step.max()) + 1) for r in seen] == list(range(1, rollout.forwards + 1))
    assert torch.equal(seen[-1].tokens, rollout.tokens)
    hidden = seen[0].completion_mask != rollout.completion_mask
    assert hidden.any() and (seen[0].tokens[hidden] == policy.spec.mask_id).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"diffusion_steps": 2, "block_size": 4}, "diffusion_steps=2 is fewer than the 5 blocks"),
        ({"max_new_tokens": 80}, "max_new_tokens=80 after a prompt of 2 tokens exceeds .* use at most 6[23]"),
        ({"diffusion_steps": 99}, "diffusion_steps=99 is more than the 20 tokens of a completion, .* use at most 20"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"suppress": (-1,)}, "suppress=-1 is not one of the 30 token ids; leave it out"),
        ({"suppress": (3, 30)}, "suppress=30 is not one of the 30 token ids; leave it out"),
        ({"suppress": tuple(range(30))}, "suppress .* all 30 tokens"),
        ({"rank": lambda logits, scale: logits[:, 0]}, "takes 'scale'"),
        ({"commit": lambda scores, masked, steps_left: masked & False}, "chose nothing in the last step"),
    ],
)
def test_errors_name_the_value_and_a_remedy(policy, options, message):
    options = {"max_new_tokens": 20, "diffusion_steps": 20} | options
    with pytest.raises(ValueError, match=message):
        Unmask(**options)(policy, Prompts.from_ids([[3, 4]], pad_id=0), torch.Generator())


def naive_entropy(logits, normalizer):
    p = (logits - normalizer[:, None]).exp()
    return (p * p.log()).sum(-1)


def nan_at_some(uniforms):
    return uniforms.masked_fill(uniforms < 0.3, torch.nan)


def log_of_a_negative_number(hidden):
    return (hidden[:, 0] - 100).log()


def ratio(logits, tokens):
    return logits[:, 3] / logits[:, 3]


@pytest.mark.parametrize("options", [{}, {"block_size": 4}, {"compile_step": True}, {"temperature": 0.0}])
@pytest.mark.parametrize(
    "rank", [naive_entropy, nan_at_some, log_of_a_negative_number, ratio], ids=lambda f: f.__name__
)
@pytest.mark.repeated(every=5)
def test_a_rank_that_returns_nan_is_named(policy, monkeypatch, rank, options):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    with pytest.raises(ValueError, match=f"rank={rank.__name__} returned NaN, which has no place in an order; return"):
        sample(policy, IDS[:2], [5, 6], rank=rank, suppress=(3,), **options)


@pytest.mark.repeated
@pytest.mark.parametrize(
    "options", [slow({}), {"block_size": 4}, {"compile_step": True}, slow({"commit": rules.LateSchedule()})]
)
@pytest.mark.parametrize("rank", [lambda logits: logits[:, 3], lambda uniforms: (uniforms > 0.5).log()])
def test_a_position_whose_score_is_minus_infinity_is_still_written(policy, monkeypatch, rank, options):
    """-inf is also the score of positions that are not masked."""
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    rollout = sample(policy, IDS[:2], [5, 6], rank=rank, suppress=(3,), **{"diffusion_steps": 12} | options)
    assert rollout.completion_mask.sum(-1).tolist() == [20, 20] and rollout.forwards == 12


@pytest.mark.parametrize(
    "options",
    [
        {"rank": lambda logits: logits[:, 3]},
        {"rank": rules.PlackettLuce(temperature=1.0, base_rank=lambda hidden: hidden[:, 0])},
        {"rank": rules.MaxProb()},
        {"commit": lambda scores, masked, steps_left: masked},
    ],
)
def test_a_compiled_step_reads_no_signature(policy, monkeypatch, options):
    """torch.compile cannot trace `inspect.signature`."""

    def step(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(rules, "rank_inputs", None)
            patch.setattr(rules, "commit_inputs", None)
            return whole_step._step(*arguments)

    monkeypatch.setattr(whole_step, "compiled", lambda: step)
    assert sample(policy, IDS[:2], [5, 6], compile_step=True, **options).completion_mask.sum() == 40


def test_the_longest_prompt_and_its_completion_may_just_fill_the_model():
    policy = tiny_llama(characters="abcdef", causal=False, num_layers=1, max_length=10)
    prompts = Prompts.from_ids([[3], [4, 5, 6, 7]], pad_id=0)
    check_fits(policy, prompts, 6)
    with pytest.raises(ValueError, match="max_new_tokens=7 after a prompt of 4 tokens exceeds the model's 10"):
        check_fits(policy, prompts, 7)
    with pytest.raises(ValueError, match="exceeds the model's 10 positions; use shorter prompts"):
        check_fits(policy, Prompts.from_ids([[3] * 27], pad_id=0), 1)


def test_causal_policy_is_refused():
    with pytest.raises(ValueError, match="use Autoregress"):
        Unmask(max_new_tokens=2)(
            tiny_llama(characters="ab", causal=True), Prompts.from_ids([[3]], pad_id=0), torch.Generator()
        )


def test_a_cached_bucket_pays_for_every_step_of_a_block(monkeypatch):
    """Apart, the rows save 37 columns of padding once. A second bucket costs 30 per forward: one, or two with a cache
    that runs the padding in the first of two steps."""
    monkeypatch.setitem(FORWARD_COST, "cpu", 30)
    policy = TablePolicy(length=2, words=2, seed=0)
    canvas = make_canvas(policy, Prompts.from_ids([[3] * 3, [3] * 40], pad_id=4, seeds=[1, 2]), 2, 2)
    tracker = BlockTracker(canvas, 2, wait_for_all_rows=True)
    step_sampler = StepSampler(policy, canvas, SamplingParams(), rules.MaxProb(), rules.Schedule())
    assert len(RaggedSteps(step_sampler, None, tracker).buckets) == 2
    assert len(RaggedSteps(step_sampler, DualCache(), tracker).buckets) == 1
