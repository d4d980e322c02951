"""Means, intervals and paired differences by hand."""

from dllm_rl.evaluation.results import Evaluation, Graded, interval, paired_differences
from dllm_rl.tasks import Reward


def graded(*accuracies):
    """An evaluation of a problem for each accuracy; None: the problem lacks the metric."""
    rewards = [Reward(0.0, True, {} if value is None else {"accuracy": value}) for value in accuracies]
    return Evaluation(tuple(Graded(i, 0, reward) for i, reward in enumerate(rewards)), {})


def test_cells_are_no_trials_even_where_each_puzzle_is_all_or_nothing():
    """Four puzzles of eight cells, all right: whatever is drawn again has a mean of 1. Wilson's interval is wider."""
    assert interval("cell_accuracy", [8.0] * 4, [8.0] * 4) == (1.0, 1.0)


def test_a_difference_is_of_problems_that_both_have():
    """The first problem's difference is 1; the second has no accuracy before, the third none now."""
    found = paired_differences(graded(1.0, 0.0, None), graded(0.0, None, 1.0))
    assert found["accuracy"] == [1.0, 1.0, 1.0]
