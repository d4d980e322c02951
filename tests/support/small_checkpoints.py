"""The smallest checkpoints of two families, and an edit of one's config."""

import json

from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm

SIZES = {
    "characters": "0123456789+=",
    "hidden_size": 32,
    "num_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def saved(family, directory):
    """The folder of a new checkpoint: masked_lm or llama."""
    policy = tiny_masked_lm(**SIZES) if family == "masked_lm" else tiny_llama(causal=False, **SIZES)
    policy.save_pretrained(directory)
    return directory


def edit(folder, **fields):
    """Overwrite fields of config.json; returns all of them."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return config
