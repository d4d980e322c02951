"""Rules and caches as a command line names them."""

import pytest

from dllm_rl.samplers import by_name, rules
from dllm_rl.samplers.cache import block_cache, dual_cache, prefix_cache


def test_rules_and_caches_by_name():
    rule = by_name.read_commit("factor=1.5")
    assert rule.func is rules.factor and rule.keywords == {"f": 1.5} and by_name.read_commit("origin") is rules.origin
    rank = by_name.read_rank("plackett_luce=0.3")
    assert rank.func is rules.plackett_luce and rank.keywords == {"temperature": 0.3}
    assert [by_name.read_cache(t) for t in ("block", "prefix", "dual=3")] == [
        block_cache(),
        prefix_cache(),
        dual_cache(refresh=3),
    ]


@pytest.mark.parametrize(
    "read, text, said",
    [
        (by_name.read_rank, "best", "rank='best' is not one of confidence, max_prob"),
        (by_name.read_rank, "plackett_luce", "plackett_luce takes a number"),
        (by_name.read_rank, "random=2", "rank='random=2': random takes no number"),
        (by_name.read_commit, "threshold", "threshold takes a number, as threshold=0.9"),
        (by_name.read_commit, "schedule=2", "schedule takes no number"),
        (by_name.read_commit, "factor=much", "'much' is not a number"),
        (by_name.read_cache, "all", "cache='all' is not one of block, prefix, dual"),
        (by_name.read_cache, "block=2", "cache='block=2': block takes no number"),
        (by_name.read_cache, "dual=2.5", "cache='dual=2.5': '2.5' is not a whole number"),
    ],
)
def test_what_cannot_be_read_is_named(read, text, said):
    with pytest.raises(ValueError, match=said):
        read(text)


def test_a_rule_has_the_rank_that_its_documentation_asks_for():
    """`remask` compares the scores with chances, so that they must be uniform numbers; `origin` picks at random;
    `entropy_bound` adds up entropies. The others take the default."""
    required = {"origin": "random", "remask=0.1": "random", "entropy_bound=1": "entropy"}
    for text in ("schedule", "late_schedule", "threshold=0.9", "factor=1.5", "edit=0.5", "soft_edit=0.1", *required):
        assert by_name.required_rank(text) == required.get(text)


@pytest.mark.parametrize("text", ["schedule", "threshold=0.75", "remask=0.1"])
def test_a_rule_is_written_as_it_is_read(text):
    assert by_name.text_of(by_name.read_commit(text)) == text
