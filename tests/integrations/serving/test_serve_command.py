"""The command: what it refuses before it loads a model, how it starts and stops, and a thousand requests."""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from openai import OpenAI
from servers import TOKEN, diffusion

from dllm_rl import Unmask
from dllm_rl.cli.main import add_serve, main
from dllm_rl.cli.sample import passed_options
from dllm_rl.cli.serve import served_sampler

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    diffusion().save_pretrained(folder)
    return str(folder)


@contextmanager
def process(checkpoint, *options, **variables):
    """The command in its own process: it, and the address that it prints."""
    command = [sys.executable, "-m", "dllm_rl.cli", "serve", checkpoint, "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # A shell ignores SIGINT in what it starts in the background, such as these tests, and children inherit that.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    serving = subprocess.Popen(command, env=environment, preexec_fn=heard, **pipes)
    try:
        line = serving.stderr.readline()
        found = re.search(r" at (http://127.0.0.1:\d+)/v1\n", line)
        assert found, line + serving.stderr.read()
        yield serving, found[1]
    finally:
        serving.kill()
        serving.communicate()


def test_a_runs_sampler_becomes_the_servers():
    """Without what no request could change, and with as many tokens per step at a shorter length."""
    sampler = Unmask(max_new_tokens=16, diffusion_steps=8, compile_step=True)

    def served(sampler, *options):
        arguments = commands.choices["serve"].parse_args(["run", *options])
        arguments.fields = {}
        return served_sampler(diffusion(), sampler, passed_options(arguments))

    commands = argparse.ArgumentParser().add_subparsers()
    add_serve(commands)
    assert served(sampler) == Unmask(max_new_tokens=16, diffusion_steps=8)
    assert served(sampler, "--max_new_tokens", "4") == Unmask(max_new_tokens=4, diffusion_steps=2)
    filled_in = Unmask(max_new_tokens=0, diffusion_steps=8, temperature=0.5)  # of blanks, which no request has
    assert served(filled_in) == Unmask(max_new_tokens=16, temperature=0.5)
    assert served(None) == Unmask(max_new_tokens=16)


def test_a_port_in_use_and_an_unknown_host_are_refused(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["serve", "no-model", "--port", str(other.getsockname()[1])]) == 2
    assert "another program uses it; give another --host or --port" in capsys.readouterr().err
    monkeypatch.setenv("DLLM_RL_TOKEN", "t" * 32)
    assert main(["serve", "no-model", "--host", "no.such.host.invalid"]) == 2
    assert "give another --host or --port" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["uvicorn", "pydantic"])
def test_without_the_extra_it_says_what_to_install(missing, monkeypatch, capsys):
    for module in (
        "dllm_rl.cli.serve",
        "dllm_rl.integrations.serving.server",
        "dllm_rl.integrations.serving.openai_api",
    ):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["serve", "no-model"]) == 2
    assert capsys.readouterr().err == f"error: dllm-rl serve needs {missing}: pip install -e '.[serve]'\n"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_it_after_the_batch_that_runs(checkpoint, number, status):
    with process(checkpoint, "--temperature", "1") as (serving, url), ThreadPoolExecutor(1) as pool:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert client.completions.create(model=checkpoint, prompt="1+2=").choices
        runs = pool.submit(client.completions.create, model=checkpoint, prompt="1+2=", n=60, max_tokens=50)
        time.sleep(0.3)
        serving.send_signal(number)
        out, err = serving.communicate(timeout=60)
        assert serving.returncode == status and out == ""
        assert err == ("interrupted\n" if number == signal.SIGINT else "")
        assert runs.exception(60) is None or "the server is stopping" in str(runs.exception(60))


@pytest.mark.slow
def test_the_token_comes_from_a_file_or_from_the_environment(checkpoint, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    for options, variables in ([["--token_file", str(tmp_path / "token")], {}], [[], {"DLLM_RL_TOKEN": TOKEN}]):
        with process(checkpoint, *options, "--name", "tiny", "--max_new_tokens", "3", **variables) as (_, url):
            client = OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)
            assert client.completions.create(model="tiny", prompt="1+2=").usage.completion_tokens <= 3


def resident_bytes(process):
    """Memory of a process that is in use now."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_thousand_requests_of_mixed_sizes_are_all_answered_and_memory_stays(checkpoint):
    """Each answer is the one of its own prompt and seed, as asked once more afterwards one by one."""
    draw = random.Random(0)
    asked = [
        {
            "prompt": "".join(draw.choices("0123456789+=", k=draw.randint(1, 40))),
            "max_tokens": draw.choice([1, 2, 5, 8, 16, 24]),
            "seed": i,
            "temperature": draw.choice([0.0, 1.0]),
            "n": draw.choice([1, 1, 1, 4]),
        }
        for i in range(1000)
    ]
    lock, memory, texts = threading.Lock(), [], {}
    with process(checkpoint, "--exact_batches", "--max_batch_size", "16") as (serving, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

        def complete(i):
            answer = client.completions.create(model=checkpoint, **asked[i])
            assert len(answer.choices) == asked[i]["n"]
            with lock:
                texts[i] = [choice.text for choice in answer.choices]
                if len(texts) % 100 == 0:
                    memory.append(resident_bytes(serving.pid))

        began = time.monotonic()
        with ThreadPoolExecutor(24) as pool:
            for done in [pool.submit(complete, i) for i in range(1000)]:
                done.result()
        seconds = time.monotonic() - began
        assert len(texts) == 1000
        for i in range(0, 1000, 50):
            again = client.completions.create(model=checkpoint, **asked[i])
            assert [choice.text for choice in again.choices] == texts[i]
    print(json.dumps({"seconds": round(seconds, 1), "resident_MB": [round(each / 1e6) for each in memory]}))
    # The first hundreds fill the allocator's arenas; after that nothing grows.
    assert memory[-1] - memory[2] < 0.03 * memory[2]
