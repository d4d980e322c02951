"""Supervised training on random tokens, against transformers' own forward and cross-entropy, row by row."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from dllm_rl.models.tiny import tiny_diffusion_gemma
from dllm_rl.supervised.denoising import DenoisingExample, Noise, denoising_examples, denoising_loss

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "DiffusionGemmaConfig"), reason="this transformers has no DiffusionGemma"
)
EOS = 2


def tiny():
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "sliding_window": 4,
    }
    return tiny_diffusion_gemma(characters="abcdefg", canvas_length=4, embedding_std=0.5, **sizes)


def noise(rows, **given):
    """Nothing is replaced, the first canvas is predicted, and no row is conditioned, unless `given`."""
    values = {"level": torch.zeros(rows), "replace": torch.full((rows, 4), 0.5), "token": torch.zeros(rows, 4)}
    values |= {"canvas": torch.zeros(rows), "self_condition": torch.ones(rows)} | given
    return Noise(**values)


def test_a_lesson_by_hand():
    policy = tiny()
    size = policy.vocab_size
    pairs = [([5, 6], [3, 4, 5, 6, 7, EOS]), ([7], [3, 3, 3])]
    drawn = noise(
        2,
        level=torch.tensor([0.5, 1.0]),
        replace=torch.tensor([[0.4, 0.5, 0.9, 0.1], [0.0, 0.3, 0.6, 0.99]]),
        token=torch.tensor([[3.5, 0, 0, 5.5], [8.5, 7.5, 6.5, 5.5]]) / size,
        canvas=torch.tensor([0.5, 0.99]),
        self_condition=torch.tensor([0.49, 0.51]),
    )
    one, two = denoising_examples(policy, pairs, drawn)
    # Two canvases: 0.5 takes the second one, whose last two places are filled with end tokens.
    assert one.context.tolist() == [5, 6, 3, 4, 5, 6] and one.target.tolist() == [7, EOS, EOS, EOS]
    assert one.noisy.tolist() == [3, EOS, EOS, 5] and one.num_answer_tokens == 2 and one.self_conditioned
    assert two.context.tolist() == [7] and two.target.tolist() == [3, 3, 3, EOS]
    assert two.noisy.tolist() == [8, 7, 6, 5] and two.num_answer_tokens == 3 and not two.self_conditioned


BATCH = [
    DenoisingExample(
        torch.tensor([5, 6, 3, 4, 5, 6]), torch.tensor([7, EOS, EOS, EOS]), torch.tensor([3, 2, 2, 5]), 2, True
    ),
    DenoisingExample(torch.tensor([7]), torch.tensor([3, 3, 3, EOS]), torch.tensor([8, 7, 6, 5]), 4, False),
    DenoisingExample(torch.tensor([8, 4, 4]), torch.tensor([6, 5, 4, 3]), torch.tensor([6, 5, 4, 3]), 4, True),
]


def by_transformers(policy, lesson):
    """The loss of one row without padding: the model's own forward, twice, and a causal loss of its encoder."""
    module = policy.module
    context, target, seen = (x[None] for x in (lesson.context, lesson.target, lesson.noisy))
    given = {"input_ids": context, "decoder_input_ids": seen}
    if lesson.self_conditioned:
        with torch.no_grad():
            given["self_conditioning_logits"] = module(**given).logits
    decoder = F.cross_entropy(module(**given).logits[0], target[0])
    text = torch.cat([context, target[:, : lesson.num_answer_tokens]], dim=1)
    states = module.model.encoder.language_model(input_ids=text).last_hidden_state
    cap = module.config.text_config.final_logit_softcapping
    logits = cap * torch.tanh(module.lm_head(states) / cap)
    return decoder + F.cross_entropy(logits[0, :-1], text[0, 1:])


def test_loss_and_gradient_are_those_of_transformers():
    policy = tiny()
    weights = {name: weight for name, weight in policy.module.named_parameters() if "vision" not in name}
    expected = sum(by_transformers(policy, lesson) for lesson in BATCH)
    wanted = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)
    found = denoising_loss(policy, BATCH)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found, list(weights.values()), allow_unused=True)
    moved = 0
    for name, ours, theirs in zip(weights, gradients, wanted, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)
            moved += bool(ours.abs().max() > 1e-3)
    assert moved > 10


def test_conditioning_is_of_its_rows_alone():
    """A conditioned row in the batch changes nothing in the others, and the first pass is not nothing."""
    policy = tiny()
    with torch.no_grad():
        alone = denoising_loss(policy, BATCH[1:2])
        both = denoising_loss(policy, BATCH[:2]) - denoising_loss(policy, BATCH[:1])
        torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)
        plain = [DenoisingExample(one.context, one.target, one.noisy, one.num_answer_tokens, False) for one in BATCH]
        assert (denoising_loss(policy, plain) - denoising_loss(policy, BATCH)).abs() > 1e-3
