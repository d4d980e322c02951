"""Data sets with TRL-style functions, and the smallest task."""

import asyncio
import datetime
import multiprocessing
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from functools import partial

import datasets
import numpy as np
import pandas
import pytest
import torch
from readme import example
from refusals import refused, refuses

from dllm_rl.tasks import Task, task_from_dataset
from dllm_rl.tasks.base import Cost, Reward, completion_metrics, grade, metric_fractions
from dllm_rl.tasks.datasets import digest_of, training_and_held_out

ROWS = [
    {"prompt": "2+2=", "answer": "4", "completion": "4"},
    {"prompt": "2+3=", "answer": "5", "completion": "5"},
]


TABLE = datasets.Dataset.from_list(ROWS).data.table


def right(prompts, completions, answer, **_) -> list[float]:
    return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]


def short(completions, **_) -> list[float | None]:
    return [None if "?" in text else -float(len(text)) for text in completions]


def scaled(completions, *, by: float, **_) -> list[float]:
    return [by] * len(completions)


def test_weighted_sum_of_functions() -> None:
    task = task_from_dataset(ROWS, reward_funcs=[right, short], weights=[2.0, 0.5], name="sums", version="7")
    assert isinstance(task, Task) and (task.name, task.version, len(task)) == ("sums", "7", 2)
    problem = task[1]
    assert (problem.prompt, problem.fields, problem.solution) == ("2+3=", {"answer": "5"}, "5")
    graded = task.reward(problem, " 5")
    assert graded.value == 2.0 * 1.0 + 0.5 * -2.0
    assert graded.breakdown == {"right": 1.0, "short": -2.0} and graded.parsed
    unasked = task.reward(problem, "5?")  # None: left out of the sum and of the breakdown
    assert (unasked.value, unasked.breakdown) == (0.0, {"right": 0.0})


def test_a_completion_to_which_no_function_applies_has_no_reward() -> None:
    def judge(completions, **_) -> list[float | None]:
        return [None if "?" in text else 1.0 for text in completions]

    for functions in ([judge], [judge, short], [short]):
        task = task_from_dataset(ROWS, reward_funcs=functions)
        answered, unasked = grade(task, [task[0]] * 2, ["4", "?"])
        assert (unasked.value, unasked.parsed, unasked.breakdown) == (None, False, {})
        assert answered.value is not None and metric_fractions(unasked) == {"reward": (0, 0), "parsed": (0, 0)}
        assert completion_metrics(unasked) == {}
    task = task_from_dataset(ROWS, reward_funcs=[judge, right])  # the other applies
    assert grade(task, [task[0]], ["4?"])[0] == Reward(0.0, True, {"right": 0.0})


def test_many_at_once_equal_one_by_one() -> None:
    task = task_from_dataset(ROWS, reward_funcs=[right, short])
    problems, texts = [task[0], task[1], task[1]], ["4", "5?", "no"]
    assert task.rewards(problems, texts) == [task.reward(p, t) for p, t in zip(problems, texts, strict=True)]


def test_each_completion_is_graded_on_its_problem() -> None:
    task = task_from_dataset(ROWS, reward_funcs=[right])
    graded = grade(task, [task[0], task[0], task[1], task[1]], ["4", "5", "5", "5"])
    assert [reward.value for reward in graded] == [1.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="2 problems for 4 completions: give the problem of each"):
        grade(task, [task[0], task[1]], ["4", "5", "5", "5"])


def test_a_grader_that_raises_is_reported_with_what_it_was_given() -> None:
    """Graded at once, and one by one where that raises."""
    calls = []

    def picky(completions, **_) -> list[float]:
        calls.append(list(completions))
        if "bad" in completions:
            raise KeyError("no")
        return [1.0] * len(completions)

    task = task_from_dataset(ROWS, reward_funcs=[picky])
    problems = [task[0], task[0], task[1], task[1]]
    assert [reward.value for reward in grade(task, problems, ["a", "b", "c", "d"])] == [1.0] * 4
    assert calls == [["a", "b", "c", "d"]]
    with pytest.raises(RuntimeError, match=r"'dataset' raised on problem .*'2\+3=', .* completion 'bad'") as caught:
        grade(task, problems, ["a", "b", "c", "bad"])
    assert isinstance(caught.value.__cause__, KeyError) and caught.value.__cause__.__context__ is None

    def lonely(completions, **_) -> list[float]:
        if len(completions) > 1:
            raise KeyError("one at a time")
        return [1.0]

    with pytest.raises(RuntimeError, match="raised on 2 completions in one call"):
        grade(task_from_dataset(ROWS, reward_funcs=[lonely]), [task[0]] * 2, ["a", "b"])


def test_functions_get_columns_and_chats_as_in_trl() -> None:
    seen = {}

    def look(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [1.0]

    chat = [{"role": "user", "content": "2+2="}]
    rows = [{"prompt": chat, "answer": "4", "completion": [{"role": "assistant", "content": "4"}]}]
    task = task_from_dataset(rows, reward_funcs=look)
    assert task[0].solution == "4"
    task.reward(task[0], "four")
    assert seen == {
        "prompts": [chat],
        "completions": [[{"role": "assistant", "content": "four"}]],
        "columns": {"answer": ["4"]},
    }


def test_functions_get_the_costs_that_they_name() -> None:
    def quick(completions, forwards, **columns) -> list[float]:
        assert set(columns) == {"prompts", "answer"}
        return [1 / each for each in forwards]

    async def long(completions, *, num_tokens, **columns) -> list[float]:
        return list(num_tokens)

    task = task_from_dataset(ROWS, reward_funcs=[right, quick, long], weights=[1.0, 0.5, 0.1])
    graded = grade(task, [task[0]] * 2, ["4", "44"], [Cost(2, 1), Cost(1, 2)])
    assert [reward.breakdown for reward in graded] == [
        {"right": 1.0, "quick": 0.5, "long": 1.0},
        {"right": 0.0, "quick": 1.0, "long": 2.0},
    ]
    assert task.reward(task[0], "4", forwards=4, num_tokens=3).value == 1 + 0.5 / 4 + 0.3
    said = r"quick requests forwards, which only a sampler provides; pass it: task.reward\(problem, text"
    for alone in (lambda: task.reward(task[0], "4"), lambda: task.rewards([task[0]], ["4"])):
        with pytest.raises(ValueError, match=said):
            alone()
    counted = [row | {"forwards": 3} for row in ROWS]
    with pytest.raises(
        ValueError, match="a column 'forwards', and quick requests what the run or TRL passes by that name"
    ):
        task_from_dataset(counted, reward_funcs=[right, quick])
    column = task_from_dataset(counted, reward_funcs=lambda completions, **columns: columns["forwards"])
    assert grade(column, [column[0]], ["4"], [Cost(2, 1)])[0].value == 3  # of who does not name it, a column as before


def test_the_soft_punishment_of_the_page_is_dapos() -> None:
    """Equation 13 of the paper: 0 up to L_max - L_cache, then ((L_max - L_cache) - |y|) / L_cache, at last -1."""
    made: dict = {}
    exec(example("Length, speed and cut answers"), made)
    longest, cache = made["LONGEST"], made["SOFT"]
    for count in (1, longest - cache, longest - cache + 1, longest - 1, longest):
        expected = 0.0 if count <= longest - cache else ((longest - cache) - count) / cache
        task = task_from_dataset(ROWS, reward_funcs=made["overlong"])
        assert grade(task, [task[0]], ["4"], [Cost(9, count)])[0].value == pytest.approx(expected)
    assert expected == -1


def test_a_datasets_dataset() -> None:
    """And what the message about a table of pyarrow says to give."""
    for rows in (datasets.Dataset.from_list(ROWS), TABLE.to_pylist()):
        task = task_from_dataset(rows, reward_funcs=[right])
        assert [task.reward(problem, problem.solution).value for problem in task] == [1.0, 1.0]
    with pytest.raises(IndexError):
        task[2]


def test_a_task_says_which_rows_it_has() -> None:
    rows = [{"prompt": f"{i}=", "answer": {"of": [i]}} for i in range(250)]
    task = task_from_dataset(rows, reward_funcs=right)
    assert task.rows == task_from_dataset(datasets.Dataset.from_list(rows), reward_funcs=right).rows == digest_of(rows)
    assert replace(task, weights=(2.0,)).rows == task.rows != replace(task, dataset=rows[:-1]).rows
    assert len({digest_of(other) for other in (rows, rows[1:], rows[:-1], [{"prompt": "x"}, *rows[1:]])}) == 4


def test_every_row_and_every_number_of_an_array_counts() -> None:
    rows = [{"prompt": f"{i}=", "by": np.zeros(2000), "at": datetime.date(2020, 1, 1)} for i in range(40)]
    middle = np.zeros(2000)
    middle[1000] = 1.0
    changes: list[dict] = [
        *({"by": by} for by in (middle, np.zeros(2000, "f4"), np.zeros((40, 50)), torch.zeros(2000), [middle])),
        *({"at": at} for at in (datetime.date(2021, 1, 1), b"\0", b"\1", {1, 2}, {1, 3}, Decimal(1), {(0, 1): "a"})),
    ]
    for index in (0, 1, 20, 39):
        digests = {digest_of(rows)}
        for change in changes:
            edited = list(rows)
            edited[index] = rows[index] | change
            digests.add(digest_of(edited))
        assert len(digests) == 1 + len(changes), index


def test_names_of_functions() -> None:
    task = task_from_dataset(ROWS, reward_funcs=[partial(scaled, by=1.0), partial(scaled, by=2.0), right])
    assert task.reward(task[0], "4").breakdown == {"scaled_1": 1.0, "scaled_2": 2.0, "right": 1.0}


@pytest.mark.parametrize(
    ("count", "held"), [(2, 1), (9, 1), (10, 1), (19, 1), (20, 2), (2559, 255), (2560, 256), (9999, 256)]
)
def test_a_tenth_of_the_rows_is_held_out_one_at_least_and_256_at_most(count: int, held: int) -> None:
    training, last = training_and_held_out(range(count))
    assert training == list(range(count - held)) and last == list(range(count - held, count))


@pytest.mark.parametrize(("split", "held"), [(0.25, 5), (0.5, 10), (1, 1), (19, 19), (3.0, 3)])
def test_eval_split_is_a_share_or_a_number(split: float, held: int) -> None:
    training, last = training_and_held_out(range(20), eval_split=split)
    assert training == list(range(20 - held)) and last == list(range(20 - held, 20))
    assert training_and_held_out([1], [2], None) == ([1], [2])
    for wrong in (20, 2.5, 0.01, -1, 0.0):
        with pytest.raises(ValueError, match=f"eval_split={wrong}"):
            training_and_held_out(range(20), eval_split=wrong)
    refuses("eval_split", lambda: training_and_held_out([1], [2], split))


@pytest.mark.parametrize(
    "rows", [[7], (7,), range(7, 8), datasets.Dataset.from_list(ROWS[:1])], ids=lambda rows: type(rows).__name__
)
def test_a_single_row_is_also_the_one_to_evaluate(rows) -> None:
    assert [list(part) for part in training_and_held_out(rows)] == [list(rows)] * 2
    assert training_and_held_out(rows, [1], None) == (rows, [1])
    refuses(r"eval_split=0\.5 of 1 rows is not possible", lambda: training_and_held_out(rows, eval_split=0.5))
    for held_out in (None, [1]):
        with pytest.raises(ValueError, match="dataset is empty: give at least one row"):
            training_and_held_out([], held_out)


@pytest.mark.parametrize(("result", "said"), [([float("nan")], "nan"), ([float("inf")], "inf"), ([], "0 numbers")])
def test_what_a_function_returned_is_said(result, said) -> None:
    task = task_from_dataset(ROWS, reward_funcs=[lambda completions, **_: result])
    refuses(f"returned {said}", lambda: task.reward(task[0], "4"))


@pytest.mark.parametrize(
    "result",
    [
        None,
        ["1"],
        [[1]],
        [float("nan")],
        [10**400],
        [1j],
        "1",
        b"1",
        1.0,
        {0: 1.0},
        {1.0},
        {"x": 1.0}.values(),
        (number for number in [1.0]),
        np.ones((1, 1)),
        np.array(["1"]),
        torch.tensor(1.0),
        torch.tensor([float("inf")]),
        pandas.Series([None], dtype=float),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_reward_function_that_returns_no_list_of_numbers_is_named(result):
    def scorer(completions, **_):
        return result

    async def later(completions, **_):
        return result

    for function in (scorer, later):
        task = task_from_dataset([{"prompt": "2+2="}], reward_funcs=function)
        with pytest.raises(ValueError, match=f"reward function {function.__name__} returned"):
            task.reward(task[0], "x")


@pytest.mark.parametrize(
    "result",
    [
        (0, True),
        np.array([0.0, 1.0], dtype=np.float32),
        [np.float32(0), np.bool_(True)],
        torch.tensor([0.0, 1.0], dtype=torch.bfloat16),
        [torch.tensor(0), torch.tensor(1.0)],
        pandas.Series([0.0, 1.0], index=[7, 3]),
        deque([0.0, 1.0]),
    ],
    ids=repr,
)
def test_numbers_in_the_order_of_completions_are_taken(result):
    task = task_from_dataset(ROWS, reward_funcs=lambda completions, **_: result)
    assert [reward.value for reward in task.rewards([task[0], task[1]], ["a", "b"])] == [0.0, 1.0]


def test_the_last_line_says_why_rewards_cannot_be_taken():
    task = task_from_dataset(ROWS, reward_funcs=lambda completions, **_: [1.0] * min(len(completions), 3))
    with pytest.raises(RuntimeError, match=r"in one call: ValueError.* returned 3 numbers for 4 texts"):
        grade(task, [task[0]] * 4, ["a", "b", "c", "d"])


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", 1])
def test_a_column_does_not_take_the_place_of_what_is_passed(name):
    def asks(prompts, completions, completion_ids=None, prompt_ids=None, trainer_state=None, **columns):
        return [1.0] * len(completions)

    rows = [{"prompt": "1="}, {"prompt": "2=", name: "from the file"}]
    for dataset in [rows] if name == 1 else [rows, datasets.Dataset.from_list(rows[::-1])]:
        with pytest.raises(ValueError, match=f"dataset has a column {name!r}"):
            task_from_dataset(dataset, reward_funcs=asks)


def test_rows_whose_columns_differ_have_none_where_they_lack_one():
    rows = [{"prompt": "1=", "answer": "1"}, {"prompt": "2=", "tests": "x"}, {"prompt": "3="}]
    names = ("prompt", "answer", "tests")
    seen = []

    def graded(completions, answer=(), tests=()):  # without **columns: what it names
        seen.append((answer, tests))
        return [1.0] * len(completions)

    for dataset in (rows, tuple(rows), datasets.Dataset.from_list([dict.fromkeys(names) | row for row in rows])):
        task = task_from_dataset(dataset, reward_funcs=graded)
        for order in ((0, 1), (1, 0), (2,)):
            task.rewards([task[i] for i in order], ["1"] * len(order))
    assert seen == [(["1", None], [None, "x"]), ([None, "1"], ["x", None]), ([None], [None])] * 3


def keeping(make, use):
    """A task whose function keeps what `make` returns, as a module does with a lock or a client."""
    kept = []

    async def scorer(completions, **_):
        kept.extend([] if kept else [make()])
        return await asyncio.gather(*(use(kept[0], text) for text in completions))

    return task_from_dataset(ROWS, reward_funcs=scorer)


async def under(lock, text) -> float:
    async with lock:
        await asyncio.sleep(0.001)
        return float(text)


async def later(loop, text) -> float:
    return await asyncio.wait_for(loop.run_in_executor(None, float, text), 10)


async def by_task(queue, text) -> float:
    asyncio.get_running_loop().call_soon(queue.put_nowait, float(text))
    return await queue.get()


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (lambda: asyncio.Semaphore(2), under),
        (asyncio.Lock, under),
        (asyncio.get_running_loop, later),
        (asyncio.Queue, by_task),
    ],
)
def test_async_functions_keep_what_belongs_to_an_event_loop(make, use) -> None:
    task = keeping(make, use)
    texts = ["1", "2", "3", "4", "5", "6"]
    problems = [task[0]] * len(texts)
    for _ in range(2):
        assert [reward.value for reward in task.rewards(problems, texts)] == list(range(1, 7))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: task.rewards(problems, texts), range(4)))
    assert all([reward.value for reward in rewards] == list(range(1, 7)) for rewards in results)


@pytest.mark.parametrize("in_a_task", [False, True])
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ValueError("no"), asyncio.CancelledError()])
def test_an_async_function_that_raises_or_exits_ends_its_call_alone(error, in_a_task) -> None:
    ended = []

    async def fail():
        raise error

    async def failing(completions, **_):
        await asyncio.sleep(0.01)
        await (asyncio.create_task(fail()) if in_a_task else fail())

    async def waits(completions, **_):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("waits")

    task = task_from_dataset(ROWS, reward_funcs=[failing, waits])
    # The future of another thread has a CancelledError of its own.
    expected = Exception if isinstance(error, asyncio.CancelledError) else type(error)
    with pytest.raises((expected, asyncio.CancelledError)):
        task.reward(task[0], "4")
    assert ended == ["waits"]
    assert keeping(asyncio.Lock, under).reward(ROWS_TASK[0], "7").value == 7


ROWS_TASK = task_from_dataset(ROWS, reward_funcs=right)


def grade_in_child(pipe) -> None:
    pipe.send(keeping(asyncio.Lock, under).reward(ROWS_TASK[0], "7").value)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_process_has_an_event_loop_of_its_own() -> None:
    assert keeping(asyncio.Lock, under).reward(ROWS_TASK[0], "6").value == 6
    receiver, sender = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=grade_in_child, args=(sender,))
    child.start()
    assert receiver.poll(60) and receiver.recv() == 7
    child.join(60)
    assert child.exitcode == 0


def test_an_async_function_that_would_wait_for_itself_is_refused() -> None:
    async def judge(completions, **_):
        return [1.0 for _ in completions]

    inner = task_from_dataset(ROWS, reward_funcs=judge)

    async def outer(completions, **_):
        return [inner.reward(inner[0], text).value for text in completions]

    task = task_from_dataset(ROWS, reward_funcs=outer)
    refuses("called a task with async functions: await those instead", lambda: task.reward(task[0], "1"))


def test_a_column_that_does_not_apply_to_a_row_is_none():
    def optional(completions, answer="none", **columns):
        return [None if each is None else 1.0 for each in answer]

    def needed(completions, answer):
        return [0.0 if each is None else 1.0 for each in answer]

    for rows, reward in (
        ([{"prompt": "a", "answer": "1"}, {"prompt": "a"}], [optional, lambda completions, **_: [0.0]]),
        ([{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": None}], needed),
    ):
        task = task_from_dataset(rows, reward_funcs=reward)
        assert [task.reward(task[i], "x").value for i in (0, 1)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("lengths", "one", "all_together"),
    [
        (lambda n: n - 1, "returned 0 numbers for 1 texts", "returned 3 numbers for 4 texts"),
        (lambda n: n + 1, "returned 2 numbers for 1 texts", "returned 5 numbers for 4 texts"),
        (lambda n: n // 2, "returned 0 numbers for 1 texts", "returned 2 numbers for 4 texts"),
    ],
)
def test_a_list_of_another_length_is_counted_in_the_call_of_the_run(lengths, one, all_together):
    task = task_from_dataset([{"prompt": "a"}], reward_funcs=lambda completions: [0.0] * lengths(len(completions)))
    with pytest.raises(RuntimeError, match=f"{one}.*; on all 4 completions in one call: .*{all_together}"):
        grade(task, [task[0]] * 4, ["x"] * 4)


def test_an_error_that_is_the_same_for_one_completion_is_said_once():
    def fails(completions):
        raise KeyError("answer")

    task = task_from_dataset([{"prompt": "a"}], reward_funcs=fails)
    refuses(r"completion 'x': KeyError\('answer'\)$", lambda: grade(task, [task[0]] * 4, ["x"] * 4), RuntimeError)


def counts_ids(completion_ids, **columns) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def needs_answer(completions, answer):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def needs_both(completions, answer, *, hint, **columns):
    return needs_answer(completions, answer)


def made(rows, functions, weights=None) -> Task:
    return task_from_dataset(rows, reward_funcs=functions, weights=weights)


def a(**columns) -> dict:
    return {"prompt": "a", **columns}


LACKS = "^dataset: row {} has no '{}', which reward function needs_.* needs: add"
NO_ROWS = r"dataset.*give "
test_data_sets_and_functions_that_do_not_fit_are_refused = refused(
    ([{"question": "q"}], [right], None, "no column 'prompt'"),
    ([a(answer="1"), {"question": "2="}], short, None, "row 1 has no 'prompt'"),
    ([a(reference="1")], right, None, "function right needs 'answer', which is not one of prompts, completions"),
    ([a(answer="1"), a()], needs_answer, None, LACKS.format(1, "answer")),
    ([a(), a(answer="1"), a()], needs_answer, None, LACKS.format(0, "answer")),
    ([a(answer="1", hint=1), a(hint=2, answer="2"), a(answer="3")], needs_both, None, LACKS.format(2, "hint")),
    ([a(answer="1"), a(question="2")], [lambda completions: [0.0], needs_answer], None, LACKS.format(1, "answer")),
    (ROWS, counts_ids, None, r"needs 'completion_ids', .*for the length of a completion, take num_tokens"),
    (ROWS, [right, short], [1.0], "2 reward_funcs have 1 weights"),
    (ROWS, [], None, "empty"),
    *(
        (ROWS, wrong, None, "reward_funcs")
        for wrong in ("accuracy", [short, "accuracy"], 3, None, {"short": short}, [dict])
    ),
    (TABLE, right, None, r"^dataset is a table of pyarrow; give table\.to_pylist"),
    (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), short, None, NO_ROWS),
    (pandas.DataFrame(ROWS), short, None, NO_ROWS),
    ({"prompt": ["1=", "2="]}, short, None, NO_ROWS),
    *((rows, short, None, NO_ROWS) for rows in (["1=", "2="], [("1=", "1")], np.array(["1=", "2="]), [None])),
    *((rows, short, None, NO_ROWS) for rows in ("rows.jsonl", b"1=", {1: ROWS[0]})),
    by=made,
)
