"""lm-evaluation-harness asks, a policy of ours answers: hand-checked likelihoods, and a local task from end to end."""

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from tokenizers import processors

from dllm_rl.likelihoods.estimators import ELBO, Causal, Coupled, Trajectory
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an optional extra")
lm_tasks = pytest.importorskip("lm_eval.tasks")
harness = pytest.importorskip("dllm_rl.integrations.lm_eval")

SMALL = {
    "characters": "abcdef=? \n",
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
BIG_HEAD = {"head_std": 1.0}  # so that an untrained model prefers some tokens to others


def diffusion(**options):
    sampler = Unmask(max_new_tokens=4, temperature=0.0)
    return harness.HarnessModel(
        tiny_masked_lm(**SMALL, **BIG_HEAD), **{"sampler": sampler, "likelihood": ELBO(), **options}
    )


def autoregressive(**options):
    sampler = Autoregress(max_new_tokens=4, **{"temperature": 0.0} | options)
    return harness.HarnessModel(tiny_llama(causal=True, **SMALL, **BIG_HEAD), sampler=sampler, likelihood=Causal())


def asked(*arguments):
    return [SimpleNamespace(args=each, task_name="t", doc_id=i) for i, each in enumerate(arguments)]


def log_softmax(policy, text):
    """log p of each of the text's tokens, from the model's own logits."""
    ids = torch.tensor([policy.tokenizer.encode(text, add_special_tokens=False)])
    logits = policy.logits(ids, torch.ones_like(ids, dtype=torch.bool)).detach()
    return logits.log_softmax(-1)[0].gather(-1, ids[0][:, None])[:, 0]


def test_causal_likelihoods_are_sums_of_token_log_probs():
    model = autoregressive()
    requests = asked(("ab=", "cd"), ("a", "bcd"), ("abcdef", "?"))
    found = model.loglikelihood(requests, disable_tqdm=True)
    for (value, _), request in zip(found, requests, strict=True):
        context, continuation = request.args
        expected = log_softmax(model.policy, context + continuation)[len(context) :].sum()
        assert value == pytest.approx(expected.item(), abs=1e-5)


def test_a_greedy_continuation_is_known_as_one():
    for model in (autoregressive(), diffusion()):
        decoder = model.sampler.replace(max_new_tokens=3)
        prompts = Prompts.from_ids([model.tok_encode("ab=")], pad_id=model.policy.pad_id)
        ids = decoder(model.policy, prompts, torch.Generator()).tokens[0, 3:].tolist()
        other = [*ids[:2], (ids[2] - 3 + 1) % 10 + 3]
        pairs = [(None, model.tok_encode("ab="), each) for each in (ids, other, ids[:1])]
        greedy = [flag for _, flag in model._loglikelihood_tokens(pairs)]
        assert greedy[:2] == [True, False]


def test_a_diffusion_models_likelihood_of_one_token_is_exact_whatever_the_estimator():
    """With one token every mask is the same one: all estimates are log p(token | context, mask)."""
    for likelihood in (ELBO(num_samples=3), Coupled()):
        model = diffusion(likelihood=likelihood, greedy=False)
        (value, flag), *_ = model.loglikelihood(asked(("ab=", "c"), ("abcd=", "d")), disable_tqdm=True)
        assert not flag
        hidden = masked_log_softmax(model.policy, "ab=c", 3)
        assert value == pytest.approx(hidden, abs=1e-5)


def masked_log_softmax(policy, text, place):
    ids = torch.tensor([policy.tokenizer.encode(text, add_special_tokens=False)])
    shown = ids.index_fill(1, torch.tensor([place]), policy.spec.mask_id)
    logits = policy.logits(shown, torch.ones_like(ids, dtype=torch.bool)).detach()[0, place]
    return logits.log_softmax(-1)[ids[0, place]].item()


def test_rolling_likelihood_counts_every_token_once():
    model = autoregressive()
    (value,) = model.loglikelihood_rolling(asked(("abcdef",)), disable_tqdm=True)
    eos = model.policy.spec.eos_ids[0]
    ids = torch.tensor([[eos, *model.tok_encode("abcdef")]])
    logits = model.policy.logits(ids, torch.ones_like(ids, dtype=torch.bool)).detach().log_softmax(-1)
    assert value == pytest.approx(logits[0].gather(-1, ids[0][:, None])[1:].sum().item(), abs=1e-5)
    long = "abcdef" * 30  # 180 characters, in windows of at most 64 positions
    (whole,) = model.loglikelihood_rolling(asked((long,)), disable_tqdm=True)
    assert -180 * 6 < whole < 10 * value


def test_generation_stops_where_the_task_says():
    model = diffusion()
    (text,) = model.generate_until(asked(("ab=", {})), disable_tqdm=True)
    assert 0 < len(text) <= 4
    stop = text[-1]
    cut = model.generate_until(asked(("ab=", {"until": [stop, "zz"]}), ("ab=", {"until": stop})), disable_tqdm=True)
    assert cut == [text[: text.index(stop)]] * 2


def test_a_completion_depends_on_its_row_and_sample_and_not_on_the_batch():
    (end,) = tiny_masked_lm(**SMALL).spec.eos_ids
    sampling = {
        "sampler": Unmask(max_new_tokens=12, temperature=1.0, suppress=(0, end)),
        "seed": 3,
    }  # padding has no text
    requests = asked(*[("ab=", {})] * 5)
    requests += [*requests, SimpleNamespace(args=("ab=", {}), task_name="other", doc_id=0)]
    whole = diffusion(**sampling).generate_until(requests)
    assert whole == diffusion(**sampling, batch_size=2).generate_until(requests)
    assert len(set(whole[:10])) > 7, "five rows, two samples of each"
    assert whole[10] == whole[0], "another task's first sample"
    assert set(map(len, whole)) == {12}


def test_a_task_may_name_length_and_temperature():
    (end,) = tiny_masked_lm(**SMALL).spec.eos_ids
    greedy = diffusion(sampler=Unmask(max_new_tokens=4, suppress=(end,)))
    asks = [{"max_gen_toks": 9}, {"temperature": 0.0}, {"do_sample": False, "temperature": 0.7}]
    assert {len(text) for text in greedy.generate_until(asked(*(("ab=", each) for each in asks)))} == {4}
    for wrong in ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}):
        with pytest.raises(ValueError, match=r"the task samples at temperature=0.7, the model at 0; give the model"):
            greedy.generate_until(asked(("ab=", wrong)))
    drawn = autoregressive(temperature=1.0)
    with pytest.raises(ValueError, match=r"the task samples at temperature=0, the model at 1; give the model"):
        drawn.generate_until(asked(("ab=", {"do_sample": False})))


def free_length(**settings):
    """A model whose answers have the length that the task asks for, in tokens that are letters."""
    return diffusion(sampler=Unmask(max_new_tokens=61, suppress=(0, 2), **settings), is_task_length=True, seed=3)


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, 61),  # the sampler's
        ({"max_gen_toks": 9}, 9),
        ({"max_new_tokens": 8}, 8),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 6}, 6),
        ({"max_gen_toks": 5, "max_tokens": 5, "max_new_tokens": None}, 5),
    ],
)
def test_the_harnesss_names_of_a_length_are_all_read(settings, length):
    (text,) = free_length(temperature=0.0).generate_until(asked(("ab=", settings)))
    assert len(text) == length


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_k": 3, "top_p": 0.5},  # those of the model
        {"num_beams": 1, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "min_p": 0.0},
        {"top_p": None, "do_sample": True, "num_return_sequences": 1},
    ],
)
def test_a_tasks_settings_that_the_model_has_or_that_are_off_change_nothing(settings):
    model = free_length(temperature=1.0, top_k=3, top_p=0.5)
    plain = model.generate_until(asked(("ab=", {"max_gen_toks": 20})))
    assert model.generate_until(asked(("ab=", {"max_gen_toks": 20, **settings}))) == plain


def test_filters_of_a_task_change_nothing_at_temperature_0():
    model = free_length(temperature=0.0)
    settings = {"max_gen_toks": 20, "do_sample": False, "temperature": 0.7}
    plain = model.generate_until(asked(("ab=", settings)))
    assert model.generate_until(asked(("ab=", settings | {"top_k": 1, "top_p": 0.1}))) == plain


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_k": 1}, "the task samples at top_k=1, the model at 3; give the model top_k=1, or --gen_kwargs"),
        ({"top_k": 0}, "the task samples at top_k=0, the model at 3"),
        ({"top_p": 0.95}, "the task samples at top_p=0.95, the model at 1; give the model top_p=0.95"),
        (
            {"max_length": 512},
            "the task's max_length=512 is not a setting of the samplers; leave it out of generation_kwargs",
        ),
        ({"num_beams": 10}, "the task's num_beams=10 is not a setting of the samplers; give --gen_kwargs num_beams=1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not a setting"),
        ({"presence_penalty": -0.5}, "presence_penalty=-0.5 is not a setting"),
        ({"frequency_penalty": 1}, "frequency_penalty=1 is not a setting"),
        ({"min_p": 0.1}, "min_p=0.1 is not a setting"),
        ({"stop": ["b"]}, r"stop=\['b'\] is not a setting"),
        ({"max_gen_toks": 8, "max_tokens": 9}, "the task sets several lengths, {'max_gen_toks': 8, 'max_tokens': 9}"),
    ],
)
def test_a_tasks_settings_that_the_model_lacks_are_refused_before_anything_is_sampled(settings, said):
    model = free_length(temperature=1.0, top_k=3)
    model.sampler = Never(**{field.name: getattr(model.sampler, field.name) for field in fields(model.sampler)})
    with pytest.raises(ValueError, match=said) as error:
        model.generate_until(asked(("ab=", {"max_gen_toks": 4}), ("a=", settings)))
    assert "\n" not in str(error.value)


class Never(Unmask):
    def __call__(self, policy, prompts, generator, **keywords):
        pytest.fail("sampled")


def test_refusals():
    with pytest.raises(ValueError, match=r"likelihood=Trajectory\(\) replays a recorded unmasking"):
        diffusion(likelihood=Trajectory())
    with pytest.raises(ValueError, match="likelihood='Causal' is for causal attention"):
        diffusion(likelihood=Causal())
    with pytest.raises(ValueError, match="of 71 tokens exceed the model's 64 positions"):
        diffusion(greedy=False).loglikelihood(asked(("a" * 70, "b")), disable_tqdm=True)


@pytest.fixture
def tasks(tmp_path):
    """Two local tasks of the harness's own making: pick the likelier letter, and generate."""
    rows = [
        {"question": f"{a}{b}=", "choices": ["c", "d", "e"], "answer": i % 3}
        for i, (a, b) in enumerate(["ab", "ba", "ff", "ce"])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\n"
    (tmp_path / "letters.yaml").write_text(
        "task: letters\n" + data + "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "writing.yaml").write_text(
        "task: writing\n"
        + data
        + "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[answer]}}'\n"
        "target_delimiter: ''\ngeneration_kwargs:\n  until: ['=']\nmetric_list:\n  - metric: exact_match\n"
    )
    return rows, lm_tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.slow
def test_local_tasks_from_end_to_end(tasks, tmp_path, monkeypatch):
    rows, manager = tasks
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    model = diffusion(greedy=False)
    options = {"task_manager": manager, "bootstrap_iters": 0, "log_samples": True}
    found = lm_eval.simple_evaluate(model=model, tasks=["letters", "writing"], **options)
    likeliest = [
        max(range(3), key=lambda i, q=row["question"]: masked_log_softmax(model.policy, q + "cde"[i], 3))
        for row in rows
    ]
    expected = sum(best == row["answer"] for best, row in zip(likeliest, rows, strict=True)) / 4
    assert found["results"]["letters"]["acc,none"] == expected
    written = [sample["resps"][0][0] for sample in found["samples"]["writing"]]
    assert written == model.generate_until(asked(*((row["question"], {"until": "="}) for row in rows)))


def test_contexts_begin_with_what_the_tokenizer_adds_and_no_text_begins_with_it_twice():
    model = autoregressive()
    eos = model.policy.spec.eos_ids[0]
    plain = model.tok_encode("ab")
    assert model.prefix_token_id == eos
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", eos)]
    )
    assert model.tok_encode("ab") == model.tok_encode("<pad>ab") == [0, *plain] and model.prefix_token_id == 0
    assert model.tok_encode("ab", add_special_tokens=False) == plain


@pytest.mark.parametrize(("device", "is_refused"), [("cuda:0", False), (None, False), ("cpu", False), ("cuda:1", True)])
def test_the_harness_default_device_is_the_cpu_on_a_machine_without_a_gpu(tmp_path, monkeypatch, device, is_refused):
    command = pytest.importorskip("dllm_rl.cli.harness")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    tiny_masked_lm(**SMALL).save_pretrained(tmp_path)
    if is_refused:
        with pytest.raises(ValueError, match="device='cuda:1' is not on this machine"):
            command.CommandLineModel(str(tmp_path), device=device)
    else:
        assert command.CommandLineModel(str(tmp_path), device=device).policy.device.type == "cpu"
