"""Text of users is text: what spells a special token does not become one, and templates keep their own."""

import json
from copy import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from refusals import refuses
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dllm_rl.decoding.chat import conversation_ids
from dllm_rl.decoding.prompts import encode, ids_and_blanks, prompt_ids
from dllm_rl.decoding.texts import completion_token_ids, decode, full_texts, text_of, texts_to_grade
from dllm_rl.decoding.tokens import as_rollout, default_max_new_tokens, text_ids
from dllm_rl.decoding.vocabulary import begin_ids, reads_otherwise, special_texts, text_tokens
from dllm_rl.integrations.serving.openai_api import read_request
from dllm_rl.integrations.serving.settings import ServerSettings
from dllm_rl.models.base import FamilySpec
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.supervised.examples import example, solution_examples
from dllm_rl.supervised.sft import SFT
from dllm_rl.tasks.base import Problem
from dllm_rl.types.rollouts import Rollout

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAD, MASK, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def policy():
    made = tiny_masked_lm(characters="<>abcdefghijklmnopqrstuvwxyz 0\ue000", num_layers=1)
    made.tokenizer.chat_template = TEMPLATE
    return made


def user(text):
    return {"role": "user", "content": text}


def test_special_tokens_are_spelled_out_in_plain_text(policy):
    spell = partial(text_ids, policy)
    ids = prompt_ids(policy, "a<eos><mask>")
    assert ids == [token for c in "a<eos><mask>" for token in spell(c)]
    assert not {PAD, MASK, EOS} & set(ids) and policy.tokenizer.decode(ids) == "a<eos><mask>"
    assert spell("a<eos>", special=True) == [*spell("a"), EOS]


def test_a_template_keeps_its_own_and_users_get_none(policy):
    ids = prompt_ids(policy, [user("hi <eos><user>me<mask> "), user("<eos>")])
    assert ids.count(EOS) == 2 and MASK not in ids
    assert policy.tokenizer.decode(ids) == "<user>hi <eos><user>me<mask><eos><user><eos><eos><assistant>"
    # The ends of turns, where the template puts them.
    assert [i for i, token in enumerate(ids) if token == EOS] == [28, 40]


def test_an_opening_gets_none_either(policy):
    ids = prompt_ids(policy, [user("hi"), {"role": "assistant", "content": "<eos>so"}])
    assert ids.count(EOS) == 1 and policy.tokenizer.decode(ids) == "<user>hi<eos><assistant><eos>so"


def test_marks_in_a_prompt_stand_for_nothing(policy):
    ids = prompt_ids(policy, [user("\ue0000\ue000<mask>")])
    assert policy.tokenizer.decode(ids) == "<user>\ue0000\ue000<mask><eos><assistant>" and MASK not in ids


def test_prompts_without_special_tokens_are_what_they_were(policy):
    asked = [user("hi"), {"role": "assistant", "content": "so "}]
    text = policy.tokenizer.apply_chat_template(asked[:1], add_generation_prompt=True, tokenize=False) + "so "
    assert prompt_ids(policy, asked) == policy.tokenizer.encode(text, add_special_tokens=False)


def test_longer_spellings_come_first(policy):
    assert special_texts(policy.tokenizer) == ["<mask>", "<eos>", "<pad>"]


def test_a_vocabulary_without_the_characters_refuses_them():
    with pytest.raises(ValueError, match=r"text '12<eos>' cannot be tokenized by this model"):
        prompt_ids(tiny_masked_lm(characters="12", num_layers=1), "12<eos>")


def test_blanks_are_open_positions(policy):
    """In text, and in chat messages and openings; elsewhere a mask token's text is text, and so is a blank's."""
    spell = partial(text_ids, policy)
    ids, blanks = ids_and_blanks(policy, "ab__c_", "_")
    assert ids == [*spell("ab"), MASK, MASK, *spell("c"), MASK]
    assert blanks == [False, False, True, True, False, True] and prompt_ids(policy, "a_", "_") == [*spell("a"), MASK]
    ids, blanks = ids_and_blanks(policy, "<mask>a", "<mask>")
    assert (ids, blanks) == ([MASK, *spell("a")], [True, False])
    chat = [user("hi <eos>_"), {"role": "assistant", "content": "so _ <mask>"}]
    ids, blanks = ids_and_blanks(policy, chat, "_")
    assert [i for i, blank in enumerate(blanks) if blank] == [i for i, token in enumerate(ids) if token == MASK]
    assert policy.tokenizer.decode(ids) == "<user>hi <eos><mask><eos><assistant>so <mask> <mask>" and sum(blanks) == 2
    asked = [Problem("a_", blank="_"), Problem("<mask>"), Problem("bc_d", blank="_")]
    prompts = encode(policy, asked, num_generations=2)
    assert prompts.infill_mask.sum(-1).tolist() == [1, 1, 0, 0, 1, 1]
    assert (prompts.tokens[prompts.infill_mask] == MASK).all()
    assert encode(policy, [Problem("ab")]).infill_mask is None
    refuses("blank='' is empty; leave it at None", lambda: encode(policy, [Problem("ab", blank="")]))


def test_a_text_of_all_of_the_models_positions_is_scored_and_a_longer_one_is_refused(policy):
    short = copy(policy)
    short.spec = replace(policy.spec, max_length=4)
    rollout = as_rollout(short, [([5, 6], [7, 8]), ([5], [7])])
    assert rollout.tokens.tolist() == [[5, 6, 7, 8], [PAD, PAD, 5, 7]]
    assert rollout.completion_mask.tolist() == [[False, False, True, True], [False, False, False, True]]
    with pytest.raises(ValueError, match="a context and continuation of 5 tokens exceed the model's 4 positions"):
        as_rollout(short, [([5, 6], [7, 8, 9])])


def test_the_text_of_what_is_filled_in(policy):
    """The completion is what fills the gaps; the whole text stops at an end token only behind the prompt's last."""
    ids = [[PAD, *text_ids(policy, "ab"), EOS, *text_ids(policy, "cde")], [*text_ids(policy, "fghijk"), EOS]]
    ids[1][4:6] = [EOS, MASK]
    own = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 0, 1]]).bool()
    tokens = torch.tensor(ids)
    rollout = Rollout(
        tokens, tokens != PAD, own, torch.where(own, 0, -1), torch.zeros(2, 7), group=torch.arange(len(tokens))
    )
    assert completion_token_ids(rollout)[0] == [ids[0][i] for i in (2, 3, 5, 6)]
    assert decode(policy, rollout) == ["b", "fh"]
    assert full_texts(policy, rollout) == ["abcde", "fghi"]
    ended = rollout.tokens.clone()
    ended[0, 5] = EOS
    assert full_texts(policy, replace(rollout, tokens=ended)) == ["abc", "fghi"]
    problems = [Problem("", blank="_"), Problem("")]
    assert texts_to_grade(policy, rollout, problems, completion_token_ids(rollout)) == ["abcde", "fh"]
    twice = rollout.rows(torch.tensor([0, 0, 1, 1]))
    each = [problem for problem in problems[::-1] for _ in range(2)]
    texts = texts_to_grade(policy, twice, each, completion_token_ids(twice))
    assert texts == ["b", "b", "fghi", "fghi"]


def test_an_end_token_that_ends_the_prompt_ends_no_completion(policy):
    """The second letter fills a gap, the end token closes the prompt, the last two letters come behind it."""
    tokens = torch.tensor([[*text_ids(policy, "ab"), EOS, *text_ids(policy, "cd")]])
    own = torch.tensor([[0, 1, 0, 1, 1]]).bool()
    rollout = Rollout(
        tokens, torch.ones_like(own), own, torch.where(own, 0, -1), torch.zeros(1, 5), group=torch.arange(len(tokens))
    )
    assert full_texts(policy, rollout) == ["abcd"]


class Problems(list):
    """A task of these problems, which nobody grades."""

    name, version = "problems", "1"

    def reward(self, problem, completion):
        raise NotImplementedError


def test_a_completion_is_usually_as_long_as_a_solution(policy):
    """One token a letter. A chat's answer may be of any length, and what has blanks needs no further token."""
    for problem, length in (
        (Problem("ab", solution="cdefg"), 5),
        (Problem("ab"), 256),
        (Problem([user("ab")], solution="cdefg"), 256),
        (Problem("a_", blank="_", solution="b"), 0),
    ):
        assert default_max_new_tokens(policy, Problems([problem])) == length
    longer = [Problem("ab", solution="c"), Problem("ab", solution="cdefghi"), Problem("ab")]
    assert default_max_new_tokens(policy, Problems(longer)) == 7


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
PARTS = [{"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6],
        (5, 6),
        b"a",
        5,
        0.5,
        None,
        [],
        ["a"],
        [None],
        [[user("a")]],
        user("a"),
        np.array(["a"]),
        {"messages": [user("a")]},
        [{"content": "a"}],
        [{"role": "user"}],
        [{"role": None, "content": "a"}],
        [{"role": "", "content": "a"}],
        [user(None)],
        [user(5)],
        [user(b"a")],
        [user([])],
        [user(["a"])],
        [user({"text": "a"})],
        [user("a"), CALL | {"tool_calls": None}, user("b")],
        [user("a"), CALL],
        [user("a"), {"role": "assistant", "content": PARTS}],
    ],
    ids=repr,
)
def test_a_prompt_that_is_no_text_and_no_chat_is_refused_in_a_line(policy, prompt):
    with pytest.raises(ValueError, match=r"^prompt=") as caught:
        prompt_ids(policy, prompt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "prompt", "field"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", [user(PARTS)], "message 0"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            [{"role": "usr", "content": "a"}],
            "usr",
        ),
        ("{% for m in messages[1:] %}{{ m.content }}{% endfor %}", [{"role": "system", "content": "a"}], "message 0"),
        ("{{ messages[-1].content }}", [user("a"), user("b")], "message 0"),
        ("{{ raise_exception('no') }}", [user("a")], "no"),
    ],
)
def test_a_template_that_drops_or_garbles_a_message_is_named(policy, monkeypatch, template, prompt, field):
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    refuses(f"chat_template .*{field}", lambda: prompt_ids(policy, prompt))


def test_what_a_message_says_beside_its_content_is_written_or_refused(policy, monkeypatch):
    """In prompts, too: the model would not see the call."""
    prompt = [user("a"), CALL | {"content": "b"}, user("c")]
    refuses(r"^tool_calls=.* of message 1 is not read by the model's chat template", lambda: prompt_ids(policy, prompt))
    template = "{% for m in messages %}{{ m.content }}{{ 'd' if m.tool_calls }}{% endfor %}"
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    assert policy.tokenizer.decode(prompt_ids(policy, prompt)) == "abdc"


def test_what_a_template_can_write_is_taken(policy, monkeypatch):
    written = "{% for m in messages %}{% for p in m.content %}{{ p.text or p }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(policy.tokenizer, "chat_template", written)
    prompt = ({"role": "user", "content": PARTS, "name": None}, CALL | {"tool_calls": [], "content": ""}, user(" b "))
    assert policy.tokenizer.decode(prompt_ids(policy, prompt)) == "a b "


@pytest.mark.parametrize("before", [[user("a")], [{"role": "system", "content": "b"}, user("a")], [user("a"), *[
    {"role": "assistant", "content": "b"}, user("c")]]])  # fmt: skip
def test_a_last_assistant_turn_stays_open_an_empty_one_too(policy, before):
    def read(answer):
        return policy.tokenizer.decode(prompt_ids(policy, [*before, {"role": "assistant", "content": answer}]))

    opened = policy.tokenizer.decode(prompt_ids(policy, before))
    assert opened.endswith("<assistant>") and [read(""), read(" "), read("b")] == [opened, opened + " ", opened + "b"]


SYSTEM = {"role": "system", "content": "be brief"}
WITHOUT_SYSTEM = TEMPLATE.replace("in messages", "in messages if m.role != 'system'")
WITHOUT_ASSISTANT = TEMPLATE.replace("in messages", "in messages if m.role != 'assistant'")
WITH_PARTS = TEMPLATE.replace("{{ m.content | trim }}", "{{ m.content[0].text }}")


@pytest.mark.parametrize(
    ("template", "prompt", "number"),
    [
        (WITHOUT_SYSTEM, [SYSTEM, user("be brief or be long")], 0),  # the user says the same
        (WITHOUT_SYSTEM, [SYSTEM | {"content": "user"}, user("hi")], 0),  # so does the template
        (WITHOUT_SYSTEM, [SYSTEM | {"content": "<eos>"}, user("hi <eos>")], 0),
        ("{{ messages[-1].content }}", [user("hi"), user("hi")], 0),
        (WITHOUT_ASSISTANT, [user("what"), {"role": "assistant", "content": "a"}, user("why")], 1),
        (WITH_PARTS, [{"role": "user", "content": [{"text": "a b"}, {"text": "a"}]}], 0),
        (TEMPLATE.replace("| trim", "| truncate(9, True, '')"), [user("a b c d e f"), user("c d e f")], 0),
    ],
)
def test_a_message_is_left_out_although_its_text_occurs(policy, monkeypatch, template, prompt, number):
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    with pytest.raises(
        ValueError, match=f"^chat_template leaves out message {number}, of role '{prompt[number]['role']}'"
    ):
        prompt_ids(policy, prompt)


@pytest.mark.parametrize(
    ("template", "prompt", "text"),
    [
        (TEMPLATE, [SYSTEM | {"content": " "}, user("a")], "<system><eos><user>a<eos><assistant>"),
        (TEMPLATE, [user("a"), user("a")], "<user>a<eos><user>a<eos><assistant>"),
        (WITH_PARTS, [user([{"text": "a<mask>"}])], "<user>a<mask><eos><assistant>"),
        (  # a template that writes of an assistant's turn what follows the reasoning
            TEMPLATE.replace("m.content", "m.content.split('</think>')[-1]"),
            [user("a"), {"role": "assistant", "content": "<think>b</think>c"}, user("d")],
            "<user>a<eos><assistant>c<eos><user>d<eos><assistant>",
        ),
    ],
)
def test_what_is_not_left_out_is_written_once(monkeypatch, template, prompt, text):
    policy = tiny_masked_lm(characters="<>abcdefghijklmnopqrstuvwxyz 0/", num_layers=1)
    policy.tokenizer.chat_template = template
    ids = prompt_ids(policy, prompt)
    assert policy.tokenizer.decode(ids) == text and MASK not in ids


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "<user>hi<assistant>"),
        ("{% for m in messages %}{{ m.role }} {{ m.content }}<eos>{% endfor %}", "user hi<eos>assistant "),
        ("{% for m in messages %}{% if m.role == 'assistant' %}a {% endif %}{{ m.content }}{% endfor %}", "hia "),
    ],
)
def test_a_template_that_begins_no_answer_is_refused(policy, monkeypatch, template, start):
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    for read in (prompt_ids, partial(conversation_ids, answers=[1])):
        with pytest.raises(
            ValueError, match=f"^chat_template has no generation prompt: .* and an answer begins after {start!r};"
        ):
            read(policy, [user("hi"), {"role": "assistant", "content": "so"}])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ '<' + m.content + '> ' if m.role == 'user' else m.content }}{% endfor %}",
        "{% for m in messages %}{{ '<' + m.content + '>' if m.role == 'user' else ' ' + m.content }}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
        "{{ messages[0].content }}<eos>",
    ],
)
def test_a_template_whose_answer_begins_at_the_prompts_end_needs_no_more(policy, monkeypatch, template):
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    text = policy.tokenizer.apply_chat_template([user("hi")], tokenize=False)
    assert policy.tokenizer.decode(prompt_ids(policy, [user("hi")])) == text


@pytest.mark.parametrize(("flag", "written"), [("false", "<think><think>"), ("true", ""), ("none", "")])
@pytest.mark.parametrize("test", ["thinks is defined and thinks is false", "thinks == false"])
def test_a_line_at_the_top_of_a_template_sets_what_trl_passes_as_a_keyword(policy, monkeypatch, flag, written, test):
    template = f"{TEMPLATE}{{% if add_generation_prompt and {test} %}}<think><think>{{% endif %}}"
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    assert policy.tokenizer.decode(prompt_ids(policy, [user("hi")])) == "<user>hi<eos><assistant>"
    monkeypatch.setattr(policy.tokenizer, "chat_template", f"{{% set thinks = {flag} %}}{template}")
    assert policy.tokenizer.decode(prompt_ids(policy, [user("hi")])) == f"<user>hi<eos><assistant>{written}"


CLOCKS = {
    "{{ strftime_now('%Y%m%d %H%M%S') }}": "20240726 000000",
    "{% set now = strftime_now( format='%d' ) if strftime_now is defined else 'none' %}{{ now }}": "26",
    "{% if not date is defined %}{% set date = strftime_now('%S') %}{% endif %}{{ date }}": "00",
    "{% set date = 'may' %}{% if not date is defined %}{% set date = strftime_now('%S') %}{% endif %}{{ date }}": "may",
}


@pytest.mark.parametrize("template", CLOCKS)
def test_a_template_that_reads_the_clock_gets_one_time(monkeypatch, template):
    """In prompts, conversations and rows with arguments: the same text on another day."""
    policy = tiny_masked_lm(characters="<>abcdefghijklmnopqrstuvwxyz 0123456789", num_layers=1)
    policy.tokenizer.chat_template = template + TEMPLATE
    turns = [user("hi"), {"role": "assistant", "content": "so"}]
    read = [policy.tokenizer.decode(ids) for ids in (prompt_ids(policy, turns[:1]), prompt_ids(policy, turns))]
    start = f"{CLOCKS[template]}<user>hi<eos><assistant>"
    assert read == [start, start + "so"]
    (before, _), (answer, _), _ = conversation_ids(policy, turns, [1])
    assert policy.tokenizer.decode([*before, *answer]) == f"{start}so<eos>"


def test_a_row_may_give_a_template_its_date(monkeypatch, policy):
    template = "{% if not date is defined %}{% set date = strftime_now('%d') %}{% endif %}{{ date }}"
    monkeypatch.setattr(policy.tokenizer, "chat_template", template + TEMPLATE)
    ids = prompt_ids(policy, [user("hi")], template_arguments={"date": "may"})
    assert policy.tokenizer.decode(ids) == "may<user>hi<eos><assistant>"


def test_of_several_templates_the_one_of_the_row_writes_its_time(monkeypatch, policy):
    both = {
        "default": "a{{ strftime_now('%H') }}" + TEMPLATE,
        "tool_use": "b{{ strftime_now('%S') }}{{ tools }}" + TEMPLATE,
    }
    monkeypatch.setattr(policy.tokenizer, "chat_template", both)
    assert policy.tokenizer.decode(prompt_ids(policy, [user("hi")])).startswith("a00<user>")


@pytest.mark.parametrize(
    ("written", "what"),
    [
        ("{{ ['a', 'b'] | random }}", r"draws at random \(\| random\)"),
        ("{{ lipsum(1) }}", r"draws at random \(lipsum\)"),
        ("{% set form = '%S' %}{{ strftime_now(form) }}", "reads the clock, .strftime_now"),
        ("{{ strftime_now('%S' + '%M') }}", "reads the clock, .strftime_now"),
    ],
)
def test_a_template_that_writes_something_else_at_each_call_is_refused(policy, monkeypatch, written, what):
    monkeypatch.setattr(policy.tokenizer, "chat_template", written + TEMPLATE)
    refuses(f"^chat_template {what}", lambda: prompt_ids(policy, [user("hi")]))


class Letters:
    """Policy-like: the vocabulary is all that `text_ids` reads of a model."""

    def __init__(self, tokenizer, mask_id=None) -> None:
        self.tokenizer, self.vocab_size = tokenizer, len(tokenizer)
        self.spec = FamilySpec("letters", "full", mask_id=mask_id, eos_ids=(EOS,))


@pytest.fixture
def esm(tmp_path):
    """ESM-2's vocabulary, in which every token is unsplittable."""
    words = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>"
    (tmp_path / "vocab.txt").write_text(words.replace(" ", "\n"))
    return Letters(transformers.EsmTokenizer(str(tmp_path / "vocab.txt")), mask_id=32)


def fast(model, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    special = {
        f"{name}_token": f"<{name}>" for name in ("unk", "mask") if tokenizer.token_to_id(f"<{name}>") is not None
    }
    return Letters(
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), tokenizer.token_to_id("<mask>")
    )


BPE = {"a": 0, "b": 1, "ab": 2, " ": 3}
WORDS = {"<unk>": 0, "<mask>": 1, "hello": 2, "world": 3}
NAMED = {
    "drops what it does not know": lambda: fast(models.BPE(vocab=BPE, merges=[("a", "b")])),
    "words": lambda: fast(models.WordLevel(WORDS, unk_token="<unk>"), pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "lower case": lambda: fast(
        models.WordPiece({"<unk>": 0, "cafe": 1, "##s": 2}, unk_token="<unk>"),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    ),
    "bytes": lambda: fast(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]),
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    ),
}


LATIN = {c: i for i, c in enumerate(["<unk>", "<mask>", *"0123456789=abcdefghilmnoprtuxABCDE.,° \u2044"])}
NAMED |= {
    normalizer: partial(
        fast,
        models.WordLevel(LATIN, unk_token="<unk>"),
        normalizer=getattr(normalizers, normalizer)(),
        pre_tokenizer=pre_tokenizers.Split("", behavior="isolated"),
        decoder=decoders.Fuse(),
    )
    for normalizer in ("NFKC", "NFKD", "Lowercase")
}


@pytest.mark.parametrize(
    ("name", "text", "lost"),
    [
        ("NFKC", "5²=", "²"),
        ("NFKD", "x⁵", "⁵"),
        ("NFKC", "a₁", "₁"),
        ("NFKD", "3½", "½"),
        ("NFKC", "5①", "①"),
        ("NFKC", "1⒈", "⒈"),
        ("NFKD", "\u2102", "\u2102"),
        ("NFKC", "\U0001d431=x", "\U0001d431"),
        ("NFKC", "\uff11\uff12\uff0c\uff21 ﬁ… 3℃\xa0", None),
        ("Lowercase", "ABc", None),
        ("drops what it does not know", "abz", "z"),
        ("drops what it does not know", "zab ", "z"),
        ("words", "hello there", "t"),
        ("words", "hello <unk> world", None),
        ("lower case", "cafés", "é"),
        ("lower case", "cafe 5", "5"),
        ("lower case", "Cafes CAFE ", None),
        ("drops what it does not know", "ab ab\n", None),
        ("bytes", "e\u0301 \u200d🙂 ﬁ", None),
        ("bytes", "", None),
    ],
)
def test_a_character_that_the_tokens_lose_is_named(name, text, lost):
    policy = NAMED[name]()
    if lost is None:
        assert text_ids(policy, text) == policy.tokenizer.encode(text, add_special_tokens=False)
        return
    for special in (False, True):
        with pytest.raises(ValueError, match=f"^text {text!r} cannot be tokenized by this model: '{lost}' is lost"):
            text_ids(policy, text, special=special)


def test_spaces_that_hold_two_numbers_apart_are_no_white_space_that_may_be_lost():
    dropping, splitting = NAMED["NFKC"](), NAMED["NFKC"]()
    dropping.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    splitting.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", behavior="isolated")]
    )
    for policy, text in ((dropping, "5 2="), (splitting, "5=a\n\nb"), (splitting, "5 A ")):
        with pytest.raises(ValueError, match=r"^text .* the tokenizer drops its spaces, and reads '5"):
            text_ids(policy, text)
        assert text_ids(policy, "5 = 2 ") == text_ids(policy, "5=2")


def test_a_vocabulary_of_unsplittable_tokens_is_read_token_by_token(esm):
    assert text_ids(esm, "ACDE") == text_ids(esm, "AC DE") == [5, 23, 13, 9] == text_ids(esm, "ACDE", special=True)
    assert text_ids(esm, "A-.C") == [5, 30, 29, 23] and text_ids(esm, "") == []
    ids, blanks = ids_and_blanks(esm, "AC_E", "_")
    assert (ids, blanks) == ([0, 5, 23, 32, 9], [False, False, False, True, False])  # after <cls>
    for text, lost in (("acde", "a"), ("AC1E", "1"), ("MJ", "j")):
        with pytest.raises(ValueError, match=f"^text '{text}' cannot be tokenized by this model: '{lost}' is lost"):
            text_ids(esm, text)


def test_the_text_of_the_mask_that_a_vocabulary_cannot_write_otherwise_is_refused(esm):
    for policy, text in ((esm, "AC<mask>E"), (NAMED["words"](), "hello <mask> world")):
        with pytest.raises(ValueError, match=f"^text '{text}': the tokenizer reads the mask token in it"):
            prompt_ids(policy, text)
        assert policy.spec.mask_id in prompt_ids(policy, text, blank="<mask>")


# What a tokenizer adds to a text, and the ids before the text. Ids: <pad> 0, <mask> 1, <eos> 2, <s> 3, <en> 4.
ADDED = {
    "BOS": ("<s> $A", [3]),
    "BOS and EOS": ("<s> $A <eos>", [3]),
    "a language before BOS": ("<en> <s> $A <eos> <eos>", [4, 3]),
    "the same before and after": ("<s> $A <s>", [3]),
    "only an end": ("$A <eos>", []),
    "nothing": (None, []),
}


def with_added(template):
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<mask>", "<eos>", "<s>", "<en>", *"ab=<>s "])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    raw.decoder = decoders.Fuse()
    if template is not None:
        raw.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(name, vocabulary[name]) for name in ("<eos>", "<s>", "<en>")]
        )
    names = {"pad_token": "<pad>", "mask_token": "<mask>", "eos_token": "<eos>", "bos_token": "<s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, extra_special_tokens=["<en>"], clean_up_tokenization_spaces=False, **names
    )
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}={% endfor %}"
    return Letters(tokenizer, mask_id=MASK)


@pytest.mark.parametrize("name", ADDED)
def test_a_text_begins_with_what_the_tokenizer_adds_before_it_and_a_chat_with_its_template(name):
    """In rollouts, in SFT and in the server; nothing that the tokenizer adds after a text is among the ids."""
    template, begin = ADDED[name]
    policy = with_added(template)
    own = policy.tokenizer("ab=")["input_ids"]
    ids = text_ids(policy, "ab=")
    assert prompt_ids(policy, "ab=") == begin + ids == own[: len(begin) + 3]
    assert prompt_ids(policy, "") == begin == begin_ids(policy)
    assert prompt_ids(policy, "<s>a") == begin + text_ids(policy, "<s>a")  # a user's text is text
    assert ids_and_blanks(policy, "_a", "_") == (
        [*begin, MASK, *text_ids(policy, "a")],
        [False] * len(begin) + [True, False],
    )
    assert prompt_ids(policy, [user("ab")]) == [3, *ids]
    sft = SFT(name="sft", model="none", dataset=[])
    pair, text = (example(sft, policy, row) for row in ({"prompt": "ab=", "completion": "b"}, {"text": "ab="}))
    end = policy.spec.eos_ids[0]
    assert pair.tokens.tolist() == [*prompt_ids(policy, "ab="), *text_ids(policy, "b"), end]
    assert text.tokens.tolist() == [*begin, *ids, end] and text.learned.tolist() == [False] * len(begin) + [True] * 4
    for prompt, expected in (("ab=", begin + ids), ([5, 6], [5, 6])):
        body = json.dumps({"prompt": prompt, "suffix": "a", "max_tokens": 1}).encode()
        request = read_request(body, policy, Unmask(max_new_tokens=1), ServerSettings("m"), is_chat=False)
        assert request.prompts == [expected] and request.suffix == text_ids(policy, "a")


def test_a_tokenizer_that_begins_a_text_with_an_id_that_the_model_cannot_read_is_refused():
    for template, change, message in (
        ("<s> $A", {"vocab_size": 3}, "the id 3, which for this model is outside the vocabulary of 3"),
        ("<en> $A", {"spec": replace(with_added(None).spec, mask_id=4)}, "the id 4, which for this model is its mask"),
    ):
        policy = with_added(template)
        vars(policy).update(change)
        with pytest.raises(ValueError, match=message):
            prompt_ids(policy, "")


LETTERS = "abcdefghijklmnopqrstuvw0123456789_=<>/\n"


def with_word_mark(kind, text_tokens=("<answer>", "</answer>")):
    """A tokenizer that begins a text with the mark of a word, which is a space in what it decodes."""
    special = ["<pad>", "<mask>", "<eos>", "<unk>", "<user>", *text_tokens]
    mark = "Ġ" if kind == "bytes" else "▁"
    symbols = [{" ": mark, "\n": "Ċ"}.get(c, c) for c in LETTERS] if kind == "bytes" else [*LETTERS]
    tokens = [*special, mark, *symbols, "ab", *(mark + letter for letter in "abcdefghij0123456789")]
    if kind == "unigram":
        model = models.Unigram([(token, -len(token) / 10 - 1) for token in tokens], unk_id=3)
    else:
        ids = {token: i for i, token in enumerate(tokens)}
        merges = [("a", "b"), *((mark, letter) for letter in "abcdefghij0123456789")]
        model = models.BPE(ids, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "legacy":  # as Llama's
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        scheme = {"first": "first", "always": "always", "unigram": "first"}[kind]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme=scheme)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "mask", "eos", "unk")},
        extra_special_tokens=special[4:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{% for m in messages %}<user>{{ m.content.split('</answer>')[-1] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<user>{% endif %}"
    )
    return Letters(fast, mask_id=MASK)


MARKED = ["first", "always", "legacy", "unigram", "bytes"]


@pytest.mark.parametrize("kind", MARKED)
@pytest.mark.parametrize("text", ["a_c_e", "_c", "a_", "a _ c_", "a_ c", "__b", "a=_=c\n_"])
def test_the_pieces_between_blanks_are_parts_of_one_text(kind, text):
    policy = with_word_mark(kind)
    ids = prompt_ids(policy, text, "_")
    nine = policy.tokenizer.convert_tokens_to_ids("9")
    filled = policy.tokenizer.decode([nine if token == MASK else token for token in ids])
    assert filled.removeprefix(" ") == text.replace("_", "9")
    without = prompt_ids(policy, text.replace("_", "9"))
    assert policy.tokenizer.decode(without) == filled or text.startswith("_")


@pytest.mark.parametrize("kind", MARKED)
@pytest.mark.parametrize("completion", ["2", " 2", "  return 2", "b 3\n=", "="])
def test_a_completion_continues_its_prompt(kind, completion):
    """In SFT, a warm-up and a suffix; and its text is what it adds to the prompt's."""
    completion = completion.replace("return", "de")
    policy = with_word_mark(kind)
    policy.pad_id = PAD
    asked = prompt_ids(policy, "1=")
    row = {"prompt": "1=", "completion": completion}
    pair = example(SFT(name="sft", model="none", dataset=[]), policy, row)
    assert policy.tokenizer.decode(pair.tokens[:-1]).removeprefix(" ") == "1=" + completion
    (solved,) = solution_examples(policy, [Problem("1=", solution=completion)], max_new_tokens=12)
    assert solved.tokens[: len(pair.tokens) - 1].tolist() == pair.tokens[:-1].tolist()
    rollout = as_rollout_of(policy, asked, pair.tokens[len(asked) :].tolist())
    assert decode(policy, rollout) == [completion]
    assert texts_to_grade(policy, rollout, [Problem("1=")], completion_token_ids(rollout)) == [completion]
    body = json.dumps({"prompt": "1=", "suffix": completion, "max_tokens": 1}).encode()
    request = read_request(body, policy, Unmask(max_new_tokens=1), ServerSettings("m"), is_chat=False)
    assert request.suffix == pair.tokens[len(asked) : -1].tolist()
    turns = [user("c"), {"role": "assistant", "content": completion}]
    started = [user("c"), {"role": "assistant", "content": "1="}]
    for row in ({"messages": turns}, {"prompt": turns[:1], "completion": completion}):
        read = example(SFT(name="sft", model="none", dataset=[]), policy, row)
        assert policy.tokenizer.decode(read.tokens).replace("> c", ">c") == f"<user>c<eos><user>{completion}<eos>"
    row = {"prompt": started, "completion": completion}
    read = example(SFT(name="sft", model="none", dataset=[]), policy, row)
    assert policy.tokenizer.decode(read.tokens[read.learned][:-1]).strip() == completion.strip()
    assert read.tokens[read.learned].tolist() == pair.tokens[pair.learned].tolist()


def as_rollout_of(policy, prompt, completion):
    own = torch.tensor([[False] * len(prompt) + [True] * len(completion)])
    tokens = torch.tensor([[*prompt, *completion]])
    shape = tokens.shape
    return Rollout(tokens, torch.ones(shape).bool(), own, torch.where(own, 0, -1), torch.zeros(shape), torch.arange(1))


@pytest.mark.parametrize("kind", MARKED)
def test_special_texts_in_a_message_add_no_spaces(kind):
    policy = with_word_mark(kind, ())
    if kind == "unigram":  # its vocabulary has the names of special tokens, which it would read
        with pytest.raises(ValueError, match=r"^text '<eos>': the tokenizer reads the special token <eos> in it"):
            prompt_ids(policy, [user("a<eos>")])
        return
    for text in ("a<eos>c", "a <eos> c", "<eos>", "<mask>9", "0<eos><pad>"):
        for messages in ([user(text)], [user("a"), {"role": "assistant", "content": text}, user("b")]):
            ids = prompt_ids(policy, messages)
            written = policy.tokenizer.decode(ids, skip_special_tokens=False).replace("<user> ", "<user>")
            assert written == "".join(f"<user>{m['content']}<eos>" for m in messages) + "<user>"


def test_the_text_of_a_completion_has_the_special_tokens_that_a_model_answers_with(policy):
    """Not the tokenizer's own, nor those that begin and end a turn."""
    own = with_word_mark("first", ("<answer>", "</answer>", "<end>"))
    assert [*text_tokens(own).values()] == ["<answer>", "</answer>", "<end>"]
    own.tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}<end>{% endfor %}"
    assert [*text_tokens(own).values()] == ["<answer>", "</answer>"]
    written = ["<pad>", "<answer>", "4", "2", "</answer>", "<end>", "<user>", "a"]
    ids = own.tokenizer.convert_tokens_to_ids(written)
    assert text_of(own, ids) == "<answer>42</answer>a"
    own.tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert not text_tokens(own) and text_of(own, ids) == "42a"
    assert not text_tokens(policy) and not text_tokens(with_added("<en> <s> $A <eos>"))


@pytest.mark.parametrize("written", ["a , b", "x ? 3", " 's .", "9 . 5 !"])
@pytest.mark.parametrize("model", ["unigram", "words"])
def test_the_spaces_that_a_model_wrote_are_in_its_text(model, written):
    """Also where the tokenizer's own `decode` leaves out those before punctuation."""
    tokens = ["<unk>", *"abxs0123456789,.?!' "]
    unigram = models.Unigram([(token, -1.0) for token in tokens], unk_id=0)
    words = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    parts = {"pre_tokenizer": pre_tokenizers.Split("", behavior="isolated"), "decoder": decoders.Fuse()}
    policy = fast(unigram if model == "unigram" else words, **parts)
    assert not reads_otherwise(policy)
    policy.tokenizer.clean_up_tokenization_spaces = True
    ids = text_ids(policy, written, continues=True)
    assert policy.tokenizer.decode(ids) != written == text_of(policy, ids)
    assert reads_otherwise(policy)


@pytest.mark.parametrize(
    ("written", "text"),
    [("##5", "5"), ("##a ##5 b", "a5 b"), ("5 ##a", "5a"), ("# # 5", "# # 5"), ("##5 = ##a", "5 =a"), ("", "")],
)
def test_a_completion_that_continues_a_word_is_read_without_its_prefix(written, text):
    """As WordPiece writes it behind a prompt; what a text begins with is shown as it is."""
    tokens = ["<unk>", "<mask>", "a", "b", "5", "=", "#", "##a", "##5"]
    policy = fast(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    policy.tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    ids = policy.tokenizer.convert_tokens_to_ids(written.split())
    assert text_of(policy, ids) == text and reads_otherwise(policy)
    assert text_of(policy, ids, continues=False) == policy.tokenizer.decode(ids)


@pytest.mark.parametrize("kind", MARKED)
def test_special_tokens_of_answers_are_read_as_they_are_written(kind):
    """In plain texts and the assistant's turns; a user's message has none."""
    policy = with_word_mark(kind)
    opening, closing = (policy.tokenizer.convert_tokens_to_ids(text) for text in ("<answer>", "</answer>"))
    texts = ["a=<answer>4</answer>", "<answer>4</answer>", "<eos>a<answer>4</answer>b<mask>"]
    for text in texts[: 2 if kind == "unigram" else 3]:
        ids = prompt_ids(policy, text)
        assert (ids.count(opening), ids.count(closing), EOS in ids, MASK in ids) == (1, 1, False, False)
        assert text_of(policy, ids, continues=False).removeprefix(" ") == text
    row = {"prompt": "1=", "completion": "<answer>4</answer>"}
    pair = example(SFT(name="sft", model="none", dataset=[]), policy, row)
    assert pair.tokens[-4:].tolist()[::2] == [opening, closing] and pair.tokens[-1] == EOS
    answer = {"role": "assistant", "content": "<answer>4"}
    ids = prompt_ids(policy, [user("a"), answer])
    assert ids.count(opening) == 1 and policy.tokenizer.decode(ids).endswith("<user><answer>4")
    assert (opening in prompt_ids(policy, [user("a<answer>b")])) == (kind == "unigram")  # which has no other way


def test_a_template_that_cuts_thoughts_between_special_tokens_sees_them():
    policy = with_word_mark("first")
    turns = [user("a"), {"role": "assistant", "content": "<answer>b</answer>c"}, user("d")]
    assert policy.tokenizer.decode(prompt_ids(policy, turns)) == "<user>a<eos><user>c<eos><user>d<eos><user>"
