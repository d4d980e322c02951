"""The record of supervised fine-tuning: rows are stored as a digest."""

from dataclasses import replace

from sft_toys import ROWS, tiny_sft

from dllm_rl.tasks.datasets import digest_of


def test_settings_and_text_have_a_digest_in_place_of_rows():
    recipe = tiny_sft()
    settings = recipe.settings()
    assert settings["dataset"] == digest_of(ROWS) and settings["dataset"].startswith("16 rows, ")
    assert settings["eval_dataset"] is None and settings["num_steps"] == 4
    lines = repr(recipe).splitlines()
    assert f"    dataset={digest_of(ROWS)!r}," in lines and "    num_steps=4," in lines
    assert "    seed=0," not in lines, "a default"
    assert replace(recipe, dataset="rows.jsonl").settings()["dataset"] == "rows.jsonl"


def test_rows_that_differ_have_another_digest():
    other = [*ROWS[:-1], {"prompt": "44=", "completion": "1"}]
    assert len({digest_of(rows) for rows in (ROWS, other, ROWS[1:])}) == 3
    assert digest_of([dict(row) for row in ROWS]) == digest_of(ROWS)
