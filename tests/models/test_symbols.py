"""Vocabularies of residues, bases and k-mers: text is read and written without spaces; outputs have a fixed length."""

import json

import pytest
import torch
import transformers
from refusals import refuses
from tokenizers import Tokenizer, models, pre_tokenizers

from dllm_rl import Prompts, Unmask, grpo, load_policy, tiny_masked_lm
from dllm_rl.decoding.prompts import encode, ids_and_blanks
from dllm_rl.decoding.texts import text_of, texts_to_grade
from dllm_rl.decoding.tokens import text_ids
from dllm_rl.decoding.vocabulary import begin_ids, symbol_pattern
from dllm_rl.integrations.serving.openai_api import token_texts
from dllm_rl.models.policy import make_policy
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.tasks.base import Problem

pytestmark = pytest.mark.usefixtures("no_rehearsal")

RESIDUES = [*"LAGVSERTIDPKQNFYMHWC", *"XBUZO"]
ESM = ["<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, ".", "-", "<null_1>", "<mask>"]
SIXMERS = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "ATCGAT", "CCCCCC", "ATATAT", *"ATCGN"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def esm(folder, words):
    (folder / "vocab.txt").write_text("\n".join(words))
    return transformers.EsmTokenizer(str(folder / "vocab.txt"))


def bert(folder, words):
    (folder / "vocab.txt").write_text("\n".join([*BERT, *words]))
    return transformers.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)


def words_of(folder, words):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*BERT, *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


VOCABULARIES = {
    "ESM-2": (lambda folder: esm(folder, ESM), ["ACDE", "A-.C", "M", "LAGVSERTIDPKQNFYMHWC" * 9, ""]),
    "6-mers": (lambda folder: esm(folder, SIXMERS), ["ATCGATCCCCCC", "ATCG", "ATCGATATATATG", "NN"]),
    "BERT of residues": (lambda folder: bert(folder, RESIDUES), ["ACDE", "MKV", "LAGVSERTIDPKQNFYMHWC" * 9]),
    "BERT of bases": (lambda folder: bert(folder, [*"ACGTN"]), ["ACGT", "NNA", "T"]),
    "word level": (lambda folder: words_of(folder, [*"CNO()=1"]), ["CC(=O)N", "C1CC1", "O"]),
}


def policy_of(tokenizer):
    """A small BERT with this vocabulary."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_policy(transformers.BertForMaskedLM(config), tokenizer)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_symbols_are_read_with_and_without_spaces_and_written_without(tmp_path, name, monkeypatch):
    make, texts = VOCABULARIES[name]
    policy = policy_of(make(tmp_path))
    for text in texts:
        ids = text_ids(policy, text)
        assert text_of(policy, ids) == text
        spaced = policy.tokenizer.decode(ids)  # as the tokenizer writes them
        assert text_ids(policy, spaced) == ids and spaced.count(" ") == max(0, len(ids) - 1)
    refuses("'j' is lost", lambda: text_ids(policy, f"{texts[0]}J"))
    computed = []
    monkeypatch.setattr(type(policy.tokenizer), "all_special_ids", property(lambda tokenizer: computed.append(1)))
    assert symbol_pattern(policy.tokenizer) is not None and not computed  # transformers computes it at each access


@pytest.mark.parametrize("name", VOCABULARIES)
def test_blanks_between_symbols_are_filled_in_and_graded_as_one_text(tmp_path, name):
    make, texts = VOCABULARIES[name]
    policy = policy_of(make(tmp_path))
    problem = Problem(f"{texts[0]}__{texts[1]}", blank="_")
    ids, blanks = ids_and_blanks(policy, problem.prompt, problem.blank)
    assert sum(blanks) == 2 and [i for i, blank in zip(ids, blanks, strict=True) if not blank] == begin_ids(policy) + [
        token for text in texts[:2] for token in text_ids(policy, text)
    ]
    special = tuple(policy.tokenizer.all_special_tokens)
    sampler = Unmask(max_new_tokens=0, temperature=1.0, suppress=special)
    rollout = sampler(policy, encode(policy, [problem], num_generations=4), torch.Generator().manual_seed(0))
    for text in texts_to_grade(policy, rollout, [problem] * 4, [[]] * 4):
        assert text.startswith(texts[0]) and text.endswith(texts[1]) and " " not in text
        assert text_ids(policy, text) and len(text) >= len(texts[0] + texts[1]) + 2


@pytest.mark.parametrize("text", ["hello world", "hello  world hello", "a b", "a"])
def test_the_spaces_between_words_stay(tmp_path, text):
    for make in (words_of, bert):
        policy = policy_of(make(tmp_path, ["hello", "world", "a", "b"]))
        assert text_of(policy, text_ids(policy, text)) == " ".join(text.split())
        with pytest.raises(ValueError, match="is lost"):
            text_ids(policy, "helloworld")


def test_characters_are_written_as_they_are():
    policy = tiny_masked_lm(characters="ab \n", num_layers=1)
    for text in ("a b", "ab", "\n a", "  "):
        assert text_of(policy, text_ids(policy, text)) == text


def test_the_parts_of_a_served_text_are_its_tokens(tmp_path):
    policy = policy_of(esm(tmp_path, ESM))
    assert token_texts(policy, text_ids(policy, "ACDE"), "ACDE") == ([*"ACDE"], [0, 1, 2, 3, 4])


def test_a_token_that_is_suppressed_by_its_text_is_never_sampled(tmp_path):
    policy = policy_of(esm(tmp_path, ESM))
    special = ("<cls>", "<pad>", "<eos>", "<unk>", "<null_1>", "-", 29)
    prompts = Prompts.from_ids([[]], pad_id=policy.pad_id, num_generations=64)
    sampler = Unmask(max_new_tokens=8, diffusion_steps=1, temperature=5.0)
    free = sampler(policy, prompts, torch.Generator().manual_seed(0))
    left = sampler.replace(suppress=special)(policy, prompts, torch.Generator().manual_seed(0))
    ids = {0, 1, 2, 3, 30, 31, 29}
    drawn = [{*rollout.tokens[rollout.completion_mask].tolist()} for rollout in (free, left)]
    assert drawn[0] > ids and not drawn[1] & ids
    assert left.sampling_params.suppress == (0, 1, 2, 3, 31, 30, 29, 32)
    assert all(len(text_of(policy, row)) == 8 for row in left.tokens[:, -8:].tolist())
    causal = tiny_llama(characters="ab", causal=True, num_layers=1)
    sampled = Autoregress(max_new_tokens=4, suppress=("<eos>", "<mask>", "a", 0))(
        causal, Prompts.from_ids([[3]], pad_id=0, num_generations=8), torch.Generator().manual_seed(0)
    )
    assert (sampled.tokens[:, 1:] == 4).all()


@pytest.mark.parametrize("token", ["<eso>", "AC", "eos", " ", "33"])
def test_a_text_that_is_no_token_is_refused(tmp_path, token):
    prompts = Prompts.from_ids([[]], pad_id=1, num_generations=1)
    with pytest.raises(ValueError, match=f"suppress='{token}' is not one of the 33 token ids or their texts"):
        Unmask(max_new_tokens=1, suppress=(0, token))(policy_of(esm(tmp_path, ESM)), prompts, torch.Generator())
    refuses(r"suppress\[0\]=True", lambda: Unmask(max_new_tokens=1, suppress=(True,)))


@pytest.mark.parametrize("name", ["ESM-2", "BERT of residues"])
@pytest.mark.repeated(first_only=True)
def test_grpo_designs_sequences_of_a_saved_model_of_residues(tmp_path, name):
    """One prompt: the reward sees residues alone, in full length; the checkpoint opens again."""
    policy = policy_of(VOCABULARIES[name][0](tmp_path))
    if name == "ESM-2":
        config = transformers.EsmConfig(
            **{
                "vocab_size": 33,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "pad_token_id": 1,
            },
            **{"intermediate_size": 32, "max_position_embeddings": 34, "mask_token_id": 32, "token_dropout": True},
            position_embedding_type="rotary",
        )
        policy = make_policy(transformers.EsmForMaskedLM(config), policy.tokenizer)
    policy.save_pretrained(tmp_path / "model")
    seen = []

    def score(completions, **columns):
        seen.extend(completions)
        return [text.count("A") / 8 for text in completions]

    special = policy.tokenizer.all_special_tokens
    options = {"num_steps": 1, "train_batch_size": 1, "num_generations": 4, "report_to": "none"}
    options["sampler_options"] = {"suppress": [*special, *(["<null_1>", ".", "-"] if name == "ESM-2" else [])]}
    rows = [{"prompt": "MK____CD", "blank": "_"}]
    summary = grpo(str(tmp_path / "model"), rows, score, output_dir=str(tmp_path / "run"), **options)
    assert seen and all(len(text) == 8 and text[:2] + text[-2:] == "MKCD" for text in seen)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["completions/mean_length"] == 4 and summary["eval_problems"] == 1
    assert load_policy(summary["checkpoint"]).spec.eos_ids == policy.spec.eos_ids


@pytest.mark.repeated
@pytest.mark.parametrize("special", [[], ["<eos>"]])
@pytest.mark.parametrize("mask_id", [2, 1])
def test_the_default_end_of_esm_is_no_end_where_it_is_the_mask(tmp_path, special, mask_id):
    """As in Nucleotide Transformer: its mask is EsmConfig's default of an end, and no file names an end."""
    words = ["<unk>", "<pad>", "<mask>", "<cls>", *special, "ATCGAT", *"ATCGN"]
    words[mask_id], words[2] = words[2], words[mask_id]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"), eos_token=special[0] if special else None)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ids = {"pad_token_id": words.index("<pad>"), "mask_token_id": mask_id}
    config = transformers.EsmConfig(vocab_size=len(words), max_position_embeddings=32, **sizes, **ids)
    transformers.EsmForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    policy = load_policy(tmp_path)
    end = (words.index(special[0]) if special else words.index("<cls>"),)
    assert policy.spec.mask_id == mask_id
    assert policy.spec.eos_ids == (end if mask_id == 2 else (2, *(end if special else ())))
    policy.save_pretrained(tmp_path / "saved")  # the file then has the default
    assert load_policy(tmp_path / "saved").spec.eos_ids == policy.spec.eos_ids


def test_an_end_that_a_config_gives_may_not_be_the_mask(tmp_path):
    policy_of(bert(tmp_path, RESIDUES)).save_pretrained(tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text()) | {"eos_token_id": 4, "mask_token_id": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    refuses(r"mask_id=4 .* is also one of eos_ids=\(4,\)", lambda: load_policy(tmp_path / "model"))
