"""A tiny model that knows the paragraph of the model check, and its checkpoints with one mistake each."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dllm_rl.doctor.subject import QUESTIONS
from dllm_rl.models.policy import make_policy
from dllm_rl.testing.tiny_checkpoint import CHAT, PARAGRAPH

SPECIAL = ("<pad>", "<mask>", "<eos>", "<user>", "<bot>", "<masked-out>")
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} "
    "{{ '<eos> ' if m.role != 'user' }}{% endfor %}{{ '<bot> ' if add_generation_prompt }}"
)


def word_tokenizer(*, reverse=False, **special):
    """A token per word of the texts; with `reverse` the ids of another model's tokenizer, which has the same words."""
    texts = " ".join((PARAGRAPH, *QUESTIONS, *(turn["content"] for turn in CHAT)))
    split = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    words = sorted({word for word, _ in split.pre_tokenize_str(texts)}, reverse=reverse)
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = split
    special = {"pad_token": "<pad>", "mask_token": "<mask>", "eos_token": "<eos>", "chat_template": TEMPLATE} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>", "<masked-out>"]})
    return tokenizer


def text_policy(*, causal=False, tied=False, seed=0):
    """Train on crops of the paragraph: hidden words without a chat template, or if causal the next word, and a chat."""
    steps = 40 if causal else 60
    tokenizer = word_tokenizer(**({} if causal else {"chat_template": None}))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=192,
        rope_theta=100.0,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # from transformers' 0.02 it takes four times as many steps
        is_causal=causal,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        mask_token_id=None if causal else 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = make_policy(LlamaForCausalLM(config), tokenizer)
    text = torch.tensor(tokenizer.encode(PARAGRAPH, add_special_tokens=False))
    chat = torch.tensor(word_tokenizer().apply_chat_template(list(CHAT), return_dict=False))[None].repeat(16, 1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=1e-2)
    for step in range(steps):
        starts = torch.randint(len(text) - 39, (16, 1), generator=generator)
        rows = chat if causal and step % 8 == 0 else text[starts + torch.arange(40)]
        is_token = torch.ones_like(rows, dtype=torch.bool)
        share = 0.1 + 0.5 * torch.rand(16, 1, generator=generator)
        hidden = is_token if causal else torch.rand(rows.shape, generator=generator) < share
        hidden = hidden & (torch.arange(rows.shape[1]) > 0)
        shown = rows if causal else rows.masked_fill(hidden, 1)
        logprobs = policy.logits(shown, is_token, hidden).log_softmax(-1)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        (-logprobs.gather(1, rows[hidden][:, None]).mean()).backward()
        optimizer.step()
    return policy
