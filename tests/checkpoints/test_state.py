"""A run's state: what is written is read again."""

import json

from dllm_rl.checkpoints.state import TrainingState

FULL = {
    "step": 3,
    "version": 6,
    "dtype": "bfloat16",
    "stages": {"rollout": 1.5, "update": 2.0},
    "seconds": 4.0,
    "eval_before": {"reward": 0.25},
    "warmup_steps": 5,
    "changes": [{"step": 2, "field": "seed", "before": 0, "after": 1}],
    "best_step": 2,
    "best_value": 0.5,
    "reference": "0" * 64,
    "teacher": "fe",
    "unlogged": {"loss": 0.5},
    "unlogged_seconds": {"update": 0.5},
    "logs": {"metrics": [120, "ab"]},
    "callbacks": [["Counting", {"steps": 3}]],
    "frozen": ["head.weight"],
    "begin_ids": [1],
    "contents": {"the code of task": "cpython-311 abc"},
    "base": "abc",
    "recipe": {"num_steps": 9, "lr_schedule_steps": None, "name": "x"},
}


def test_what_is_written_is_read_again(tmp_path):
    TrainingState(**FULL).write(tmp_path)
    assert json.loads((tmp_path / "state.json").read_text()) == FULL
    assert TrainingState.read(tmp_path) == TrainingState(**FULL)


def test_fields_of_a_later_version_are_left_out_and_a_run_may_have_no_reference(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({k: v for k, v in FULL.items() if k != "reference"} | {"more": 1}))
    assert TrainingState.read(tmp_path) == TrainingState(**FULL | {"reference": None})
