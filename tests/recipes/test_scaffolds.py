"""The task of scaffolds: scores and exact filling by hand.

What needs pytorch-holo is skipped without it."""

import random
import sys
from itertools import pairwise, product

import pytest
import torch

from dllm_rl.rng import generator_for
from recipes import scaffolds
from recipes.scaffolds import LENGTH, RESIDUES
from recipes.studies import scaffolds as study


@pytest.fixture
def function():
    pytest.importorskip("holo.test_functions.closed_form", reason="pip install pytorch-holo")
    return scaffolds.ehrlich(3)


def by_hand(function, text):
    """Stanton et al., section 4: the product over motifs of the largest share of elements that are in place."""
    numbers = [RESIDUES.index(residue) for residue in text]
    if any(function.transition_matrix[a, b] == 0 for a, b in pairwise(numbers)):
        return 0.0
    value = 1.0
    for motif, spacing in zip(function.motifs, function.spacings, strict=True):
        places = [0, *spacing.cumsum(0).tolist()]
        starts = range(LENGTH - places[-1])
        value *= max(sum(numbers[s + p] == m for p, m in zip(places, motif.tolist(), strict=True)) for s in starts) / 4
    return value


def test_without_the_package_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "holo.test_functions.closed_form", None)
    scaffolds.ehrlich.cache_clear()
    with pytest.raises(ValueError, match=r"need pytorch-holo \(.*\): pip install pytorch-holo==0.0.5"):
        scaffolds.Scaffolds(0, "train", 1)[0]


def test_scores_by_hand(function):
    texts = [scaffolds.text_of(row) for row in scaffolds.natural(3, 50, generator_for("test"))]
    texts.append(scaffolds.text_of(function.optimal_solution()))
    spoilt = random.Random(0)
    texts += [text[:9] + spoilt.choice(RESIDUES) + text[10:] for text in texts]
    values = scaffolds.score(3, [*texts, texts[0][:31], texts[0][:31] + "<", ""])
    assert values == [*(by_hand(function, text) for text in texts), 0, 0, 0]
    assert values[50] == 1 and len({*values}) > 4 and 0 in values[51:-3]


def test_scaffolds_are_pieces_of_natural_sequences(function):
    task = scaffolds.Scaffolds(3, "train", 40)
    texts = [task[i].prompt[0]["content"] for i in range(40)]
    assert texts == [task[i].prompt[0]["content"] for i in range(40)] and len({*texts}) == 40
    assert all(len(text) == LENGTH and text.count("_") == LENGTH - 8 for text in texts)
    other = scaffolds.Scaffolds(3, "test", 40)
    assert not {*texts} & {other[i].prompt[0]["content"] for i in range(40)}
    chain = study.chain_of(3, "natural")
    filled = study.fill(chain, texts, generator_for("fill"))
    assert all(a in ("_", b) for text, full in zip(texts, filled, strict=True) for a, b in zip(text, full, strict=True))
    rewards = task.rewards([task[i] for i in range(40)], filled)
    assert [each.value for each in rewards] == [by_hand(function, text) for text in filled]
    feasible = [all(chain[RESIDUES.index(a), RESIDUES.index(b)] > 0 for a, b in pairwise(text)) for text in filled]
    assert all(feasible)
    uniform = study.chain_of(3, "uniform")
    assert ((uniform > 0) == (chain > 0)).all() and torch.allclose(uniform.sum(1), torch.ones(20).double())


def test_blanks_are_drawn_from_the_chain_given_both_neighbors():
    """Two blanks between A and C: their 400 probabilities are P(A, x) P(x, y) P(y, C) over the sum."""
    generator = torch.Generator().manual_seed(0)
    chain = torch.randn(20, 20, generator=generator, dtype=torch.double).mul(2).softmax(1)
    text = "D" * 10 + "A__C" + "D" * 18
    count = 20_000
    drawn = study.fill(chain, [text] * count, generator)
    assert {(each[:11], each[13:]) for each in drawn} == {(text[:11], text[13:])}
    exact = {
        RESIDUES[x] + RESIDUES[y]: float(chain[0, x] * chain[x, y] * chain[y, 1])
        for x, y in product(range(20), repeat=2)
    }
    total = sum(exact.values())
    for pair, weight in exact.items():
        p = weight / total
        found = sum(each[11:13] == pair for each in drawn[:count]) / count if p > 0.01 else p
        assert abs(found - p) < 5 * (p * (1 - p) / count) ** 0.5, pair


def test_parents_without_a_feasible_way_are_filled_freely():
    chain = torch.eye(20, dtype=torch.double)  # a residue follows itself alone
    (text,) = study.fill(chain, ["AAAA" + "_" * 2 + "C" * 26], torch.Generator().manual_seed(0))
    assert text[:4] == "AAAA" and text[6:] == "C" * 26 and "_" not in text
