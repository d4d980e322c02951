"""Rows as tokens, what is hidden of them, and their loss: by enumeration of masks, and by transformers' own."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from sft_toys import BLOCKS, CHAT, MODELS, ROWS, block_causal, tiny_sft
from tiny_recipe import SIZES

from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.decoding.tokens import text_ids
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.supervised.examples import example, read_examples, solution_examples
from dllm_rl.supervised.loss import NoisyExample, add_noise, lay_out, weighted_loss
from dllm_rl.tasks.base import Problem

PAD, MASK, EOS, ONE, TWO, THREE, FOUR, DOT, EQUALS = range(9)


def laid(policy, shown):
    return lay_out(shown, pad_id=policy.pad_id, device=policy.device)


def logp(policy, tokens, place):
    """log p of each token at a place, by the bare module."""
    logits = policy.module(torch.tensor([tokens]), position_ids=positions_of(policy, len(tokens))).logits[0, place]
    return logits.index_fill(0, torch.tensor([MASK]), -torch.inf).log_softmax(-1)


def positions_of(policy, length):
    first = policy.module.config.pad_token_id + 1 if "Roberta" in type(policy.module).__name__ else 0
    return torch.arange(length)[None] + first


def test_the_diffusion_loss_by_enumeration_of_masks():
    """Over t and masks, two tokens' loss is the mean of -log p of each, with the other hidden and with it seen, / 2."""
    policy = tiny_masked_lm(**SIZES)
    row = {"prompt": "3=", "completion": "12"}
    one = example(tiny_sft(completion_length=2), policy, row)
    assert one.tokens.tolist() == [THREE, EQUALS, ONE, TWO] and one.learned.tolist() == [False, False, True, True]
    found = 0.0
    for t in (0.25, 0.75):  # an integral of what is linear in t, from its two midpoints
        for pattern in product((True, False), repeat=2):
            uniforms = torch.tensor([[0.0 if hidden else 1.0 for hidden in pattern]])
            shown, total = add_noise(policy, [one], torch.tensor([t]), uniforms)
            share = t ** sum(pattern) * (1 - t) ** (2 - sum(pattern))
            found += share / 2 * weighted_loss(policy, laid(policy, shown)).item() / total
    both, first, second = [THREE, EQUALS, MASK, MASK], [THREE, EQUALS, MASK, TWO], [THREE, EQUALS, ONE, MASK]
    logps = logp(policy, both, 2)[ONE] + logp(policy, both, 3)[TWO]
    logps = logps + logp(policy, first, 2)[ONE] + logp(policy, second, 3)[TWO]
    assert found == pytest.approx(-logps.item() / 4, rel=1e-5)


def test_each_row_counts_alike_and_hides_what_lies_below_its_level():
    rows = [{"prompt": "3=", "completion": "12"}, {"prompt": "4=", "completion": "3"}]
    policy = tiny_masked_lm(**SIZES)
    examples = [example(tiny_sft(), policy, row) for row in rows]
    uniforms = torch.tensor([[0.1, 0.6, 0.4], [0.9, 0.2, 0.0]])
    shown, total = add_noise(policy, examples, torch.tensor([0.5, 0.25]), uniforms)
    assert total == 2
    assert shown[0].weight.tolist() == pytest.approx([0, 0, 1 / 1.5, 0, 1 / 1.5])
    assert shown[1].weight.tolist() == pytest.approx([0, 0, 0, 1 / 0.5])
    assert [((one.seen == MASK) == (one.weight > 0)).all() for one in shown] == [True, True]


@pytest.mark.parametrize("kind", [*MODELS, *BLOCKS])
def test_padding_on_the_left_and_rows_left_out_change_no_loss(kind):
    policy = {**MODELS, **BLOCKS}[kind]()
    examples = read_examples(tiny_sft(), policy, ROWS[:5])
    uniforms = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    uniforms[3] = 0.9  # of the fourth row nothing is hidden
    shown, _ = add_noise(policy, examples, torch.full((5,), 0.6), uniforms)
    layout = lay_out(shown, pad_id=policy.pad_id, device=policy.device, like_rollouts=True)
    assert len(layout.tokens) == (5 if kind == "causal" else 4) and not layout.attention_mask[:, 0].all()
    torch.testing.assert_close(
        weighted_loss(policy, layout), weighted_loss(policy, laid(policy, shown)), rtol=1e-5, atol=1e-6
    )


def test_the_causal_loss_is_that_of_transformers():
    policy = tiny_llama(causal=True, **SIZES)
    examples = read_examples(tiny_sft(), policy, ROWS[:5])
    shown, total = add_noise(policy, examples, torch.ones(5), torch.zeros(5, 9))
    layout = laid(policy, shown)
    labels = layout.tokens.masked_fill(layout.weight == 0, -100)
    mask = layout.attention_mask.long()
    expected = policy.module(input_ids=layout.tokens, attention_mask=mask, labels=labels).loss
    found = weighted_loss(policy, layout) / total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert labels[0].tolist() == [-100, -100, -100, ONE, EOS, -100]


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"text": "12"}, {}, "1+ 2+ e+"),
        ({"prompt": "1=", "completion": "2"}, {}, "1 = 2+ e+"),
        ({"prompt": "1=", "completion": "2", "text": None}, {"completion_only_loss": False}, "1+ =+ 2+ e+"),
        ({"prompt": "1=", "completion": "2"}, {"completion_length": 4}, "1 = 2+ e+ e+ e+"),
        (
            {"prompt": "123=", "completion": "2"},
            {"completion_length": 3, "completion_only_loss": False},
            "1+ 2+ 3+ =+ 2+ e+ e+",
        ),
        ({"messages": "u1 a2 u3 a4"}, {}, "1 e . = 2+ e+ . 3 e . = 4+ e+"),
        ({"messages": "u1 a2 u3"}, {}, "1 e . = 2+ e+"),
        ({"messages": "u1 a2"}, {"assistant_only_loss": False}, "1+ e+ .+ =+ 2+ e+"),
        ({"messages": "u1"}, {"assistant_only_loss": False}, "1+ e+ .+"),
        ({"messages": "u12 u3"}, {"assistant_only_loss": False}, "1+ 2+ e+ .+ 3+ e+ .+"),
        ({"messages": "u1"}, {"assistant_only_loss": False, "completion_length": 4}, "1+ e+ .+ e+"),
        ({"prompt": "u1 a2 u3", "completion": "a4"}, {}, "1 e . = 2 e . 3 e . = 4+ e+"),
    ],
)
def test_what_is_learned_of_each_kind_of_row(row, settings, expected):
    def turns(text):
        role = {"u": "user", "a": "assistant"}
        return [{"role": role[word[0]], "content": word[1:]} for word in text.split()]

    chat = "messages" in row or " " in row.get("prompt", "")
    row = {name: turns(value) if chat and value else value for name, value in row.items()}
    policy = tiny_masked_lm(**SIZES)
    policy.tokenizer.chat_template = CHAT
    one = example(tiny_sft(**settings), policy, row)
    names = {EOS: "e", ONE: "1", TWO: "2", THREE: "3", FOUR: "4", DOT: ".", EQUALS: "="}
    shown = [names[token] + "+" * mine for token, mine in zip(one.tokens.tolist(), one.learned.tolist(), strict=True)]
    assert " ".join(shown) == expected


def test_a_causal_model_does_not_learn_its_first_token():
    policy = tiny_llama(causal=True, **SIZES)
    one = example(tiny_sft(completion_length=8), policy, {"text": "12"})
    assert one.tokens.tolist() == [ONE, TWO, EOS] and one.learned.tolist() == [False, True, True]


def test_a_row_without_an_answer_is_refused_whatever_fills_its_completion():
    policy = tiny_masked_lm(**SIZES)
    policy.tokenizer.chat_template = CHAT
    for row in ({"messages": [{"role": "user", "content": "1"}]}, {"text": ""}):
        for length in (None, 4):
            with pytest.raises(ValueError, match="has nothing to learn"):
                example(tiny_sft(completion_length=length), policy, row)


def test_a_block_sees_the_blocks_before_it_without_masks():
    policy = block_causal()
    one = example(tiny_sft(completion_length=2), policy, {"text": "12"})
    tokens = torch.cat([one.tokens, torch.tensor([THREE, FOUR])])
    hidden = torch.tensor([True, False, True, True])
    shown = NoisyExample(tokens, tokens.masked_fill(hidden, MASK), hidden.float())
    logps = policy.logits(torch.tensor([[MASK, TWO]]), torch.ones(1, 2, dtype=torch.bool))[0, 0]
    later = policy.logits(torch.tensor([[ONE, TWO, MASK, MASK]]), torch.ones(1, 4, dtype=torch.bool))[0]
    gone = torch.tensor([MASK])
    expected = [logps.index_fill(0, gone, -torch.inf).log_softmax(-1)[ONE]]
    expected += [later[i].index_fill(0, gone, -torch.inf).log_softmax(-1)[t] for i, t in ((2, THREE), (3, FOUR))]
    torch.testing.assert_close(weighted_loss(policy, laid(policy, [shown])), -sum(expected), rtol=1e-5, atol=1e-6)


def test_longer_rows_are_left_out_and_counted():
    said = []
    policy = tiny_masked_lm(**SIZES)
    kept = read_examples(tiny_sft(max_length=5), policy, ROWS, say=said.append)
    assert len(kept) == 10 and said == ["dataset: 6 of 16 rows are longer than max_length=5 and left out"]
    rows, said = [{"prompt": "1", "completion": text} for text in ("2", "22", "2222")], []
    kept = read_examples(tiny_sft(max_length=9, completion_length=2), policy, rows, say=said.append)
    limits = "max_length=9, or their completion than completion_length=2,"
    assert len(kept) == 2 and said == [f"dataset: 1 of 3 rows are longer than {limits} and left out"]


@pytest.mark.parametrize(
    ("positions", "most"), [(8, 8), (64, 64), (1024, 1024), (1025, 1024), (4096, 1024), (None, 1024)]
)
def test_rows_are_by_default_as_long_as_the_model_at_most_1024(positions, most):
    policy = tiny_masked_lm(**SIZES)
    policy.spec = replace(policy.spec, max_length=positions)
    rows = [{"text": "1" * (most - 1)}, {"text": "1" * most}]  # each with its end token
    recipe = tiny_sft(max_length=None)
    assert [len(read.tokens) for read in read_examples(recipe, policy, rows)] == [most]
    if positions:
        above = recipe.replace(max_length=positions + 1)
        with pytest.raises(ValueError, match=f"max_length={positions + 1} is more than the model's {positions} pos"):
            read_examples(above, policy, rows)


def test_a_template_that_rewrites_what_came_before_is_refused():
    policy = tiny_masked_lm(**SIZES)
    policy.tokenizer.chat_template = "{{ messages | length }}" + CHAT
    turns = [{"role": role, "content": "1"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ValueError, match="does not write message 1 as the continuation"):
        example(tiny_sft(), policy, {"messages": turns})


TEMPLATE = (
    "{% for m in messages %}{{ 'U:' if m.role == 'user' else 'A:' }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.mark.parametrize("completion", ["3", [{"role": "assistant", "content": "3"}]])
def test_a_completion_continues_the_assistants_turn_that_a_prompt_begins(completion):
    """As RL samples it, and its warm-up learns it."""
    policy = tiny_masked_lm(characters="UA:123+=T")
    policy.tokenizer.chat_template = TEMPLATE
    prompt = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "T"}]
    one = example(tiny_sft(completion_length=2), policy, {"prompt": prompt, "completion": completion})
    (other,) = solution_examples(policy, [Problem(prompt, solution="3")], max_new_tokens=2)
    assert one.tokens.tolist() == other.tokens.tolist() == [*prompt_ids(policy, prompt), *text_ids(policy, "3"), EOS]
    assert one.learned.tolist() == [False] * (len(one.tokens) - 2) + [True, True]
    plain = example(tiny_sft(completion_length=2), policy, {"prompt": prompt[:1], "completion": completion})
    assert policy.tokenizer.decode(plain.tokens).replace(" ", "") == "U:1+2=<eos>A:3<eos>"


@pytest.mark.parametrize("role", ["user", "tool"])
def test_only_an_assistants_message_continues_a_turn(role):
    policy = tiny_masked_lm(characters="UA:123+=T")
    policy.tokenizer.chat_template = TEMPLATE
    begun = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "T"}]
    with pytest.raises(ValueError, match="has nothing to learn"):
        example(
            tiny_sft(completion_length=2), policy, {"prompt": begun, "completion": [{"role": role, "content": "3"}]}
        )
    whole = {"prompt": [], "completion": [begun[0], {"role": "assistant", "content": "3"}]}
    assert policy.tokenizer.decode(example(tiny_sft(), policy, whole).tokens).replace(" ", "") == "U:1+2=<eos>A:3<eos>"


LETTERS = "UATX:0123456789+=[]"


def chat_model(template=TEMPLATE):
    policy = tiny_masked_lm(characters=LETTERS)
    policy.tokenizer.chat_template = template
    return policy


def say(role, content, **marks):
    return {"role": role, "content": content, **marks}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([say("user", "1"), say("assistant", "2", weight=0), say("user", "3"), say("assistant", "4", weight=1)], "4"),
        ([say("user", "1"), say("assistant", "2"), say("user", "3"), say("assistant", "4", train=False)], "2"),
        ([say("user", "1", weight=0), say("assistant", "2", loss=False), say("assistant", "5", loss=None)], "5"),
        (
            [
                say("user", "1"),
                say("assistant", "2", training=0.0),
                say("user", "3"),
                say("assistant", "4", training=True),
            ],
            "4",
        ),
        (([say("user", "1")], [say("assistant", "2", weight=0), say("assistant", "4")]), "4"),
    ],
)
def test_a_message_of_weight_0_is_read_and_not_learned(row, expected):
    row = {"prompt": row[0], "completion": row[1]} if isinstance(row, tuple) else {"messages": row}
    policy = chat_model()
    one = example(tiny_sft(), policy, row)
    answer = [*text_ids(policy, expected), EOS]
    assert one.tokens[one.learned].tolist() == answer and one.tokens[-len(answer) :].tolist() == answer
    # The other messages are in the row, as if nothing were marked.
    messages = row.get("messages") or [*row["prompt"], *row["completion"]]
    unmarked = [say(each["role"], each["content"]) for each in messages]
    whole = example(tiny_sft(), policy, {"messages": unmarked})
    assert whole.tokens[: len(one.tokens)].tolist() == one.tokens.tolist()


PAIR = {"prompt": [say("user", "1")], "completion": "2"}
CONTINUED = {"prompt": [say("user", "1"), say("assistant", "X")], "completion": "2"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIR | {"completion": [say("assistant", "2", weight=0)]}, "has nothing to learn"),
        ({"prompt": "1=", "completion": [say("assistant", "2", train=False)]}, "has nothing to learn"),
        ({"prompt": "1=", "completion": [say("user", "3"), say("assistant", "2")]}, "must be text, or one assistant's"),
        ({"messages": [say("assistant", "2", weight=0.5)]}, r"^weight=0.5 of message 0, .* must be 0 or 1"),
        (
            {"messages": [say("user", "1", train=True), say("assistant", "2")]},
            "^train=True of message 0, of role",
        ),
        ({"messages": [say("assistant", "2", train_detail=[])]}, r"^train_detail=\[\] of message 0 is not supported"),
        ({"messages": [say("assistant", "2")], "completion": "2"}, "^has messages and a completion, and one of them"),
        (PAIR | {"label": False}, "^label=False is not supported: KTO's"),
        ({"prompt": "1", "completion": "2", "label": 0}, "^label=0 is not supported: KTO's"),
        ({"text": "12", "weight": 0}, "^weight=0 is not supported: rows count alike"),
        ({"text": "12", "train": False}, "^train=False is not supported"),
        ({"text": "12", "labels": [-100, 4]}, r"^labels=\[-100, 4\] is not supported"),
        (PAIR | {"system": "U"}, "^system='U' is not supported: put it into a message"),
        (PAIR | {"images": [0]}, r"^images=\[0\] is not supported: the model reads only text"),
        (PAIR | {"tools": [TOOL]}, "^tools=.* is not read by the model's chat template"),
        (PAIR | {"tools": "add"}, "^tools='add' must be a list of JSON schemas"),
        (
            PAIR | {"chat_template_kwargs": {"thinking": False}},
            "^thinking=False is not read by the model",
        ),
        (PAIR | {"chat_template_kwargs": {"tokenize": True}}, "^chat_template_kwargs: tokenize=True is set by the lib"),
        (PAIR | {"chat_template_kwargs": "thinking"}, "^chat_template_kwargs='thinking' must be a dict"),
        ({"text": "12", "tools": [TOOL]}, "^tools=.* needs chat messages"),
        ({"prompt": "1=", "completion": "2", "chat_template_kwargs": {"x": 1}}, "^x=1 needs chat messages"),
        (
            {"messages": [say("user", "1"), say("assistant", "", tool_calls=[TOOL])]},
            "^tool_calls=.* of message 1 is not read by the model's chat template; put it into the content",
        ),
        (PAIR | {"suffix": "3"}, "^suffix='3' is not supported"),
        (PAIR | {"completion": [say("assistant", "2", refusal="no")]}, "^refusal='no' of message 1"),
        (
            PAIR | {"prompt": [say("user", [{"type": "image", "image": "x"}, {"type": "text", "text": "1"}])]},
            "{'type': 'image', 'image': 'x'} of message 0 is not text",
        ),
        (
            {"messages": [say("user", "1"), say("assistant", [{"type": "refusal", "refusal": "2"}])]},
            "of message 1 is not",
        ),
        (PAIR | {"completion": [say("assistant", "2", reasoning_content="3")]}, "^reasoning_content='3' of message 1"),
        ({"text": float("nan")}, "^text=nan is not text"),
        ({"prompt": "1=", "completion": float("nan")}, "^completion=nan is neither text nor chat messages"),
        ({"prompt": 3, "completion": "2"}, "^prompt=3 is neither text nor chat messages"),
        ({"messages": "[]"}, "^messages='[^']*' is neither text nor chat messages"),
    ],
)
def test_what_a_row_says_and_nothing_reads_is_refused_by_name(row, message):
    with pytest.raises(ValueError, match=message):
        example(tiny_sft(), chat_model(), row)


def test_a_mark_contradicts_a_loss_on_everything():
    row = {"messages": [say("user", "1"), say("assistant", "2", weight=0)]}
    with pytest.raises(ValueError, match=r"^weight=0 of message 1, .* needs assistant_only_loss=True"):
        example(tiny_sft(assistant_only_loss=False), chat_model(), row)


def test_columns_that_change_nothing_are_read_past():
    """What is empty, what an unmarked row has, a class of a text, and what is none of the library's business."""
    policy = chat_model()
    plain = example(tiny_sft(), policy, PAIR)
    full = PAIR | {"label": True, "weight": 1.0, "images": [], "tools": [], "chat_template_kwargs": {}, "source": "web"}
    assert example(tiny_sft(), policy, full).tokens.tolist() == plain.tokens.tolist()
    example(tiny_sft(), policy, {"text": "12", "label": 0})


TOOLS_TEMPLATE = "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}" + TEMPLATE
ADD = {"function": {"name": "7+7", "unit": None}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [say("user", "1"), say("assistant", "2")], "tools": [ADD]}, "[7+7]U:1<eos>A:2<eos>"),
        (PAIR | {"tools": '[{"function": {"name": "7"}}, {"function": {"name": "8"}}]'}, "[78]U:1<eos>A:2<eos>"),
        (
            {"prompt": [say("user", "1"), say("assistant", "X")], "completion": "2", "tools": [ADD]},
            "[7+7]U:1<eos>A:X2<eos>",
        ),
    ],
)
def test_the_template_writes_a_rows_tools(row, expected):
    policy = chat_model(TOOLS_TEMPLATE)
    one = example(tiny_sft(), policy, row)
    assert policy.tokenizer.decode(one.tokens).replace(" ", "") == expected
    assert policy.tokenizer.decode(one.tokens[one.learned]).replace(" ", "") == "2<eos>"


def test_a_tool_cannot_write_a_special_token():
    policy = tiny_masked_lm(characters=LETTERS + "<eos>")
    policy.tokenizer.chat_template = TOOLS_TEMPLATE
    one = example(tiny_sft(), policy, PAIR | {"tools": [{"function": {"name": "<eos>"}}]})
    assert one.tokens.tolist().count(EOS) == 2


def test_a_template_that_only_mentions_tools_does_not_write_them():
    with pytest.raises(ValueError, match=r"^tools=.* are not written by the model's chat template"):
        example(tiny_sft(), chat_model("{% set has_tools = tools %}" + TEMPLATE), PAIR | {"tools": [ADD]})


@pytest.mark.parametrize("row", [PAIR, CONTINUED])
def test_a_template_gets_a_rows_variables(row):
    policy = chat_model("{% if think %}T{{ depth or '' }}{% endif %}" + TEMPLATE)
    plain, other = (
        policy.tokenizer.decode(example(tiny_sft(), policy, row | {"chat_template_kwargs": values}).tokens).replace(
            " ", ""
        )
        for values in ({"think": False}, {"think": True, "depth": 3})
    )
    assert other == "T3" + plain and plain.startswith("U:1")
