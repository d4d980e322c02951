"""Prompts of a published file's questions."""

import json

from dllm_rl.tasks import GSM8K

ROW = {"question": "What is 40 + 2?", "answer": "40 + 2 = 42\n#### 42"}


def test_gsm8k_prompts(tmp_path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROW))
    assert GSM8K(split="test", path=path, prompt_format="Q: {question} {x}", chat=False)[0].prompt == (
        "Q: What is 40 + 2? {x}"
    )
    opened = GSM8K(split="test", path=path, opening="<reasoning>\n")[0]
    assert opened.prompt[-1] == {"role": "assistant", "content": "<reasoning>\n"}
    assert opened.solution.startswith("40 + 2")  # the opening is the prompt's, not the completion's
