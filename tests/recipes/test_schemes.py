"""The study of schemes, on a model that learned nothing: a scheme of weights alone has no other part."""

import pytest

from dllm_rl.files import read_json, write_json
from recipes.studies import schemes


def test_the_parts_of_a_scheme_of_weights_alone(tmp_path, monkeypatch):
    write_json(tmp_path / "summary.json", {"eval_after": {"solve_rate": 0.5}})
    monkeypatch.setattr(schemes, "list_checkpoints", lambda folder: [(7, folder)])
    monkeypatch.setattr(schemes, "load_policy", lambda path: schemes.recipe.model())
    monkeypatch.setattr(schemes, "SCHEMES", {"int4_weight_only": schemes.SCHEMES["int4_weight_only"]})
    monkeypatch.setattr(schemes, "STORED", tmp_path / "schemes.json")
    schemes.measure(tmp_path)
    stored = read_json(tmp_path / "schemes.json")
    (row,) = stored["rows"]
    assert (stored["RL steps"], stored["solved"], row["tokens"]) == (7, 0.5, 64 * 2 * 16)
    assert row["mean_abs"] == pytest.approx(row["weights"], rel=1e-3) and row["weights"] > 1e-4
    assert row["activations"] < 1e-6 and row["largest other cause"] < 1e-6
