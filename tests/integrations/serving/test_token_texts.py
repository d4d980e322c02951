"""Which part of a completion's text each token is, for tokenizers whose tokens are no whole characters or words."""

import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dllm_rl.decoding.texts import text_of
from dllm_rl.integrations.serving.openai_api import CompletionFields, TextRequest, choice, response, token_texts
from dllm_rl.models.policy import make_policy
from dllm_rl.samplers import Unmask
from dllm_rl.types.rollouts import Rollout

SPECIAL = ["<pad>", "<mask>", "<eos>"]


def policy_of(raw, decoder, **settings):
    raw.decoder = decoder
    names = {"pad_token": "<pad>", "mask_token": "<mask>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names, **settings)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, pad_token_id=0, eos_token_id=2)
    return make_policy(transformers.LlamaForCausalLM(config), tokenizer)


@pytest.fixture(scope="module")
def bytelevel():
    """One token per byte, as in the tokenizers of GPT-2, Qwen and Llama 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return policy_of(raw, decoders.ByteLevel())


@pytest.fixture(scope="module")
def sentencepiece():
    """Words with the space before them, and single bytes for what is no word, as in the tokenizer of Llama 2."""
    words = ["\u2581a", "\u2581bc", "d", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([*SPECIAL, *words])}, merges=[]))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return policy_of(raw, decoders.Sequence(steps))


@pytest.fixture(scope="module")
def wordpiece():
    """Words, their endings, and a decoder that writes no space before punctuation, as in BERT's tokenizer."""
    words = ["un", "##able", "to", ",", "##s", "."]
    raw = Tokenizer(models.WordPiece({name: i for i, name in enumerate([*SPECIAL, *words])}, unk_token="<pad>"))
    return policy_of(raw, decoders.WordPiece())


def ids_of(policy, pieces):
    return policy.tokenizer.convert_tokens_to_ids(pieces)


def parts_of(policy, ids):
    return token_texts(policy, ids, policy.tokenizer.decode(ids, skip_special_tokens=True))


def byte_ids(policy, data):
    """The ids of single bytes, of both tokenizers with a token per byte."""
    names = {code: name for name, code in zip(*alphabet_by_byte(), strict=True)}
    vocabulary = policy.tokenizer.get_vocab()
    return [vocabulary.get(f"<0x{byte:02X}>", vocabulary.get(names[byte])) for byte in data]


def alphabet_by_byte():
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for 256, 257 ... in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + i) for i in range(len(others)))], [*plain, *others]


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
@pytest.mark.parametrize("text", ["\u00e95", "n\u00e9", "5\u65e5\u672c5", "\U0001f600!", "e\u0301\u00e9", "\u65e5"])
def test_a_character_of_several_tokens_is_the_part_of_the_last(request, kind, text):
    """The places are counted by hand: a byte begins where the character begins whose byte it is."""
    policy = request.getfixturevalue(kind)
    expected_parts, expected_offsets = [], []
    for place, character in enumerate(text):
        size = len(character.encode())
        expected_parts += [""] * (size - 1) + [character]
        expected_offsets += [place] * size
    parts, offsets = parts_of(policy, byte_ids(policy, text.encode()))
    assert (parts, offsets) == (expected_parts, [*expected_offsets, len(text)])


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"\xff5", ["\ufffd", "5"]),
        (b"\xe6\x975", ["\ufffd", "", "5"]),  # two bytes of three: one U+FFFD stands for both
        (b"5\xc3", ["5", "\ufffd"]),  # the completion ends in a character
        (b"\xff\xc3\xa95", ["\ufffd", "", "\u00e9", "5"]),
        (b"\xef\xbf\xbd5", ["\ufffd", "", "", "5"]),  # U+FFFD itself
    ],
)
def test_bytes_that_are_no_character_do_not_move_what_follows(bytelevel, data, parts):
    found, offsets = parts_of(bytelevel, byte_ids(bytelevel, data))
    assert found == parts and "".join(found) == data.decode(errors="replace")
    assert offsets[-2] == len("".join(parts)) - len(parts[-1])


@pytest.mark.parametrize(
    ("kind", "pieces", "parts"),
    [
        ("sentencepiece", ["\u2581a", "\u2581bc", "d", "\u2581a"], ["a", " bc", "d", " a"]),
        ("sentencepiece", ["d", "\u2581", "\u2581a"], ["d", " ", " a"]),
        ("sentencepiece", ["\u2581a", "<eos>", "\u2581bc", "<pad>", "<pad>"], ["a", "<eos>", " bc", "<pad>", "<pad>"]),
        ("sentencepiece", ["<pad>", "\u2581a", "<mask>"], ["<pad>", "a", "<mask>"]),
        ("wordpiece", ["un", "##able", "to", ",", "un", "##s", "."], ["un", "able", " to", ",", " un", "s", "."]),
    ],
)
def test_a_token_has_the_text_that_it_adds(request, kind, pieces, parts):
    policy = request.getfixturevalue(kind)
    found, offsets = parts_of(policy, ids_of(policy, pieces))
    assert found == parts
    visible = ["" if part in SPECIAL else part for part in parts]
    assert offsets == [len("".join(visible[:place])) for place in range(len(parts) + 1)]


@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece", "wordpiece"])
def test_the_parts_of_random_tokens_join_to_the_text(request, kind):
    policy = request.getfixturevalue(kind)
    draw = random.Random(0)
    for _ in range(100):
        ids = draw.choices(range(policy.vocab_size), k=draw.randrange(1, 24))
        if kind != "wordpiece":
            ids += byte_ids(policy, "".join(draw.choices("a\u00e9\u65e5\U0001f600", k=6)).encode())
        text = text_of(policy, ids)
        parts, offsets = token_texts(policy, ids, text)
        assert offsets == sorted(offsets) and offsets[-1] == len(text)
        for part, start, end in zip(parts, offsets, offsets[1:], strict=False):
            assert part == text[start:end] or (part in SPECIAL and start == end)


def answer_of(policy, ids, **fields):
    tokens = torch.tensor([ids])
    steps = torch.arange(len(ids))[None] - 1
    rollout = Rollout(
        tokens, tokens >= 0, steps >= 0, steps, -torch.arange(len(ids))[None] / 10, group=torch.arange(len(tokens))
    )
    request = TextRequest(
        CompletionFields(prompt="q", logprobs=0, **fields), [[5]], [], len(ids), Unmask(max_new_tokens=len(ids))
    )
    return response(request, [choice(policy, rollout, request)])["choices"][0]


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("\u65e55;x", ";", 4),
        ("a\u65e5;", "\u65e5", 1),  # the stop text's first bytes are no token of the text
        ("\u00e9;\u00e9", "\u00e9", 0),
        ("a;\U0001f600b", "b", 6),
        ("a\u00e9;;", ["none", ";;"], 3),
    ],
)
def test_the_tokens_before_a_stop_text_are_those_of_the_text(bytelevel, text, stop, kept):
    answer = answer_of(bytelevel, [5, *byte_ids(bytelevel, text.encode())], stop=stop)
    found = answer["logprobs"]
    assert "".join(found["tokens"]) == answer["text"] == text.encode()[:kept].decode()
    assert found["token_logprobs"] == pytest.approx([-(place + 1) / 10 for place in range(kept)])


def test_offsets_count_from_the_completion(bytelevel):
    answer = answer_of(bytelevel, [5, *byte_ids(bytelevel, "\u00e95".encode()), 2])
    assert answer["text"] == "\u00e95"
    assert answer["logprobs"]["tokens"] == ["", "\u00e9", "5", "<eos>"]
    assert answer["logprobs"]["text_offset"] == [0, 0, 1, 2]
