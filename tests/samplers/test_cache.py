"""Key-value caches and block-causal models: exact where they are exact, and only there."""

from copy import copy
from dataclasses import replace
from functools import partial
from itertools import pairwise as neighbors

import pytest
import torch
import transformers
from layouts import checkpoint
from refusals import refuses
from repetitions import few, pairwise, slow

from dllm_rl import load_policy
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.models.convert import diffusion_from_causal
from dllm_rl.models.kv_cache import KVCache
from dllm_rl.models.policy import make_policy
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers import rules
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.cache import BlockCache, CachedForward, DualCache, PrefixCache
from dllm_rl.samplers.canvas import make_canvas
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts

IDS = [[5, 6, 7, 8, 9], [10], [11, 12, 13, 14, 15, 16, 17, 18], [3, 4, 5, 6]]
COMMITS = {"schedule": rules.Schedule(), "threshold": rules.Threshold(tau=0.1)}


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    opened = {}

    def get(family: str, dtype: str | None = None):
        if (family, dtype) not in opened:
            policy = load_policy(checkpoint(tmp_path_factory.mktemp(family), family), dtype=dtype)
            if policy.spec.attention == "block_causal":
                policy.spec = replace(policy.spec, eos_ids=())  # a test that wants an early end says so
            opened[family, dtype] = policy
        return opened[family, dtype]

    return get


def run(policy, *, ids=IDS, group=2, length=11, **options):
    options = {"temperature": 1.0, "rank": rules.MaxProb()} | options
    prompts = Prompts.from_ids(ids, pad_id=0, num_generations=group, seeds=range(len(ids) * group))
    return Unmask(max_new_tokens=length, **options)(policy, prompts, torch.Generator())


def assert_same(a, b):
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.unmask_step, b.unmask_step)
    assert torch.equal(a.completion_mask, b.completion_mask) and torch.equal(a.attention_mask, b.attention_mask)
    torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


def counted(policy, monkeypatch, **options):
    """A rollout, and how many token positions went through the body."""
    total, forward = [], policy.module.base_model.forward

    def counting(*args, **kwargs):
        total.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(policy.module.base_model, "forward", counting)
    rollout = run(policy, **options)
    monkeypatch.undo()
    return rollout, sum(total)


@pytest.mark.parametrize(
    ("family", "commit"),
    pairwise(["sdar", "llada2", "nemotron"], COMMITS, kept=[("sdar", "threshold"), ("nemotron", "schedule")]),
)
def test_block_cache_is_exact(policies, family, commit, monkeypatch):
    policy, length = policies(family), {"sdar": 11, "llada2": 70, "nemotron": 19}[family]
    options = {"commit": COMMITS[commit], "length": length, "diffusion_steps": min(10, length // 2)}
    (plain, work), (cached, less) = (counted(policy, monkeypatch, cache=c, **options) for c in (None, BlockCache()))
    assert_same(plain, cached)
    assert cached.completion_mask[:, -length:].all() and less < work


@pytest.mark.parametrize("commit", COMMITS)
def test_block_cache_of_a_shifted_model_is_exact(policies, commit):
    """The state before a block predicts the block's first token, and that column is not stored before it has run."""
    policy = copy(policies("sdar"))
    policy.spec = replace(policy.spec, shift=1)
    options = {"commit": COMMITS[commit], "diffusion_steps": 5}
    assert_same(*(run(policy, cache=cache, **options) for cache in (None, BlockCache())))


@pytest.mark.parametrize("family", few(["sdar", "llada2", "nemotron"], ["llada2", "nemotron"]))
def test_completions_of_a_prompt_share_its_keys_and_values(policies, family, monkeypatch):
    """Against the same rows as prompts of their own: the same tokens and log-probs, and each prompt is run once for its
    group, where each row runs its own otherwise. What is run later are blocks, of every row."""
    policy, group = policies(family), 3
    size = policy.spec.block_size
    ids = [[(5 * n + k) % 25 + 3 for k in range(length)] for n, length in enumerate((2 * size, 2 * size + 3, size + 1))]
    options = {"temperature": 1.0, "rank": rules.MaxProb(), "max_new_tokens": 2 * size - 3, "diffusion_steps": 5}
    shapes, forward = [], policy.module.base_model.forward

    def counted(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(policy.module.base_model, "forward", counted)

    def sampled(prompts, group):
        shapes.clear()
        prompts = Prompts.from_ids(prompts, pad_id=0, num_generations=group, seeds=range(9))
        rollout = Unmask(cache=BlockCache(), **options)(policy, prompts, torch.Generator())
        return rollout, list(shapes)

    shared, together = sampled(ids, group)
    alone, apart = sampled([prompt for prompt in ids for _ in range(group)], 1)
    assert_same(shared, alone)
    assert not torch.equal(shared.tokens[0], shared.tokens[1])
    # 3 prompts in columns of 2 whole blocks, and the block that they begin to write.
    assert together[0] == (3, 3 * size) and apart[0] == (9, 3 * size)
    assert together[1:] == apart[1:] and all(columns <= 2 * size for _, columns in together[1:])


@pytest.mark.parametrize("cache", [None, BlockCache()])
def test_blocks_count_from_the_prompt(policies, cache):
    """Blocks of 4: after a prompt of 5 the completion's blocks hold 3, 4, 4 positions; after one of 8: 4, 4, 3."""
    rollout = run(policies("sdar"), group=1, diffusion_steps=11, cache=cache)
    for row, sizes in ((0, [3, 4, 4]), (2, [4, 4, 3])):
        steps, begin = rollout.unmask_step[row, -11:].tolist(), 0
        for size in sizes:
            block = steps[begin : begin + size]
            assert max(steps[:begin], default=-1) < min(block)
            begin += size


@pytest.mark.parametrize("family", ["sdar", "nemotron"])
def test_block_causal_replay_is_bitwise(policies, family):
    policy = policies(family)
    rollout, estimator = run(policy), Trajectory()
    noise = estimator.draw_views(rollout, torch.Generator())
    assert torch.equal(estimator.logprobs(policy, rollout, noise), rollout.logprobs)


def test_early_exit_of_block_causal_models_is_exact(policies):
    """Up to the block that holds an end token nothing differs from a run that goes on; behind it there is padding."""
    policy = policies("sdar")
    full = run(policy, diffusion_steps=11)
    start, length = full.tokens.shape[1] - 11, 11
    # A token that stands in some rows' first eight places and not in all of them.
    held = [set(row) for row in full.tokens[:, start : start + 4].tolist()]
    eos = next(t for t in sorted(set.union(*held)) if not all(t in row for row in full.tokens[:, start:].tolist()))
    never = next(t for t in range(policy.vocab_size) if not (full.tokens == t).any())
    for cache in (None, BlockCache()):
        policy.spec = replace(policy.spec, eos_ids=(never, eos))  # any of several end tokens ends a row
        short = run(policy, diffusion_steps=11, cache=cache)
        policy.spec = replace(policy.spec, eos_ids=())
        ended = 0
        for row in range(8):
            size = len(IDS[row // 2])
            tokens = full.tokens[row, start:].tolist()
            kept = length
            if eos in tokens:
                last = (size + tokens.index(eos)) // 4
                kept = min(length, (last + 1) * 4 - size)
            ended += kept < length
            assert short.tokens[row, start:].tolist() == tokens[:kept] + [policy.pad_id] * (length - kept)
            assert short.completion_mask[row, start:].tolist() == [True] * kept + [False] * (length - kept)
            assert short.attention_mask[row, start:].tolist() == [True] * kept + [False] * (length - kept)
            torch.testing.assert_close(
                short.logprobs[row, start : start + kept], full.logprobs[row, start : start + kept], rtol=0, atol=1e-5
            )
        assert 0 < ended < 8
        assert (short.logprobs[~short.completion_mask] == 0).all()
        if cache is None:
            estimator = Trajectory()
            noise = estimator.draw_views(short, torch.Generator())
            assert torch.equal(estimator.logprobs(policy, short, noise), short.logprobs)


@pytest.mark.parametrize(
    ("family", "kind", "commit"),
    pairwise(
        ["llada", "dream"],
        [PrefixCache, DualCache],
        COMMITS,
        kept=[("llada", PrefixCache, "threshold"), ("dream", DualCache, "schedule")],
    ),
)
def test_refreshing_every_step_is_exact(policies, family, kind, commit):
    policy, options = policies(family), {"block_size": 4, "diffusion_steps": 6, "commit": COMMITS[commit]}
    exact = run(policy, **options)
    assert_same(exact, run(policy, cache=kind(refresh=1), **options))


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("llada", PrefixCache()),
        slow("llada", DualCache(refresh=3)),
        slow("dream", DualCache()),
        ("sdar", BlockCache()),
    ],
)
def test_rows_that_have_finished_a_block_are_not_run_until_the_next(policies, family, cache, monkeypatch):
    """Each step runs the rows that write in it, after a first one that serves both completions of a prompt; what they
    write is what each writes alone, where no row ever waits for another."""
    policy, seen, encode = policies(family), [], policies(family).encode
    some = lambda scores, masked, left: masked & ((scores > 0.6) | (scores == scores.amax(-1, keepdim=True)))  # noqa: E731
    options = {"block_size": 4, "cache": cache, "rank": rules.RandomOrder(), "commit": some, "diffusion_steps": 11}
    spy = lambda tokens, *args, **kwargs: (seen.append(len(tokens)), encode(tokens, *args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(policy, "encode", spy)
    together = run(policy, **options)
    monkeypatch.undo()
    assert seen[0] == 4 and len(set(seen[1:])) > 2 and any(a < b for a, b in neighbors(seen[1:]))
    assert 8 + sum(seen[1:]) == sum(len(set(steps[steps >= 0].tolist())) for steps in together.unmask_step)
    for row in (0, 5):
        prompts = Prompts.from_ids([IDS[row // 2]], pad_id=0, seeds=[row])
        alone = Unmask(max_new_tokens=11, temperature=1.0, **options)(policy, prompts, torch.Generator())
        width = alone.tokens.shape[1]
        assert torch.equal(together.tokens[row, -width:], alone.tokens[0])
        torch.testing.assert_close(together.logprobs[row, -width:], alone.logprobs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    pairwise(
        [PrefixCache, DualCache],
        ["float32", "bfloat16"],
        kept=[(PrefixCache, "bfloat16"), (DualCache, "bfloat16")],
    ),
)
def test_keys_are_kept_in_the_dtype_of_the_values(policies, kind, dtype):
    """LLaDA rotates in fp32, so that in bf16 its keys come in fp32. Rounded as attention rounds them, every step
    refreshed, not a bit differs from a run without a cache."""
    policy, options = policies("llada", dtype), {"length": 8, "block_size": 4}
    plain, cached = (run(policy, diffusion_steps=4, cache=c, **options) for c in (None, kind(refresh=1)))
    assert torch.equal(plain.tokens, cached.tokens) and torch.equal(plain.logprobs, cached.logprobs)
    run(policy, diffusion_steps=4, cache=kind(), **options)


@pytest.mark.parametrize("family", ["llada", "llama"])
def test_under_autocast_a_cache_is_of_16_bits(policies, family, monkeypatch):
    policy, held, update = policies(family), set(), KVCache.update

    def spy(self, *args, **kwargs):
        out = update(self, *args, **kwargs)
        held.update(x.dtype for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values))
        return out

    monkeypatch.setattr(KVCache, "update", spy)
    with torch.autocast("cpu", torch.bfloat16):
        if family == "llada":
            run(policy, block_size=4, diffusion_steps=6, cache=PrefixCache())
        else:
            Autoregress(max_new_tokens=3)(policy, Prompts.from_ids(IDS, pad_id=0), torch.Generator())
    assert held == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "kind"),
    pairwise(
        ["llada", "dream"],
        [PrefixCache, DualCache],
        kept=[("llada", PrefixCache), ("dream", DualCache)],
    ),
)
def test_stale_keys_are_an_approximation_and_save_work(policies, family, kind, monkeypatch):
    """Up to the second step of the first block nothing has been cached that matters; from there log-probs drift."""
    policy, options = policies(family), {"block_size": 4, "length": 8, "diffusion_steps": 6}
    exact, work = counted(policy, monkeypatch, **options)
    cached, seldom = counted(policy, monkeypatch, cache=kind(), **options)
    first = exact.unmask_step == 0
    assert torch.equal(exact.tokens[first], cached.tokens[first])
    torch.testing.assert_close(exact.logprobs[first], cached.logprobs[first], rtol=0, atol=1e-5)
    estimator = Trajectory()
    noise = estimator.draw_views(cached, torch.Generator())
    drift = (estimator.logprobs(policy, cached, noise) - cached.logprobs).abs()
    assert drift.max() > 1e-4
    assert seldom < counted(policy, monkeypatch, cache=kind(refresh=2), **options)[1] < work


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tiny_masked_lm, DualCache),
        (partial(tiny_llama, causal=False), PrefixCache),
        slow(tiny_masked_lm, PrefixCache),
        slow(partial(tiny_llama, causal=False), DualCache),
    ],
)
def test_one_layer_is_exact_without_refresh(make, kind):
    """The keys of a first layer depend on nothing but their own token, so that keeping them is no approximation."""
    policy = make(characters="0123456789abcdefgh", num_layers=1, head_std=0.3)
    options = {"block_size": 4, "diffusion_steps": 6}
    assert_same(run(policy, **options), run(policy, cache=kind(), **options))


def test_errors(policies, tmp_path):
    refuses(r"use None or BlockCache\(\)", lambda: run(policies("sdar"), cache=PrefixCache()))
    refuses(r"use None or PrefixCache\(\)", lambda: run(policies("llada"), cache=BlockCache()))
    refuses("refresh=0", lambda: DualCache(refresh=0))
    refuses("block_size=8 is not the policy's", lambda: run(policies("sdar"), block_size=8))
    bert = load_policy(checkpoint(tmp_path, "modernbert"))
    refuses("keeps no keys and values", lambda: run(bert, cache=PrefixCache()))


@pytest.mark.parametrize(
    ("cache", "columns"),
    [
        (PrefixCache(), [12, 8, 8, 8, 12, 4, 4, 4]),
        (PrefixCache(refresh=2), [12, 8, 12, 8, 12, 4, 12, 4]),
        (PrefixCache(refresh=3), [12, 8, 8, 12, 12, 4, 4, 12]),
        (DualCache(), [12, 4, 4, 4, 12, 4, 4, 4]),
        (DualCache(refresh=2), [12, 4, 12, 4, 12, 4, 12, 4]),
    ],
)
def test_a_cache_is_recomputed_every_so_many_steps(policies, cache, columns, monkeypatch):
    """A prompt of 4 and blocks of 4, a step a token: which of the 12 columns are run in each step. In a refresh step
    the states are those of a forward of everything."""
    policy, seen = policies("llada"), []
    encode = policy.encode
    spy = lambda tokens, *args, **kwargs: (seen.append(tokens.shape[1]), encode(tokens, *args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(policy, "encode", spy)
    run(policy, ids=[[5, 6, 7, 8]], group=1, length=8, diffusion_steps=8, block_size=4, cache=cache)
    assert seen == columns


@pytest.mark.parametrize("kind", [PrefixCache, DualCache])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_states_from_a_cache_are_those_of_a_forward_of_everything_while_no_token_changes(policies, family, kind):
    """A shifted head reads the state of the column before the block, so that one is run again with it."""
    policy, tokens = policies(family), torch.randint(3, 38, (2, 12), generator=torch.Generator().manual_seed(0))
    mask, shift = torch.ones_like(tokens, dtype=torch.bool), policies(family).spec.shift
    cached, rows = CachedForward(policy, kind(), mask), torch.arange(2)
    states, first = cached.advance(tokens, rows, (4, 8), run=rows, copies=None)
    assert (len(states[0]), first) == (12, shift)
    again, begin = cached.advance(tokens, rows, (4, 8), run=rows, copies=None)
    assert begin == 4 and len(again[0]) == (4 + shift if kind is DualCache else 8 + shift)
    torch.testing.assert_close(again, states[:, 4 - shift : 4 - shift + again.shape[1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ends", [(30,), (31,), (30, 31)])
def test_any_of_several_end_tokens_ends_a_row(policies, ends):
    """Rows 0 and 1 have written 30 and 31, row 2 neither, row 3 has 31 behind a mask that was never filled."""
    policy = policies("sdar")
    prompts = Prompts.from_ids([[5, 6, 7, 8]], pad_id=0, num_generations=4, seeds=range(4))
    canvas = make_canvas(policy, prompts, 4, 4)
    rows, places = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    canvas.written.tokens[rows, canvas.columns[rows, places]] = torch.tensor([30, 31, 9])
    canvas.written.masked[rows, places] = False
    expected = [row for row, token in ((0, 30), (1, 31)) if token in ends]
    assert canvas.mark_finished(torch.arange(4), ends).tolist() == expected
    assert canvas.finished.nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("cache", [slow(PrefixCache(refresh=1)), slow(PrefixCache()), DualCache()])
def test_a_model_with_a_sliding_window_is_refused(cache, tmp_path):
    """Its layers drop the keys that the cache needs."""
    tokenizer = tiny_masked_lm(characters="1234.=").tokenizer
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}
    config = transformers.MistralConfig(**sizes, sliding_window=12, eos_token_id=2, bos_token_id=None)
    make_policy(transformers.MistralForCausalLM(config).eval(), tokenizer).save_pretrained(tmp_path)
    policy = diffusion_from_causal(tmp_path)
    prompts = Prompts.from_ids([[3, 4, 5, 6]], pad_id=0, num_generations=2, seeds=range(2))
    with pytest.raises(ValueError, match="MistralForCausalLM has layers with a sliding window; use cache=None"):
        Unmask(max_new_tokens=9, cache=cache)(policy, prompts, torch.Generator())
