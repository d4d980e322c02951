"""A server in a thread of the test's process, and a client that sends bytes."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

from dllm_rl.integrations.serving.batching import Batcher
from dllm_rl.integrations.serving.server import Server
from dllm_rl.integrations.serving.settings import ServerSettings
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.samplers import sampler_for

TOKEN = "not-a-secret"
SIZES = {"characters": "0123456789+=", "hidden_size": 32, "num_layers": 1, "head_std": 0.3}


def diffusion(seed=0):
    return tiny_masked_lm(seed=seed, **SIZES)


def causal(seed=0):
    return tiny_llama(seed=seed, causal=True, **SIZES)


class Running:
    """Address, queue and client of a server."""

    def __init__(self, port, server, token):
        self.port, self.server, self.batcher, self.token = port, server, server.batcher, token
        self.url = f"http://127.0.0.1:{port}"

    def stop(self):
        """What a signal does."""
        self.server.should_exit = True

    def ask(self, path, body=None, *, headers=None, token=None):
        """Status and JSON of one request; a GET without a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        access = {"Authorization": f"Bearer {token or self.token}"} if token or self.token else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        sent = {"Content-Type": "application/json"} | access | (headers or {})
        connection.request("GET" if body is None else "POST", path, data, sent)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text)

    def complete(self, prompt, **fields):
        status, answer = self.ask("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, answer
        return answer

    def raw(self, data, *, wait=10.0):
        """All that the server sends on a connection on which it gets these bytes and no more."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            received = b""
            while part := connection.recv(65536):
                received += part
            return received


@contextmanager
def running(policy, defaults=None, *, token=None, batcher=None, scheme=None, **settings):
    """Serve a policy, or its quantized copy, at a free port of this machine."""
    learner, policy = policy, policy if scheme is None else quantized_copy(policy, scheme)
    defaults = {"max_new_tokens": 8, "temperature": 0.0} | (defaults or {})
    defaults = {name: value for name, value in defaults.items() if value is not None}
    batcher = Batcher(policy, sampler_for(policy)(**defaults), **(batcher or {}))
    settings = {"max_waiting": batcher.max_waiting} | settings
    server = Server(batcher, ServerSettings("tiny", token=token, **settings), learner)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(listener.getsockname()[1], server, token)
    finally:
        server.should_exit = True
        batcher.close()
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def held(batcher):
    """Keep the batcher's thread busy in the block, with a job that is not a request's."""
    from dllm_rl.integrations.serving.batching import PolicyCall

    begun, release = threading.Event(), threading.Event()

    def wait(policy):
        begun.set()
        release.wait(60)

    batcher.submit([PolicyCall(wait)], first=True)
    begun.wait(60)
    try:
        yield
    finally:
        release.set()
