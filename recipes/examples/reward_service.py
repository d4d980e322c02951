"""A reward function that asks a service over HTTP.

All completions are sent at the same time, each with a time limit and two attempts. A completion whose request fails
gets the mean of its prompt's other completions, so that its advantage is 0. If most requests fail, the run stops."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

URL = "http://SERVICE/score"


def ask(prompt, completion):
    """Return the service's number, or None; `prompt` and `completion` are texts, or chats."""
    body = json.dumps({"prompt": prompt, "completion": completion}).encode()
    for _ in range(2):
        try:
            request = urllib.request.Request(URL, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:  # seconds without a byte
                return float(json.load(reply)["score"])
        except (OSError, ValueError, KeyError, TypeError):  # no network, no JSON, no number
            continue


def served(prompts, completions, **columns):
    with ThreadPoolExecutor(len(prompts)) as pool:
        scores = list(pool.map(ask, prompts, completions))
    if sum(score is None for score in scores) > len(scores) / 2:
        raise RuntimeError("most requests failed: the service is down")  # status 1; the last step is saved
    by_prompt = {}
    for prompt, score in zip(prompts, scores, strict=True):
        by_prompt.setdefault(str(prompt), []).extend([] if score is None else [score])
    means = {prompt: sum(known) / max(1, len(known)) for prompt, known in by_prompt.items()}
    return [means[str(prompt)] if score is None else score for prompt, score in zip(prompts, scores, strict=True)]
