"""Scanners of answers, on texts that two readings tell apart."""

import pytest

from dllm_rl.tasks.answers import first_closed_answer, last_answer, last_closed_answer


@pytest.mark.parametrize(
    ("find", "found"), [(first_closed_answer, "a<answer>b"), (last_closed_answer, "a<answer>b"), (last_answer, "b")]
)
def test_a_nested_answer(find, found):
    """A pair begins at its first tag; what has no end tag to find begins at the last."""
    assert find("<answer>a<answer>b</answer>") == found
