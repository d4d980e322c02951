"""The smoke preset of the learner's step: every part runs, and the published step's gradient is the library's."""

import json

from benchmarks import update


def test_smoke(tmp_path, monkeypatch):
    file = tmp_path / "update.json"
    monkeypatch.setattr("sys.argv", ["update", "--smoke", "--json", str(file)])
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    update.main()  # asserts that all arms' gradients have one norm
    found = json.loads(file.read_text())
    assert [len(found[part]) for part in ("published", "ragged", "main_job", "growth")] == [9, 4, 2, 6]
    assert all(row["ratio"] > 0 for part in ("published", "ragged", "main_job") for row in found[part])
