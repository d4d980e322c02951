"""The task of scaffolds and its study: scores and exact filling by hand, the area under the best ten, the claims' rows.

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


def test_the_area_under_the_best_ten_by_hand(monkeypatch):
    monkeypatch.setattr(study, "BUDGET", 4)
    monkeypatch.setattr(study, "TOP", 2)
    # Missing calls count 0 in the mean of the two best: 1/2, 1/2, (1 + 3) / 2, (2 + 3) / 2.
    assert study.area([1, 0, 3, 2, 9]) == (0.5 + 0.5 + 2 + 2.5) / 4
    assert study.area([1, 0]) == (0.5 + 0.5 + 0.5 + 0.5) / 4
    found = study.of_values([0, 1, 0.5])
    assert found == {"area": (0 + 0.5 + 0.75 + 0.75) / 4, "top": 0.75, "solved": 2, "calls": 3}


def test_claims_are_of_instances_and_numbers_that_both_arms_have():
    results = {("infilling", n): {"area": 0.5 + n / 1000} for n in (10, 12, 20)}
    results |= {("genetic", n): {"area": 0.5} for n in (10, 12, 20, 30)}
    rows = {row["stated before the runs"]: row for row in study.claim_rows(results)}
    row = rows["infilling GRPO's area is above that of the genetic algorithm"]
    assert row["runs"] == "3" and row["above 0"] == "3 of 3" and row["each instance"] == "0.011, 0.020"
    # Of two means 0.011 and 0.020: 0.0155, and 12.706, Student's t of one degree, times half of their distance.
    assert row["difference, 95 %"] == "0.016±0.057"
    assert rows["infilling GRPO's area is above that of feasible elite search"]["runs"] == "0"


@pytest.mark.slow
def test_searches_count_distinct_calls_and_find_more_than_nature(function, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "BUDGET", 600)
    nature = study.of_values(
        scaffolds.score(3, study.fill(study.chain_of(3, "natural"), ["_" * LENGTH] * 600, generator_for(0)))
    )
    for run, settings in ((study.run_elites, study.ELITE), (study.run_genetic, study.GENETIC)):
        found = run(tmp_path, 30, settings)
        assert found["calls"] == 600 and found["top"] > nature["top"] and found == run(tmp_path, 30, settings)
    monkeypatch.setattr(study, "HELD_OUT", 5)
    monkeypatch.setattr(study, "LONGEST", 60)
    curve = study.search_scaffolds(30, **study.ELITE_OF_SCAFFOLD)
    assert len(curve) == 60 and curve == sorted(curve) and curve[-1] > curve[0]
