"""What graders change of their arguments or of the process is theirs alone."""

import os
import threading

import pytest
import torch
from forked import Child

from dllm_rl.tasks import Problem, task_from_dataset
from dllm_rl.tasks.base import Reward, grade
from dllm_rl.tasks.user_code import TORCH_SETTINGS

ROWS = [
    {"prompt": [{"role": "user", "content": "2+2="}], "tests": [{"input": [3, 1, 2]}], "answer": "4"},
    {"prompt": [{"role": "user", "content": "2+3="}], "tests": [{"input": [9, 8]}], "answer": "5"},
]


def extend_chats(prompts, completions, **columns):
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt.append(completion[0])
    return [float(len(prompt)) for prompt in prompts]


def sort_in_place(tests, **columns):
    for test in tests:
        test[0]["input"].sort()
    return [float(test[0]["input"][0]) for test in tests]


def empty_all(prompts, completions, tests, answer, **columns):
    count = len(completions)
    for each in (*prompts, *completions, *tests, prompts, completions, tests, answer):
        each.clear()
    return [0.0] * count


def seen(prompts, completions, tests, answer, **columns):
    given = zip(prompts, completions, tests, answer, strict=True)
    return [float(given_row == expected) for given_row, expected in zip(given, EXPECTED, strict=True)]


COMPLETIONS = ["4", "x", "5"]
# Two completions of the first row, as in a group, and one of the second.
EXPECTED = [
    (row["prompt"], [{"role": "assistant", "content": text}], row["tests"], row["answer"])
    for row, text in zip((ROWS[0], ROWS[0], ROWS[1]), COMPLETIONS, strict=True)
]


@pytest.mark.parametrize("change", [extend_chats, sort_in_place, empty_all], ids=lambda f: f.__name__)
def test_what_a_reward_function_changes_reaches_no_row_and_no_other_function(change):
    before = repr(ROWS)
    task = task_from_dataset(ROWS, reward_funcs=[change, seen])
    problems = [task[0], task[0], task[1]]
    rewards = grade(task, problems, COMPLETIONS)
    assert [reward.breakdown["seen"] for reward in rewards] == [1.0, 1.0, 1.0]
    assert repr(ROWS) == before
    if change is extend_chats:  # each completion of a prompt has a chat of its own
        assert [reward.breakdown["extend_chats"] for reward in rewards] == [2.0, 2.0, 2.0]


class Grader:
    """A task of the user's that keeps its problems, and whose grader uses up what it is given."""

    name, version = "own", "1"
    problem = Problem("2+2=", {"answers": ["4", "four"]})

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.problem

    def reward(self, problem, completion):
        return Reward(float(completion in (problem.fields["answers"].pop(), problem.fields["answers"].pop())), True)


class BatchGrader(Grader):
    def rewards(self, problems, completions):
        rewards = [self.reward(*pair) for pair in zip(problems, completions, strict=True)]
        completions.sort()
        problems.clear()
        return rewards


@pytest.mark.parametrize("task", [Grader(), BatchGrader()], ids=["one by one", "together"])
def test_a_task_of_the_users_grades_copies(task):
    texts = ["four", "4", "5"]
    assert [reward.value for reward in grade(task, [task[0]] * 3, texts)] == [1.0, 1.0, 0.0]
    assert task.problem.fields == {"answers": ["4", "four"]} and texts == ["four", "4", "5"]


def test_what_python_cannot_copy_is_passed_as_it_is():
    lock = threading.Lock()
    task = task_from_dataset(
        [{"prompt": "2+2=", "pool": lock}], reward_funcs=lambda pool, **columns: [float(pool[0] is lock)]
    )
    assert grade(task, [task[0]], ["4"])[0].value == 1


CHANGED = {
    "set_grad_enabled": False,
    "set_default_dtype": torch.float64,
    "set_default_device": "meta",
    "set_num_threads": 3,
    "set_float32_matmul_precision": "medium",
    "set_deterministic_debug_mode": 1,
}


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_a_grader_leaves_the_process_as_it_was(tmp_path, raises):
    before = {name: getattr(torch, name)() for name in TORCH_SETTINGS}, os.getcwd()
    ran = []

    def inference_script(completions, **columns):
        os.chdir(tmp_path)
        for name, value in CHANGED.items():
            getattr(torch, name)(value)
        ran.append(True)
        if raises:
            raise KeyError("answer")
        return [0.0] * len(completions)

    task = task_from_dataset(ROWS, reward_funcs=inference_script)
    assert set(CHANGED) == set(TORCH_SETTINGS.values())
    if raises:
        with pytest.raises(RuntimeError, match="KeyError"):
            grade(task, [task[0]], ["4"])
    else:
        grade(task, [task[0]], ["4"])
    assert ran and ({name: getattr(torch, name)() for name in TORCH_SETTINGS}, os.getcwd()) == before
    assert torch.utils._device.CURRENT_DEVICE is None  # no default device, not the CPU as one


def test_a_folder_that_was_deleted_stops_no_grader(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    task = task_from_dataset(ROWS, reward_funcs=lambda completions, **columns: [1.0])
    assert grade(task, [task[0]], ["4"])[0].value == 1


def test_inference_mode_that_a_grader_turns_on_does_not_last():
    """Whether the grader lets go of the mode, or keeps it in force as long as the process lives."""
    kept = []

    def inference_script(completions, **columns):
        mode = torch.inference_mode()
        mode.__enter__()
        kept.append(mode)
        return [0.0] * len(completions)

    task = task_from_dataset(ROWS, reward_funcs=inference_script)
    for _ in range(2):
        grade(task, [task[0]], ["4"])
        weight = torch.ones(2, requires_grad=True)
        assert len(kept) and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        weight.sum().backward()
        assert weight.grad.tolist() == [1, 1] and not torch.ones(2).is_inference()


FORKS = """
import os, sys
from dllm_rl.tasks import task_from_dataset
from dllm_rl.tasks.base import Problem, Reward, grade

way, kind = sys.argv[1:]

def worker():
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if way == "exits":
        sys.exit(3)
    if way == "raises":
        raise KeyError("answer")
    return 0

def together(completions, **columns):
    return [float(worker()) for _ in completions]

async def awaited(completions, **columns):
    return together(completions)

class Task:
    name, version = "own", "1"
    def reward(self, problem, completion):
        return Reward(float(worker()), True)

if kind == "task":
    task, problem = Task(), Problem("2+2=")
else:
    task = task_from_dataset([{"prompt": "2+2="}], reward_funcs=awaited if kind == "awaited" else together)
    problem = task[0]
rewards = grade(task, [problem] * 2, ["4", "5"], timeout=60.0)
print([reward.value for reward in rewards], flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["together", "task", "awaited"])
@pytest.mark.parametrize(
    ("way", "status", "said"), [("exits", 3, ""), ("raises", 1, "KeyError"), ("returns", 1, "ends")]
)
def test_a_process_that_a_grader_forks_ends_in_the_grader(kind, way, status, said):
    """It would otherwise grade on, and be a second process of the run."""
    child = Child(FORKS, way, kind)
    out, error = child.communicate()
    assert (child.returncode, out) == (0, f"[{status}.0, {status}.0]\n")
    assert (error.count(said) >= 2) if said else not error


IN_A_RUN = """
import atexit, os, sys
from dllm_rl import Callback, grpo, tiny_masked_lm

class Worker(Callback):
    def on_step(self, run, metrics):
        if not os.fork():
            raise SystemExit("a worker of a callback")
        os.wait()

class Rows(list):  # read outside of graders
    forked = False
    def __getitem__(self, index):
        if not Rows.forked and isinstance(index, int):
            Rows.forked = True
            if not os.fork():
                raise KeyError("a worker of a data set")
            os.wait()
        return super().__getitem__(index)

def unlocked(path):
    return not path.exists()

rows = Rows({"prompt": f"{a}=", "answer": a} for a in "1234")
model = tiny_masked_lm(characters="1234=", hidden_size=16, num_layers=1)
sizes = {"max_new_tokens": 1, "train_batch_size": 2, "num_generations": 2, "eval_steps": 0, "num_steps": 2}
grpo(model, rows, lambda completions, **_: [float(len(text)) for text in completions], **sizes,
     eval_dataset=[{"prompt": "1=", "answer": "1"}], output_dir=sys.argv[1], save_steps=100, callbacks=[Worker()])
print("ENDED", Rows.forked)
"""


def test_what_user_code_forks_anywhere_in_a_run_is_none_of_the_run(tmp_path):
    child = Child(IN_A_RUN, tmp_path / "run")
    out, error = child.communicate()
    assert child.returncode == 0 and out.count("ENDED True") == 1, error
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-000000", "step-000002"]
    assert error.count("a worker of a callback") == 2 and "KeyError" in error and "failed after step" not in error
