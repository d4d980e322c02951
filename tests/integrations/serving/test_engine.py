"""A server as a rollout engine: a run with it is the run without it, and no wrong weights are ever sampled from."""

import json
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from refusals import refuses
from servers import TOKEN, causal, diffusion, running
from tiny_recipe import SIZES, tiny_recipe, tiny_recipe_ar

from dllm_rl import train
from dllm_rl.integrations.serving.engine import Client, HTTPEngine, HTTPSampler
from dllm_rl.models.lora import adapted_layers, add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.merge import merged_state_dict
from dllm_rl.models.tensor_bytes import serialize
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_layers
from dllm_rl.quantization.schemes import Float8WeightOnly
from dllm_rl.rng import generator_for
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.cache import DualCache
from dllm_rl.samplers.revise import Remask
from dllm_rl.samplers.rules import Confidence, Margin, PlackettLuce, RandomOrder, Rank, SoftThreshold, Threshold
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.samplers.with_settings import with_settings
from dllm_rl.tasks import Sudoku
from dllm_rl.testing import check_engine
from dllm_rl.types.rollouts import Prompts

pytestmark = pytest.mark.usefixtures("no_rehearsal")


@pytest.fixture(scope="module", autouse=True)
def token():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLLM_RL_TOKEN", TOKEN)
        yield


def learning(policy):
    """A server that a learner may update, whose own weights are other ones."""
    return running(policy, token=TOKEN, allow_updates=True)


def on_server(sampler):
    """The sampler with these settings that samples on a server."""
    return HTTPSampler(**{field.name: getattr(sampler, field.name) for field in fields(sampler)})


def greedy_as_rollouts(recipe):
    """Evaluations by the sampler of training at temperature 0, as the engine's are."""
    return replace(recipe, eval_sampler=recipe.sampler.greedy())


def weights(run):
    return [weight.detach().clone() for weight in run.policy.module.parameters()]


@pytest.mark.parametrize(
    ("make", "model", "sampler"),
    [(tiny_recipe, tiny_masked_lm, Unmask), (tiny_recipe_ar, partial(tiny_llama, causal=True), Autoregress)],
    ids=["full", "causal"],
)
@pytest.mark.repeated(first_only=True)
def test_a_run_with_a_server_is_the_run_without_one(tmp_path, make, model, sampler):
    """All bits on a CPU: rewards, log-probs and weights. The server samples in a thread that owns other weights."""
    few = {"train_batch_size": 2, "rollout_quantization": None, "report_to": None}
    few |= {"validation_task": Sudoku(split="validation", size=2), "eval_task": Sudoku(split="test", size=2)}
    plain = greedy_as_rollouts(make(tmp_path / "a", **few))
    with learning(model(seed=7, **SIZES)) as server:
        apart = make(tmp_path / "b", **few, rollout_engine=HTTPEngine(url=server.url))
        apart = replace(greedy_as_rollouts(apart), sampler=on_server(plain.sampler))
        ours, theirs = train(apart), train(plain)
        assert server.batcher.policy.weights_version == 2
        of_server = merged_state_dict(server.batcher.policy.module)
    before = list(model(seed=apart.seed, **SIZES).module.parameters())
    assert not all(map(torch.equal, weights(theirs), before))  # the run trains
    assert all(map(torch.equal, weights(ours), weights(theirs)))
    assert all(torch.equal(of_server[name], tensor) for name, tensor in merged_state_dict(ours.policy.module).items())
    assert ours["eval_after_quantized"] == ours["eval_after"] == theirs["eval_after"]
    rewards = [[row.get("reward") for row in rows_of(tmp_path / name)] for name in "ab"]
    assert rewards[0] == rewards[1] and len(rewards[0]) >= 2


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "model"), [(tiny_recipe, tiny_masked_lm), (tiny_recipe_ar, partial(tiny_llama, causal=True))]
)
def test_a_run_with_a_quantized_server_is_the_run_with_quantized_rollouts(tmp_path, make, model):
    """All bits on a CPU: weights, evaluations, mismatch metrics, and those of the quantization."""
    plain = greedy_as_rollouts(make(tmp_path / "a", rollout_quantization=Float8WeightOnly(), report_to=None))
    with running(model(seed=7, **SIZES), token=TOKEN, allow_updates=True, scheme=Float8WeightOnly()) as server:
        assert list(quantized_layers(server.batcher.policy))
        apart = make(
            tmp_path / "b", rollout_quantization=None, report_to=None, rollout_engine=HTTPEngine(url=server.url)
        )
        apart = replace(greedy_as_rollouts(apart), sampler=on_server(plain.sampler))
        ours, theirs = train(apart), train(plain)
    assert all(map(torch.equal, weights(ours), weights(theirs)))
    assert ours["eval_after_quantized"] == theirs["eval_after_quantized"]
    seen = set()
    for our_row, their_row in zip(rows_of(tmp_path / "b"), rows_of(tmp_path / "a"), strict=True):
        compared = [name for name in their_row if name.startswith(("rollout_corr/", "quantization/", "reward"))]
        assert [our_row[name] for name in compared] == [their_row[name] for name in compared]
        seen |= {name for name in compared if their_row[name]}
    assert {"quantization/codes_changed", "quantization/scale_change", "rollout_corr/kl"} <= seen


@pytest.mark.parametrize("make", [diffusion, causal])
def test_the_engine_keeps_the_contract_of_engines(make):
    learner = make(seed=1)
    prompts = Prompts.from_ids([[3, 4, 5], [6, 5]], pad_id=learner.pad_id, num_generations=2)
    with learning(make()) as server:
        check_engine(HTTPEngine(url=server.url), learner, prompts, HTTPSampler(max_new_tokens=6, temperature=0.7))


@pytest.mark.parametrize(
    "settings",
    [
        {"diffusion_steps": 3, "block_size": 4, "rank": Confidence()},
        {"commit": Threshold(tau=0.3), "top_k": 3, "suppress": (0, 4)},
        {"rank": PlackettLuce(temperature=0.3), "diffusion_steps": 3},
        {"rank": PlackettLuce(temperature=0.3, base_rank=Margin()), "diffusion_steps": 3},
        {"commit": SoftThreshold(tau=0.5)},
        {"rank": RandomOrder(), "commit": Remask(eta=0.3)},
        {"cache": DualCache(refresh=2), "top_p": 0.9},
        {"approximate_early_exit": True},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.repeated(every=3)
def test_a_rollout_is_the_samplers_with_all_its_records(loaded, settings):
    learner = loaded.learner
    prompts = Prompts.from_ids([[3, 4, 5], [6, 5]], pad_id=learner.pad_id, num_generations=2)
    expected = Unmask(max_new_tokens=8, temperature=0.7, **settings)(learner, prompts, generator_for(4))
    sampler = HTTPSampler(max_new_tokens=8, temperature=0.7, **settings)
    found = sampler(loaded.rollout_policy, prompts, generator_for(4))
    ours, theirs = found.tensors(), expected.tensors()
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    assert found.sampling_params == expected.sampling_params and found.weights_version == 4
    assert found.forwards == expected.forwards and found.group.tolist() == [0, 0, 1, 1]
    if expected.order is not None:
        assert found.order.probability == expected.order.probability
        assert (found.order.rank_function is None) == (expected.order.rank_function is None)


def test_positions_inside_prompts_are_filled_in(loaded):
    learner = loaded.learner
    prompts = Prompts.from_ids([[3, 1, 5], [1, 5]], pad_id=learner.pad_id, mask_id=1)
    expected = Unmask(max_new_tokens=0, temperature=0.7)(learner, prompts, generator_for(4))
    found = HTTPSampler(max_new_tokens=0, temperature=0.7)(loaded.rollout_policy, prompts, generator_for(4))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.logprobs, expected.logprobs)


def test_adapters_are_merged_into_the_servers_weights():
    learner = diffusion(seed=1)
    add_lora(learner, Lora(r=2, seed=3))
    with learning(diffusion()) as server:
        engine = HTTPEngine(url=server.url)
        rollout_policy = engine.load(learner)
        with torch.no_grad():
            for weight in learner.module.parameters():
                if weight.requires_grad:
                    weight.add_(0.1)
        learner.weights_version += 1
        engine.sync(learner, rollout_policy)
        tensors = merged_state_dict(server.batcher.policy.module)
        assert all(torch.equal(tensors[name], value) for name, value in merged_state_dict(learner.module).items())
        tokens = torch.tensor([[0, 3, 4, 5], [3, 4, 5, 4]])
        mask = torch.tensor([[False, True, True, True], [True] * 4])
        with torch.no_grad():
            assert torch.equal(
                rollout_policy.logits(tokens, mask)[mask], server.batcher.policy.logits(tokens, mask)[mask]
            )


def test_an_update_changes_the_answers():
    learner = diffusion(seed=1)
    with learning(diffusion()) as server:
        before = server.complete("1+2=", temperature=1, seed=1)
        HTTPEngine(url=server.url).load(learner)
        after = server.complete("1+2=", temperature=1, seed=1)
    (choice,) = after["choices"]
    assert before["choices"] != after["choices"]
    assert choice["text"] == learner.complete("1+2=", max_new_tokens=8, temperature=1, seed=1)


class Loaded:
    """A server with a run's weights of version 4, and requests with changed parts."""

    def __init__(self, server):
        self.server, self.learner = server, diffusion(seed=1)
        self.learner.weights_version = 4
        self.rollout_policy = HTTPEngine(url=server.url).load(self.learner)
        self.client = self.rollout_policy.module.client

    def update(self, tensors, **header):
        return self.client.post("/weights", tensors, **{"weights_version": 5, "is_load": False} | header)


@pytest.fixture(scope="module")
def loaded():
    """For tests that leave the server's weights as they are."""
    with learning(diffusion()) as server:
        yield Loaded(server)


@pytest.fixture
def changing():
    with learning(diffusion()) as server:
        yield Loaded(server)


NAME = "lm_head.dense.weight"


@pytest.mark.parametrize(
    ("changes", "header", "said"),
    [
        ({NAME: torch.full((32, 32), torch.nan)}, {}, f"answers 400: {NAME} has numbers that are not finite"),
        (
            {NAME: torch.zeros(32, 31)},
            {},
            f"tensors \\['{NAME}'\\] do not fit the server's RobertaPreLayerNormForMaskedLM",
        ),
        ({NAME: torch.zeros(32, 32, dtype=torch.int64)}, {}, f"tensors \\['{NAME}'\\] do not fit"),
        ({"other": torch.zeros(2)}, {}, "tensors \\['other'\\] do not fit"),
        ({}, {"weights_version": 4}, "answers 409: weights_version=4 is not newer than the server's 4"),
        ({}, {"weights_version": 3}, "weights_version=3 is not newer"),
        ({}, {"weights_version": "5"}, "weights_version='5': must be a whole number"),
        ({}, {"weights_version": True}, "weights_version=True: must be a whole number"),
        ({}, {"weights_version": 2**70}, "weights_version=1180591620717411303424: must be .* below 2"),
        ({}, {"weights_version": -1}, "weights_version=-1: must be a whole number"),
        ({}, {"run": 3}, "run=3: must be a text"),
        ({}, {"is_load": "yes"}, "is_load='yes': Input should be a valid boolean"),
        ({}, {"other": 1}, "other=1: Extra inputs are not permitted"),
        (
            {},
            {"is_load": True, "without": NAME},
            "do not fit the server's RobertaPreLayerNormForMaskedLM; serve the run's model",
        ),
    ],
)
def test_a_wrong_update_changes_nothing(loaded, changes, header, said):
    """The last tensor of the request is the wrong one: those before it fit, and must not be written either."""
    before = {name: tensor.clone() for name, tensor in merged_state_dict(loaded.server.batcher.policy.module).items()}
    tensors = {name: tensor + 1 for name, tensor in merged_state_dict(loaded.learner.module).items()}
    tensors.pop(header.pop("without", None), None)
    for name in changes:
        tensors.pop(name, None)
    refuses(said, lambda: loaded.update(tensors | changes, **header))
    after = merged_state_dict(loaded.server.batcher.policy.module)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert loaded.server.batcher.policy.weights_version == 4


def test_another_run_takes_the_server_and_the_first_one_is_told(changing):
    prompts = Prompts.from_ids([[3]], pad_id=0)
    HTTPSampler(max_new_tokens=2)(changing.rollout_policy, prompts, generator_for(1))
    second = HTTPEngine(url=changing.server.url).load(changing.learner)  # of the same version
    HTTPSampler(max_new_tokens=2)(second, prompts, generator_for(1))
    said = "answers 409: another run has loaded its weights into this server since; give each run its own server"
    refuses(said, lambda: HTTPSampler(max_new_tokens=2)(changing.rollout_policy, prompts, generator_for(1)))
    refuses(said, lambda: changing.update(merged_state_dict(changing.learner.module)))
    refuses(said, lambda: changing.rollout_policy.logits(torch.tensor([[3]]), torch.tensor([[True]])))


def test_rollouts_of_another_version_are_refused(changing):
    changing.rollout_policy.weights_version = 5
    with pytest.raises(
        ValueError, match="the request is for weights_version=5, and the server has 4; call the engine's sync"
    ):
        HTTPSampler(max_new_tokens=2)(changing.rollout_policy, Prompts.from_ids([[3]], pad_id=0), generator_for(1))


def test_rollouts_without_a_load_are_refused():
    with learning(diffusion()) as server:
        client = Client(HTTPEngine(url=server.url), 0, "run")
        for path, header in (("/logits", {}), ("/rollouts", {"settings": {}, "reads_order": True}), ("/weights", {})):
            with pytest.raises(ValueError, match="answers 409: no run has loaded its weights into this server yet"):
                client.post(path, {}, **header)


def test_malformed_tensors_and_headers_are_refused_by_name(loaded):
    """None reaches the model: an id that its embedding lacks would end the process's use of a GPU."""
    ids, mask, vector = torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([0])
    right = {
        "/logits": ({"tokens": ids, "attention_mask": mask, "positions": torch.tensor([[0, 1]])}, {}),
        "/rollouts": (
            {"tokens": ids, "attention_mask": mask, "group": vector, "seeds": vector},
            {"settings": {"max_new_tokens": 2}, "reads_order": False},
        ),
    }
    cases = [
        ("/rollouts", {}, {"settings": None}, "settings=None: must be an object"),
        ("/rollouts", {}, {"settings": [1]}, r"settings=\[1\]: must be an object"),
        ("/rollouts", {}, {"settings": {"max_new_tokens": "2"}}, "max_new_tokens='2'"),
        ("/rollouts", {}, {"settings": {"max_new_tokens": 2, "rank": {"x": 1}}}, "rank="),
        ("/rollouts", {}, {"reads_order": 1}, "reads_order=1: Input should be a valid boolean"),
        ("/rollouts", {}, {"without": "settings"}, "settings: must be an object"),
        (
            "/rollouts",
            {"attention_mask": mask.float()},
            {},
            "attention_mask is torch.float32 of shape .* torch.bool",
        ),
        ("/rollouts", {"seeds": vector.float()}, {}, "seeds is torch.float32 .* it must be torch.int64 of"),
        ("/rollouts", {"seeds": torch.tensor([0, 1])}, {}, r"seeds has the shape \(2,\); \(B\) must be equal"),
        ("/rollouts", {"tokens": ids[:0], "attention_mask": mask[:0]}, {}, r"tokens has the shape \(0, 2\)"),
        ("/rollouts", {"tokens": ids[0]}, {}, r"tokens is torch.int64 of shape \(2,\); it must be .* \(B, S\)"),
        ("/rollouts", {"tokens": ids + 10**6}, {}, r"tokens must lie in \[0, \d+\), and has values from 1000003"),
        ("/rollouts", {"group": vector - 1}, {}, r"group must lie in"),
        ("/rollouts", {"infill_mask": mask.long()}, {}, "infill_mask is torch.int64"),
        ("/rollouts", {"other": ids}, {}, r"tensors .*'other'.* must be attention_mask, group, seeds, tokens"),
        ("/logits", {"tokens": ids - 4}, {}, r"tokens must lie in \[0, \d+\), and has values from -1 to 0"),
        ("/logits", {"tokens": ids.float()}, {}, "tokens is torch.float32"),
        ("/logits", {"positions": ids + 62}, {}, r"positions must lie in \[0, 64\), and has values from 65"),
        ("/logits", {"positions": ids[:, :1]}, {}, r"positions has the shape \(1, 1\); \(B, T\) must be equal"),
        ("/logits", {"attention_mask": mask[0]}, {}, "attention_mask is torch.bool of shape"),
    ]
    client = loaded.client
    for path, tensors, header, said in cases:
        sent, fields = right[path]
        fields = fields | header
        fields.pop(fields.pop("without", None), None)
        with pytest.raises(ValueError, match=f"answers 400: .*{said}"):
            client.post(path, sent | tensors, **fields)
    for path, (tensors, header) in right.items():
        assert client.post(path, tensors, **header)[0]


def other_rank(logits, normalizer):
    return logits.amax(-1) - normalizer


class OtherRank(Rank):
    def __call__(self, logits, normalizer):
        return logits.amax(-1) - normalizer


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": other_rank}, r"rank=FunctionRank\(.*other_rank.* is not a rule that a server knows"),
        (
            {"rank": PlackettLuce(temperature=0.3, base_rank=other_rank)},
            "rank=PlackettLuce.* is not a rule that a server",
        ),
        ({"rank": OtherRank()}, r"rank=.*OtherRank\(\) is not a rule that a server knows"),
        ({"commit": lambda scores, masked, steps_left: masked}, "commit=FunctionCommit.* is not a rule that a server"),
        ({"compile_step": True}, "compile_step=True is not for HTTPSampler: a server compiles no steps"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"max_new_tokens": 100}, "exceeds the model's 64 positions"),
    ],
)
def test_settings_that_a_server_cannot_have_are_refused(loaded, settings, said):
    settings = {"max_new_tokens": 2} | settings
    with pytest.raises(ValueError, match=said):
        HTTPSampler(**settings)(loaded.rollout_policy, Prompts.from_ids([[3]], pad_id=0), generator_for(1))


def test_a_causal_model_has_no_settings_of_unmasking():
    with learning(causal()) as server:
        rollout_policy = HTTPEngine(url=server.url).load(causal())
        with pytest.raises(ValueError, match="block_size=2 is not for Autoregress; leave it out"):
            HTTPSampler(max_new_tokens=2, block_size=2)(
                rollout_policy, Prompts.from_ids([[3]], pad_id=0), generator_for(1)
            )


def test_the_sampler_needs_the_engine():
    with pytest.raises(ValueError, match=r"sampler=HTTPSampler needs the policy of rollout_engine=HTTPEngine\(...\)"):
        HTTPSampler(max_new_tokens=2)(diffusion(), Prompts.from_ids([[3]], pad_id=0), generator_for(1))


def test_a_server_that_is_not_there_or_refuses_is_named(monkeypatch, tmp_path):
    with pytest.raises(
        ConnectionError, match=r"http://127.0.0.1:9/weights: ConnectionRefusedError .*; is `dllm-rl serve`"
    ):
        HTTPEngine(url="http://127.0.0.1:9").load(diffusion())
    with pytest.raises(ValueError, match=r"url='127.0.0.1:8000' is not the address of a server; give http://HOST:PORT"):
        HTTPEngine(url="127.0.0.1:8000").load(diffusion())
    with running(diffusion(), token=TOKEN) as server:
        with pytest.raises(ValueError, match="answers 403: /weights is for the learner of a run; start the server"):
            HTTPEngine(url=server.url).load(diffusion())
        (tmp_path / "token").write_text("other\n")
        with pytest.raises(ValueError, match="answers 401: the token is missing or wrong"):
            HTTPEngine(url=server.url, token_file=str(tmp_path / "token")).load(diffusion())
        (tmp_path / "token").write_text("a b\n")
        with pytest.raises(ValueError, match=r"token_file=.* must hold one line of printable ASCII"):
            HTTPEngine(url=server.url, token_file=str(tmp_path / "token")).load(diffusion())
    monkeypatch.delenv("DLLM_RL_TOKEN")
    with pytest.raises(ValueError, match="no token; set token_file, or the environment variable DLLM_RL_TOKEN"):
        HTTPEngine().load(diffusion())


def test_a_model_of_another_shape_is_refused():
    with learning(diffusion()) as server, pytest.raises(ValueError, match="serve the run's model"):
        HTTPEngine(url=server.url).load(tiny_masked_lm(**SIZES))


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("data", [b"", b"pickle", serialize({}, []), serialize({}, None)])
@pytest.mark.parametrize("path", ["/weights", "/rollouts", "/logits"])
def test_other_bytes_are_refused(loaded, data, path):
    status, answer = loaded.server.ask(path, data)
    assert status == 400 and "\n" not in answer["error"]["message"]


def test_the_token_is_not_stored_with_the_engine():
    from dllm_rl.records import describe

    engine = HTTPEngine(url="http://127.0.0.1:1")
    assert TOKEN not in describe(engine) + repr(engine) and "url='http://127.0.0.1:1'" in describe(engine)


def test_settings_come_back_as_they_were():
    policy = diffusion()
    settings = {"rank": PlackettLuce(temperature=0.3), "cache": DualCache(refresh=4), "suppress": (1, 2)}
    sampler = HTTPSampler(max_new_tokens=2, **settings)
    back = with_settings(policy, json.loads(json.dumps(sampler._settings_of(policy))))
    assert back == Unmask(max_new_tokens=2, **settings)


@pytest.mark.parametrize("with_adapters", [False, True], ids=["weights", "adapters"])
def test_what_is_sent_after_a_step_is_what_was_trained(monkeypatch, with_adapters):
    """Frozen weights are not sent again; layers with adapters are, merged."""
    learner = diffusion(seed=1)
    learner.module.requires_grad_(False)
    expected = [NAME]
    if with_adapters:
        add_lora(learner, Lora(r=2))
        # The biases of these layers are sent too.
        layers = adapted_layers(learner.module)
        expected = sorted(name for name in merged_state_dict(learner.module) if name.rpartition(".")[0] in layers)
        assert {f"{path}.weight" for path in layers} <= set(expected) != merged_state_dict(learner.module).keys()
    else:
        learner.module.get_parameter(NAME).requires_grad_(True)
    sent, post = [], Client.post

    def spy(self, path, tensors, **header):
        sent.append(sorted(tensors))
        return post(self, path, tensors, **header)

    with learning(diffusion()) as server:
        engine = HTTPEngine(url=server.url)
        rollout_policy = engine.load(learner)
        monkeypatch.setattr(Client, "post", spy)
        learner.weights_version += 1
        engine.sync(learner, rollout_policy)
    assert sent == [expected] and expected


def test_older_weights_are_loaded_as_the_best_ones_are_at_the_end(changing):
    """Version 4, then 6, then 5 with frozen weights of another model: all of them are sent."""
    engine = HTTPEngine(url=changing.server.url)
    changing.learner.weights_version = 6
    engine.sync(changing.learner, changing.rollout_policy)
    best = diffusion(seed=2)
    best.weights_version = 5
    for weight in [*best.module.parameters()][::2]:
        weight.requires_grad_(False)
    engine.sync(best, changing.rollout_policy)
    served = merged_state_dict(changing.server.batcher.policy.module)
    assert all(torch.equal(served[name], tensor) for name, tensor in merged_state_dict(best.module).items())
    assert changing.rollout_policy.weights_version == 5
    best.weights_version = 6
    engine.sync(best, changing.rollout_policy)  # and the run goes on
