"""OpenAI's endpoints: the answers are the sampler's own, a public client completes, other requests get a line."""

import json
from functools import partial

import pytest
import torch
from openai import APIStatusError, OpenAI
from servers import causal, diffusion, running

from dllm_rl.cli.sample import sample_problems
from dllm_rl.diagnostics.trace_check import check_trace
from dllm_rl.diagnostics.traces import read_trace
from dllm_rl.integrations.serving.batching import Refused
from dllm_rl.integrations.serving.openai_api import read_request
from dllm_rl.integrations.serving.settings import ServerSettings
from dllm_rl.models.tiny import tiny_diffusion_gemma
from dllm_rl.rng import generator_for
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.cache import DualCache, PrefixCache
from dllm_rl.samplers.renoise import Renoise
from dllm_rl.samplers.rules import Threshold
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.tasks.base import Problem
from dllm_rl.types.rollouts import Prompts

USUAL = {"max_new_tokens": 5, "temperature": 0.0, "suppress": (0,)}  # no padding, whose text is empty
CHAT = "{% for message in messages %}{{ message['content'] }}={% endfor %}"


@pytest.fixture(scope="module")
def policy():
    policy = diffusion()
    policy.tokenizer.chat_template = CHAT
    return policy


@pytest.fixture(scope="module")
def server(policy):
    with running(policy, USUAL) as server:
        yield server


@pytest.fixture(scope="module")
def causal_server():
    with running(causal(), {"max_new_tokens": 6}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"temperature": 0.7, "diffusion_steps": 3}, {}])
def test_a_completion_is_that_of_sample_bit_for_bit(policy, server, settings):
    """The texts, and the log-probs as the numbers that JSON writes exactly."""
    record = sample_problems(policy, [Problem("1+2=")], Unmask(**USUAL | settings), seed=5)
    answer = server.complete("1+2=", seed=5, logprobs=0, **settings)
    (choice,) = answer["choices"]
    (row,) = record["rows"]
    assert choice["text"] == row["completion"]
    sampler_probability = [token["probability"] for token in row["tokens"]]
    logprobs = choice["logprobs"]["token_logprobs"]
    assert torch.tensor(logprobs).exp().tolist() == sampler_probability[: len(logprobs)] and logprobs
    assert answer["system_fingerprint"] == "weights_version=0"


def test_n_and_prompts_take_the_seeds_of_sample(policy, server):
    sampler = Unmask(**USUAL | {"temperature": 1.0})
    record = sample_problems(policy, [Problem("1+2="), Problem("3+4=")], sampler, num_generations=3, seed=7)
    answer = server.complete(["1+2=", "3+4="], n=3, seed=7, temperature=1.0)
    assert [c["text"] for c in answer["choices"]] == [row["completion"] for row in record["rows"]]
    assert [c["index"] for c in answer["choices"]] == [*range(6)]
    ids = server.complete(
        [policy.tokenizer.encode(text, add_special_tokens=False) for text in ("1+2=", "3+4=")],
        n=3,
        seed=7,
        temperature=1.0,
    )
    assert [c["text"] for c in ids["choices"]] == [c["text"] for c in answer["choices"]]


def test_without_a_seed_requests_differ_and_with_one_they_do_not(server):
    texts = {server.complete("1+2=", temperature=2.0)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) > 1
    assert len({server.complete("1+2=", temperature=2.0, seed=1)["choices"][0]["text"] for _ in range(2)}) == 1


def test_openais_client_completes(client, policy):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    answer = client.completions.create(
        model="tiny", prompt="1+2=", max_tokens=5, n=2, temperature=1, seed=3, logprobs=0
    )
    assert answer.usage.prompt_tokens == 4 and 2 <= answer.usage.completion_tokens <= 10
    for choice in answer.choices:
        assert choice.finish_reason in ("stop", "length")
        ends = choice.logprobs.tokens[-1] == "<eos>"
        assert "".join(choice.logprobs.tokens) == choice.text + "<eos>" * ends
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)


def test_openais_client_chats_with_the_template_of_the_tokenizer(client, server):
    messages = [{"role": "user", "content": "1+2"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=6, logprobs=True)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == server.complete("1+2=", max_tokens=6)["choices"][0]["text"]
    assert "".join(each.token for each in choice.logprobs.content).removesuffix("<eos>") == choice.message.content
    parts = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "2"}]}]
    again = client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=6)
    assert again.choices[0].message.content == choice.message.content


def test_openais_client_reads_a_stream(client):
    fields = {"model": "tiny", "prompt": "1+2=", "n": 2, "seed": 1, "temperature": 1, "max_tokens": 4}
    whole = client.completions.create(**fields)
    chunks = [*client.completions.create(**fields, stream=True, stream_options={"include_usage": True})]
    for choice in whole.choices:
        of_choice = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in of_choice) == choice.text
        assert [c.finish_reason for c in of_choice] == [None, choice.finish_reason]
    assert chunks[-1].usage == whole.usage
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    messages = [{"role": "user", "content": "1+2"}]
    fields = {"model": "tiny", "messages": messages, "seed": 1, "max_completion_tokens": 4}
    chat = client.chat.completions.create(**fields)
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**fields, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == chat.choices[0].message.content


def test_a_stream_is_events_that_end_with_done(server):
    fields = {"prompt": "1+2=", "seed": 1, "max_tokens": 2, "trace": True}
    data = json.dumps(fields | {"stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\nConnection: close\r\n"
    answer = server.raw((head + f"Content-Type: application/json\r\n\r\n{data}").encode()).decode()
    assert "text/event-stream" in answer and "data: [DONE]\n\n" in answer
    first = json.loads(answer.partition("data: ")[2].partition("\n\n")[0])
    assert first["choices"][0]["trace"] == server.complete(**fields)["choices"][0]["trace"]


def test_a_stop_text_ends_the_text(server):
    full = server.complete("1+2=", seed=2, temperature=2.0)["choices"][0]["text"]
    assert len(full) > 2
    stop = full[1:3]
    (choice,) = server.complete("1+2=", seed=2, temperature=2.0, stop=["%%", stop], logprobs=0)["choices"]
    assert choice["text"] == full[: full.index(stop)] and choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_vllms_settings_of_what_stops(server, policy):
    """vLLM leaves the stop text or token out of the text, unless `include_stop_str_in_output` asks for it."""
    asked = {"prompt": "1+2=", "seed": 2, "temperature": 2.0, "logprobs": 0}
    whole = server.complete(**asked)
    full = whole["choices"][0]["text"]
    assert len(full) > 3 and full[0] not in full[1:3]
    ids = policy.tokenizer.encode(full, add_special_tokens=False)
    assert len(ids) == len(full)  # a token for each character
    for stop, end in (({"stop": [full[2:4], full[1:3]]}, 3), ({"stop_token_ids": [ids[1]]}, 2)):
        for include in (False, True):
            answer = server.complete(**asked, **stop, include_stop_str_in_output=include)
            (choice,) = answer["choices"]
            assert choice["text"] == full[: end if include else 1] and choice["finish_reason"] == "stop"
            if "stop_token_ids" in stop:  # counted, and scored, as an end token is
                assert choice["logprobs"]["tokens"] == [*full[:2]] and answer["usage"]["completion_tokens"] == 2
                assert choice["logprobs"]["text_offset"] == [0, 1]
    end = policy.spec.eos_ids[0]  # which ends completions anyway
    assert server.complete(**asked, stop_token_ids=[end])["choices"] == whole["choices"]


def test_an_end_token_ends_the_text_and_is_counted():
    """Every token but the end token is suppressed: the completion is empty, and one token long."""
    policy = diffusion()
    only_end = {"suppress": tuple(i for i in range(policy.vocab_size) if i not in policy.spec.eos_ids)}
    with running(policy, only_end) as server:
        answer = server.complete("1+2=", logprobs=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop") and choice["logprobs"]["tokens"] == ["<eos>"]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}


def test_a_trace_is_one_that_check_trace_accepts(policy, server, tmp_path):
    rows = [c["trace"] for c in server.complete(["1+2=", "13="], trace=True, temperature=0.7, seed=1)["choices"]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollout = read_trace(path)
    prompts = Prompts.from_ids([[4, 13, 5, 14], [4, 6, 14]], pad_id=0)
    expected = Unmask(**USUAL | {"temperature": 0.7})(policy, prompts, generator_for(1))
    assert rollout.tokens[rollout.completion_mask].tolist() == expected.tokens[expected.completion_mask].tolist()
    assert torch.equal(rollout.unmask_step[:, -5:], expected.unmask_step[:, -5:])
    report = check_trace(policy, rollout)
    assert not report.differs and not report.faults


@pytest.mark.slow
def test_special_tokens_have_no_place_in_the_text(policy):
    """A completion with padding in it: its texts leave that out, and so do offsets and the cut at a stop text."""
    with running(policy, {"max_new_tokens": 10, "temperature": 1.5}) as server:
        answers = [server.complete("12", seed=seed, logprobs=0)["choices"][0] for seed in range(20)]
        answers = [each for each in answers if "<pad>" in each["logprobs"]["tokens"][:-2] and len(each["text"]) > 3]
        assert answers
        for seed in range(8):
            whole = server.complete("12", seed=seed, logprobs=0)["choices"][0]
            cut = server.complete("12", seed=seed, logprobs=0, stop=whole["text"][-1:] or "none")["choices"][0]
            kept = [token for token in cut["logprobs"]["tokens"] if token not in ("<pad>", "<eos>")]
            assert "".join(kept) == cut["text"]
    for each in answers:
        tokens, offsets = each["logprobs"]["tokens"], each["logprobs"]["text_offset"]
        for token, offset in zip(tokens, offsets, strict=True):
            assert token in ("<pad>", "<eos>") or each["text"][offset] == token


def test_a_causal_model_completes_as_its_sampler(causal_server):
    policy = causal_server.batcher.policy
    prompts = Prompts.from_ids([policy.tokenizer.encode("1+2=", add_special_tokens=False)], pad_id=policy.pad_id)
    rollout = Autoregress(max_new_tokens=6, temperature=0.7)(policy, prompts, generator_for(4))
    answer = causal_server.complete("1+2=", seed=4, temperature=0.7, logprobs=0)
    found = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert found == rollout.logprobs[rollout.completion_mask].tolist()[: len(found)]


def made(name, **settings):
    """A rule of a request with settings."""
    return {"class_path": name, "init_args": settings}


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"model": "gpt-4"}, 404, "model", "model='gpt-4' is not served here; use model='tiny'"),
        ({"prompt": None}, 400, "prompt", "prompt must be a text"),
        ({"prompt": []}, 400, "prompt", "prompt=[] must be a text, a list of texts, token ids, or a list of lists"),
        ({"prompt": [1.5]}, 400, "prompt", "prompt=[1.5] must be a text"),
        ({"prompt": [[5], []]}, 400, "prompt", "prompt=[[5], []] must be a text"),
        ({"prompt": [True]}, 400, "prompt", "prompt=[true] must be a text"),
        ({"prompt": [4, 1, 5]}, 400, "prompt", "token 1 is the mask token, which samplers fill in; leave"),
        ({"prompt": ["1", [1]]}, 400, "prompt", "token 1 is the mask token, which samplers fill in; leave"),
        ({"prompt": "1\ud83d"}, 400, "prompt", "has half a character, the lone surrogate '\\ud83d' at character 1"),
        ({"prompt": ["1", "\ude00"]}, 400, "prompt", "the lone surrogate '\\ude00' at character 0"),
        ({"suffix": "1\ud83d1"}, 400, "suffix", "has half a character, the lone surrogate '\\ud83d'"),
        ({"prompt": [[999]]}, 400, "prompt", "token ids must lie in [0, 15)"),
        ({"prompt": "word"}, 400, "prompt", "cannot be tokenized"),
        ({"prompt": "1" * 80}, 400, "prompt", "exceed the model's 64 positions"),
        ({"max_tokens": 62}, 400, "max_tokens", "exceed the model's 64 positions; shorten them"),
        ({"max_tokens": 50}, 400, "max_tokens", "max_tokens=50 is above the server's 40"),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens=0 should be greater than or equal to 1"),
        ({"max_tokens": True}, 400, "max_tokens", "max_tokens=true should be a valid integer"),
        ({"temperature": "hot"}, 400, "temperature", 'temperature="hot" should be a valid number'),
        ({"temperature": -1}, 400, "temperature", "temperature=-1 should be greater than or equal to 0"),
        ({"top_p": 0}, 400, "top_p", "top_p=0 should be greater than 0"),
        ({"n": 0}, 400, "n", "n=0 should be greater than or equal to 1"),
        ({"n": float("nan")}, 400, "n", "n=NaN should be a valid integer"),
        ({"temperature": float("inf")}, 400, "temperature", "temperature=Infinity should be"),
        ({"temperature": 1e-40}, 400, None, "temperature=1e-40 must be"),
        ({"temperature": 1e-300}, 400, None, "temperature=1e-300 must be"),
        ({"temperature": 1, "top_p": 1e-300}, 400, None, "top_p=1e-300 must"),
        ({"n": 100}, 400, "n", "1 prompts x n=100 are 100 completions; ask for 64"),
        ({"best_of": 3}, 400, "best_of", "best_of=3 must be n=1"),
        ({"stop": ["a"] * 5}, 400, "stop", "must be a text or up to 4 texts"),
        ({"stop": ["a", ""]}, 400, "stop", 'stop=["a", ""] must be a text or up to 4 texts'),
        ({"stop_token_ids": [5, 10**9]}, 400, "stop_token_ids", "stop_token_ids: token ids must lie in [0, "),
        ({"stop_token_ids": 5}, 400, "stop_token_ids", "stop_token_ids=5 should be a valid list"),
        ({"include_stop_str_in_output": 1}, 400, "include_stop_str_in_output", "should be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream=true; leave it out"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options", "a valid boolean"),
        ({"stream": True, "stream_options": []}, 400, "stream_options", "stream_options=[] should be a valid dict"),
        (
            {"stream": True, "stream_options": {"include_usge": True}},
            400,
            "stream_options",
            "stream_options.include_usge=true is not supported by this server; leave it out",
        ),
        ({"logprobs": 5}, 400, "logprobs", "records the log-prob of the chosen token only; use 0"),
        ({"logprobs": 1, "temperature": 1}, 400, "logprobs", "use 0, or 1 at temperature 0"),
        ({"echo": True}, 400, "echo", "echo=true is not supported by this server; leave it out"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", 'logit_bias={"5": 1} is not supported by this server'),
        ({"suffix": 3}, 400, "suffix", "suffix=3 should be a valid string"),
        ({"suffix": "word"}, 400, "suffix", "cannot be tokenized"),
        ({"suffix": "1" * 60}, 400, "prompt", "a prompt of 64 tokens and max_tokens=1 exceed the model's 64 positions"),
        ({"suffix": "3", "max_tokens": 60}, 400, "max_tokens", "exceed the model's 64 positions"),
        ({"suffix": "3", "diffusion_steps": 9}, 400, None, "diffusion_steps=9 is more than the 8 tokens"),
        (
            {"suffix": "3", "cache": "DualCache"},
            400,
            "cache",
            'cache="DualCache" does not work with a suffix; leave',
        ),
        ({"min_p": 0.1}, 400, "min_p", "min_p=0.1 is not supported by this server; leave it out"),
        ({"rank": "best"}, 400, None, "rank='best' is not known (Confidence"),
        ({"rank": 3}, 400, "rank", "rank=3 should be a valid string"),
        ({"rank": "FunctionRank"}, 400, None, "FunctionRank needs function"),
        ({"rank": {"class_path": "os.system", "init_args": {}}}, 400, None, "rank='os.system' is not known"),
        ({"commit": "Threshold"}, 400, None, "Threshold needs tau"),
        ({"commit": made("Threshold", tau="x")}, 400, None, "tau='x' is of type str; give float"),
        (
            {"commit": made("Threshold", tua=0.5)},
            400,
            None,
            "tua=0.5 is not a setting of Threshold; the nearest is 'tau'",
        ),
        (
            {"commit": {"class_path": "Threshold"}},
            400,
            None,
            "commit={'class_path': 'Threshold'} is not of type Commit; give",
        ),
        (
            {"commit": {"class_path": "Threshold", "init_args": 5}},
            400,
            None,
            "'init_args': 5} is not of type Commit; give",
        ),
        ({"\ud800": 1}, 400, None, "a field's name has half a character (a lone surrogate); leave the field out"),
        ({"diffusion_steps": 9}, 400, None, "diffusion_steps=9 is more than the 8 tokens"),
        (
            {"diffusion_steps": 41},
            400,
            "diffusion_steps",
            "diffusion_steps=41 is above the server's max_tokens=40; use less",
        ),
        ({"cache": "BlockCache"}, 400, None, "is not for 'full' attention"),
        ({"commit": made("Remask", eta=0.5), "trace": True}, 400, "trace", "this sampler rewrites tokens"),
    ],
)
def test_what_cannot_be_fulfilled_is_refused_in_a_line(policy, fields, status, param, said, request):
    server = request.getfixturevalue("limited")
    found, answer = server.ask("/v1/completions", {"prompt": "1+2="} | fields)
    error = answer["error"]
    assert (found, error["param"], error["code"]) == (status, param, status)
    assert said in error["message"] and "\n" not in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_the_room_of_a_model_of_canvases_is_counted_in_canvases():
    """128 positions, canvases of 16: after 100 tokens there is one canvas, after 120 none."""
    policy = tiny_diffusion_gemma(characters="123=", hidden_size=16, num_layers=1)
    read = partial(
        read_request, policy=policy, defaults=Renoise(max_new_tokens=48), server=ServerSettings("m"), is_chat=False
    )
    body = lambda size, **fields: json.dumps({"prompt": "1" * size} | fields).encode()  # noqa: E731
    assert read(body(100)).max_tokens == read(body(100, max_tokens=16)).max_tokens == 16
    for size, fields in ((100, {"max_tokens": 17}), (120, {}), (120, {"max_tokens": 1})):
        with pytest.raises(Refused, match="in whole canvases of 16, exceed the model's 128 positions"):
            read(body(size, **fields))


@pytest.fixture(scope="module")
def limited(policy):
    with running(policy, max_tokens=40, max_waiting=64) as server:
        yield server


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "messages=[] must be a list of objects, each with role and a text as content"),
        ({"messages": None}, "messages must be a list of objects"),
        ({"messages": [{"role": "user"}]}, "neither text nor chat messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            '[{"type": "image_url"}]}] must be a list',
        ),
        ({"messages": [{"role": "user", "content": "1\ud83d"}]}, "has half a character"),
        ({"tools": [{"type": "function"}]}, "tools=[{"),
        ({"top_logprobs": 2, "logprobs": True}, "top_logprobs=2 is not supported by this server; leave it out"),
        ({"suffix": "3"}, 'suffix="3" is not supported by this server'),
    ],
)
def test_what_cannot_be_fulfilled_of_a_chat_is_refused(server, fields, said):
    messages = [{"role": "user", "content": "1"}]
    status, answer = server.ask("/v1/chat/completions", {"messages": messages} | fields)
    assert status == 400 and said in answer["error"]["message"]


def test_a_tokenizer_without_a_template_cannot_chat(causal_server):
    status, answer = causal_server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "1"}]})
    assert status == 400 and "the tokenizer has no chat template; give plain text" in answer["error"]["message"]


@pytest.mark.slow
def test_a_model_of_random_tokens_completes_in_whole_canvases_and_the_rest_is_cut():
    policy = tiny_diffusion_gemma(characters="0123456789+=", canvas_length=8)
    prompts = Prompts.from_ids([[4, 13, 5, 14]], pad_id=policy.pad_id)
    rollout = Renoise(max_new_tokens=16)(policy, prompts, generator_for(3))
    with running(policy, {"max_new_tokens": 8, "temperature": None}) as server:
        answer = server.complete("1+2=", seed=3, max_tokens=10, temperature=0, logprobs=0)
        status, refused = server.ask("/v1/completions", {"prompt": "1", "temperature": 1})
        traced, why = server.ask("/v1/completions", {"prompt": "1", "trace": True})
    ids = rollout.tokens[0, -16:-6].tolist()
    ends = [i for i, token in enumerate(ids) if token in policy.spec.eos_ids]
    ids = ids[: ends[0] + 1] if ends else ids
    assert answer["choices"][0]["logprobs"]["tokens"] == [policy.tokenizer.decode([token]) for token in ids]
    assert answer["usage"]["completion_tokens"] == len(ids)
    assert status == 400 and "temperature=1.0 is not a setting of Renoise" in refused["error"]["message"]
    assert traced == 400 and "rewrites tokens" in why["error"]["message"]


@pytest.mark.parametrize("cache", [PrefixCache(), DualCache(), None])
@pytest.mark.parametrize("suffix", ["", "3"])
def test_a_request_turns_the_servers_cache_off(policy, cache, suffix):
    body = json.dumps({"prompt": "37=", "max_tokens": 8, "cache": "none", "suffix": suffix}).encode()
    defaults = Unmask(max_new_tokens=16, block_size=8, cache=cache)
    assert read_request(body, policy, defaults, ServerSettings(name="mine"), is_chat=False).sampler.cache is None


@pytest.mark.parametrize("fields", [{"temperature": 1.0}, {"temperature": 1.0, "diffusion_steps": 2}, {}])
def test_the_text_before_a_suffix_is_filled_in_as_sample_fills_blanks(policy, fields):
    defaults = USUAL | {"cache": DualCache(), "approximate_early_exit": True}  # neither is for infilling
    record = sample_problems(
        policy, [Problem("1+???=3", blank="?")], Unmask(**USUAL | fields | {"max_new_tokens": 0}), seed=5
    )
    tokens = record["rows"][0]["tokens"]
    with running(policy, defaults) as server:
        answer = server.complete("1+", suffix="=3", max_tokens=3, seed=5, logprobs=0, trace=True, **fields)
    (choice,) = answer["choices"]
    written = [token["text"] for token in tokens]
    kept = written[: written.index("<eos>") + 1] if "<eos>" in written else written
    assert choice["logprobs"]["tokens"] == kept
    assert choice["text"] == "".join(kept).removesuffix("<eos>")
    probabilities = torch.tensor(choice["logprobs"]["token_logprobs"]).exp().tolist()
    assert probabilities == [token["probability"] for token in tokens[: len(kept)]]
    assert answer["usage"]["prompt_tokens"] == 4
    assert choice["trace"]["completion_mask"] == [0, 0, 1, 1, 1, 0, 0]


def test_openais_client_inserts_text(client):
    fields = {"model": "tiny", "prompt": ["1+", "12"], "suffix": "=3", "max_tokens": 4, "n": 3, "temperature": 1}
    answer = client.completions.create(**fields, seed=3)
    assert len({choice.text for choice in answer.choices}) > 1
    other = client.completions.create(**fields | {"suffix": "=9"}, seed=3)
    assert [choice.text for choice in other.choices] != [choice.text for choice in answer.choices]


def test_a_model_that_reads_from_left_to_right_does_not_insert(causal_server):
    status, answer = causal_server.ask("/v1/completions", {"prompt": "1+", "suffix": "=3"})
    assert status == 400 and "'causal' attention does not see the text after" in answer["error"]["message"]


def test_a_setting_of_another_sampler_is_refused(causal_server):
    status, answer = causal_server.ask("/v1/completions", {"prompt": "1", "diffusion_steps": 2})
    assert status == 400 and "diffusion_steps=2 is not a setting of Autoregress" in answer["error"]["message"]


def test_harmless_fields_and_nulls_change_nothing(server):
    plain = server.complete("1+2=", seed=1, max_tokens=3, temperature=1)
    more = server.complete(
        "1+2=",
        seed=1,
        max_tokens=3,
        temperature=1,
        user="me",
        logit_bias={},
        suffix=None,
        echo=False,
        frequency_penalty=0.0,
        tools=None,
        best_of=1,
    )
    assert more["choices"] == plain["choices"]


def test_openais_client_raises_the_line(client):
    with pytest.raises(APIStatusError, match="temperature=3") as error:
        client.completions.create(model="tiny", prompt="1", temperature=3)
    assert error.value.status_code == 400 and error.value.param == "temperature"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100000])
def test_a_body_that_is_no_object_is_refused(server, body):
    status, answer = server.ask("/v1/completions", body)
    assert status == 400 and "the body is" in answer["error"]["message"]


def test_control_characters_of_a_request_do_not_come_back(server):
    _, answer = server.ask("/v1/completions", {"prompt": "1", "model": "\x1b[2J\ud800"})
    assert "\x1b" not in answer["error"]["message"] and "\ud800" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("defaults", "fields", "steps"),
    [
        ({"max_new_tokens": 16, "diffusion_steps": 4}, {"max_tokens": 16}, 4),  # the server's own
        ({"max_new_tokens": 16, "diffusion_steps": 4}, {"max_tokens": 8}, 2),
        ({"max_new_tokens": 16, "diffusion_steps": 4}, {"max_tokens": 10}, 3),
        ({"max_new_tokens": 16, "diffusion_steps": 4}, {"max_tokens": 32}, 8),
        ({"max_new_tokens": 16, "diffusion_steps": 4, "block_size": 4}, {"max_tokens": 17}, 5),
        ({"max_new_tokens": 16, "diffusion_steps": 4}, {"max_tokens": 8, "diffusion_steps": 7}, 7),
        ({"max_new_tokens": 16}, {"max_tokens": 8}, None),  # one per token
    ],
)
def test_steps_keep_the_tokens_of_a_step(policy, defaults, fields, steps):
    data = json.dumps({"prompt": "1+2="} | fields).encode()
    sampler = Unmask(**defaults)
    request = read_request(data, policy, sampler, ServerSettings("tiny"), is_chat=False)
    expected = sampler.replace(max_new_tokens=fields["max_tokens"], diffusion_steps=steps)
    assert request.sampler == expected


def test_rules_of_a_request_replace_the_servers(policy, server):
    prompts = Prompts.from_ids([[4, 13, 5, 14]], pad_id=0)
    rule = Threshold(tau=0.2)
    rollout = Unmask(**USUAL | {"temperature": 1.0, "commit": rule})(policy, prompts, generator_for(1))
    (choice,) = server.complete("1+2=", seed=1, temperature=1, commit=made("Threshold", tau=0.2), trace=True)["choices"]
    assert choice["trace"]["forwards"] == rollout.forwards < 5


def test_traces_of_several_requests_are_groups_of_their_own(server, tmp_path):
    """The server's batch may have prompts of other requests."""
    asked = (("1+2=", 1), ("13=", 2))
    choices = [server.complete(prompt, trace=True, temperature=1, n=n)["choices"] for prompt, n in asked]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(choice["trace"]) + "\n" for each in choices for choice in each))
    assert read_trace(path).group.tolist() == [0, 1, 2]
