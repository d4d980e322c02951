"""Your rows and reward in an 8B recipe: three tasks are replaced, and every other setting stays.

python recipes/examples/own_rows.py --dry_run
"""

import re
from dataclasses import replace
from functools import partial

from dllm_rl import main
from dllm_rl.tasks import task_from_dataset
from recipes.llada_8b_countdown import recipe as base

rows = [  # shuffle rows that are sorted
    {"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "answer": str(a + b)} for a in range(50) for b in range(50)
]


def right(completions, answer, **columns):
    """The last number of each completion is the answer. A completion of a chat prompt is a chat of one message."""
    texts = [chat[0]["content"].replace(",", "") for chat in completions]
    last = [re.findall(r"-?\d+(?:\.\d+)?", text)[-1:] for text in texts]
    return [float(number == [label]) for number, label in zip(last, answer, strict=True)]


task = partial(task_from_dataset, reward_funcs=right)  # several functions: a list, and weights=[...]
recipe = replace(
    base,
    name="mine-8b",
    task=task(rows[:-300]),
    validation_task=task(rows[-300:-150], name="mine-validation"),  # every eval_steps
    eval_task=task(rows[-150:], name="mine-held-out"),  # before and after
)

if __name__ == "__main__":
    main(recipe)
