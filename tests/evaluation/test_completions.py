"""Rows of stored completions."""

import pytest

from dllm_rl.evaluation.completions import make_row
from dllm_rl.tasks.base import Problem


def test_a_field_that_is_named_blank_is_refused_only_beside_a_blank():
    fields = {"blank": "mine"}
    with pytest.raises(ValueError, match="field 'blank' of the problem has a name that stored completions need"):
        make_row(Problem("a_", fields=fields, blank="_"), "b", {})
    assert make_row(Problem("a", fields=fields), "b", {})["blank"] == "mine"
