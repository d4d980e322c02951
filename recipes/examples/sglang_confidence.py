"""The confidence by which SGLang writes sampled tokens of a diffusion model (python/sglang/srt/dllm/sampling.py).

It is the smaller of two probabilities: that of the likeliest token, and that of the drawn token divided by it. SGLang
writes all draws above a threshold, or the best one: commit=Threshold(tau=...).

python -m recipes.examples.sglang_confidence     prints what is known of the order's probability
"""

from dllm_rl import Rank, Threshold
from dllm_rl.testing import check_order


class DrawnAndLikeliest(Rank):
    def __call__(self, logits, normalizer, tokens):  # (K, V), (K,), (K,) -> (K,): log of the smaller one
        likeliest = logits.amax(-1)
        drawn = logits.gather(-1, tokens[:, None])[:, 0]
        return (likeliest - normalizer).minimum(drawn - likeliest)


if __name__ == "__main__":
    print(check_order(DrawnAndLikeliest(), Threshold(tau=0.8)))  # unknown: it depends on the drawn tokens
