"""Access and limits: who is refused, how soon, and in which words."""

import gc
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from openai import AuthenticationError, OpenAI
from refusals import refused
from servers import TOKEN, causal, diffusion, held, running

from dllm_rl.integrations.serving.batching import sample_rows
from dllm_rl.integrations.serving.server import check_access_settings
from dllm_rl.integrations.serving.settings import ServerSettings


@pytest.fixture(scope="module")
def guarded():
    with running(diffusion(), token=TOKEN, client_timeout=1.0, max_body_bytes=2000) as server:
        yield server


def request_bytes(body, *, path="/v1/completions", length=None, more=""):
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\n{more}Content-Length: {length}\r\n\r\n{body}".encode()


def error_of(answer):
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.mark.parametrize("token", ["wrong", "not-a-secre", "not-a-secret-", "nöt"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/weights", "/nowhere"])
def test_a_wrong_token_is_refused_before_anything_is_read(guarded, token, path):
    status, answer = guarded.ask(path, b"x" * 5000, headers={"Authorization": f"Bearer {token}".encode()})
    assert status == 401 and answer["error"]["type"] == "authentication_error"
    assert answer["error"]["message"] == "the token is missing or wrong; send it as Authorization: Bearer TOKEN"


@pytest.mark.parametrize("value", ["", TOKEN, f"Basic {TOKEN}", "Bearer"])
def test_a_missing_token_is_refused(guarded, value):
    status, answer = guarded.ask("/v1/models", headers={"Authorization": value})
    assert status == 401 and TOKEN not in json.dumps(answer)


def test_with_the_token_a_client_completes(guarded):
    right = OpenAI(base_url=f"{guarded.url}/v1", api_key=TOKEN, max_retries=0)
    assert right.completions.create(model="tiny", prompt="1+2=").choices
    wrong = OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(AuthenticationError, match="the token is missing or wrong"):
        wrong.completions.create(model="tiny", prompt="1+2=")
    assert guarded.ask("/health", headers={"Authorization": ""}) == (200, {"status": "ok"})


def test_without_a_token_only_this_machine_is_answered():
    """A page of the internet can let its own name mean 127.0.0.1, and a browser's form can post text."""
    with running(diffusion()) as server:
        for host in ("localhost", "127.0.0.1:80", "127.1.2.3", "[::1]:8000", "[::1]"):
            assert server.ask("/v1/models", headers={"Host": host})[0] == 200
        status, answer = server.ask("/v1/models", headers={"Host": "evil.example:8000"})
        assert status == 403 and "only requests to localhost are answered" in answer["error"]["message"]
        status, answer = server.ask("/v1/completions", {"prompt": "1"}, headers={"Content-Type": "text/plain"})
        assert status == 415 and "send application/json" in answer["error"]["message"]


def test_weights_need_a_server_that_allows_updates(guarded):
    status, answer = guarded.ask("/weights", b"x")
    assert status == 403 and "start the server with --allow_updates" in answer["error"]["message"]


test_a_server_open_to_strangers_is_not_started = refused(
    ("0.0.0.0", None, False, "host='0.0.0.0' is open to other machines, and needs a token: give --token_file FILE"),
    ("example.org", None, False, "host='example.org' is open"),
    ("127.0.0.1", None, True, "allow_updates lets requests replace the weights, and needs a token"),
    by=lambda host, token, updates: check_access_settings(
        host, ServerSettings("tiny", token=token, allow_updates=updates)
    ),
)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_no_token(host):
    check_access_settings(host, ServerSettings("tiny"))


def test_a_token_is_not_shown():
    assert TOKEN not in repr(ServerSettings("tiny", token=TOKEN))


def test_a_huge_body_gets_an_answer(guarded):
    """Also where the client sends all of it before it reads: a reset connection would say nothing."""
    status, answer = guarded.ask("/v1/completions", {"prompt": "1" * 20_000_000})
    assert status == 413 and answer["error"]["message"].startswith("the body has more than 2000 bytes; send less")
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"1" * 1000 + b"\r\n"
    head = request_bytes("").partition(b"Content-Length")[0]
    assert error_of(guarded.raw(head + chunks[: chunks.index(b"3e8")] + chunks[chunks.index(b"3e8") :] * 3))[0] == 413
    assert error_of(guarded.raw(request_bytes("1" * 3_000_000)))[0] == 413  # the server closes this connection
    # A client that asks first is not made to send.
    began = time.monotonic()
    assert error_of(guarded.raw(request_bytes("", length=10**12, more="Expect: 100-continue\r\n")))[0] == 413
    assert time.monotonic() - began < 0.9


def test_a_client_that_does_not_send_its_body_gets_an_answer(guarded):
    began = time.monotonic()
    status, message = error_of(guarded.raw(request_bytes('{"prompt"', length=100)))
    assert (status, message) == (408, "the body did not arrive within 1 s; send it faster")
    assert 0.9 < time.monotonic() - began < 5


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: 1\r\n"])
@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_client_that_does_not_send_its_headers_is_left(guarded, before, sent):
    """Also after a request that was answered. `raw` returns when the server closes the connection."""
    answer = guarded.raw(before + sent)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b'{"status": "ok"}') if before else answer == b""


def test_a_client_that_sends_its_body_byte_by_byte_gets_an_answer(guarded):
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        connection.sendall(request_bytes("", length=1000))
        began = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):  # what a client does not mind that reads the answer
            for _ in range(20):
                connection.sendall(b" ")
                time.sleep(0.2)
        answer = connection.recv(65536)
    assert error_of(answer)[0] == 408 and time.monotonic() - began < 3.5


def test_a_full_queue_and_a_late_turn_get_answers():
    limits = {"batcher": {"max_waiting": 2}, "timeout": 0.5}
    with running(diffusion(), **limits) as server, ThreadPoolExecutor(4) as pool:
        with held(server.batcher):
            waiting = [pool.submit(server.ask, "/v1/completions", {"prompt": "1"}) for _ in range(2)]
            deadline = time.monotonic() + 10
            while len(server.batcher._waiting) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            status, answer = server.ask("/v1/completions", {"prompt": "1"})
            assert status == 429 and answer["error"]["type"] == "rate_limit_error"
            assert "the queue of 2 completions is full; ask again later" in answer["error"]["message"]
            for each in waiting:
                status, answer = each.result(10)
                assert status == 503 and answer["error"]["message"].startswith(
                    "the request was still in the queue after 0.5 s"
                )
            assert not server.batcher._waiting  # they have left their places
        deadline = time.monotonic() + 60
        asked = {"prompt": "1", "max_tokens": 1}
        while (answer := server.ask("/v1/completions", asked))[0] == 504 and time.monotonic() < deadline:
            pass  # a busy machine takes longer than 0.5 s
        assert answer[0] == 200 and answer[1]["choices"]


def test_health_is_answered_whatever_else_is_open(monkeypatch):
    monkeypatch.setattr("dllm_rl.integrations.serving.server.SPARE_REQUESTS", 0)
    with (
        running(diffusion(), batcher={"max_waiting": 1}) as server,
        held(server.batcher),
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(server.ask, "/v1/completions", {"prompt": "1"})
        while not server.batcher._waiting:
            time.sleep(0.01)
        assert server.ask("/v1/models")[0] == 429
        assert server.ask("/health") == (200, {"status": "ok"})
        answer = server.raw(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n")
        server.stop()
        assert waiting.result(10)[0] == 503


def test_a_completion_that_takes_too_long_gets_an_answer(monkeypatch, capfd):
    release = threading.Event()

    def late(*arguments):
        release.wait(30)
        return sample_rows(*arguments)

    with running(diffusion(), timeout=0.5) as server:
        monkeypatch.setattr("dllm_rl.integrations.serving.batching.sample_rows", late)
        status, answer = server.ask("/v1/completions", {"prompt": "1"})
        assert status == 504 and answer["error"]["message"].startswith("not finished within 0.5 s")
        assert answer["error"]["type"] == "server_error"
        release.set()
    gc.collect()  # asyncio reports an error that nobody has read when its future is deleted
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("body", "jobs"), [('{"prompt": "1"}', 1), ('{"prompt": ["1", "2"], "n": 3}', 6)])
def test_a_client_that_leaves_takes_its_place_with_it(body, jobs):
    with running(causal()) as server:
        with held(server.batcher):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(request_bytes(body))
                deadline = time.monotonic() + 10
                while not server.batcher._waiting and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert len(server.batcher._waiting) == jobs
            while server.batcher._waiting and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not server.batcher._waiting
        assert server.complete("1")["choices"]


def test_an_unexpected_error_is_a_line_on_both_sides(monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("first line\nof \x1b[2J")

    with running(diffusion()) as server:
        monkeypatch.setattr("dllm_rl.integrations.serving.batching.sample_rows", fail)
        status, answer = server.ask("/v1/completions", {"prompt": "1"})
    assert status == 500 and answer["error"]["message"].startswith("the sampler failed with RuntimeError")
    err = capfd.readouterr().err
    assert "error: RuntimeError: first line" in err and "\x1b" not in err and len(err.splitlines()) == 1


def test_a_mistake_of_the_server_has_the_form_of_an_error_too(monkeypatch, capfd):
    def fail(*_):
        raise KeyError("\x1b[2J")

    with running(diffusion()) as server:
        monkeypatch.setattr("dllm_rl.integrations.serving.server.choice", fail)
        status, answer = server.ask("/v1/completions", {"prompt": "1"})
    assert status == 500 and answer["error"]["message"].startswith("the server failed with KeyError")
    err = capfd.readouterr().err
    assert "Traceback" in err and "\x1b" not in err


def test_unknown_paths_and_methods_are_refused_in_the_same_form(guarded):
    status, answer = guarded.ask("/v1/embeddings", {})
    assert status == 404 and answer["error"]["message"] == "POST /v1/embeddings: Not Found; see docs/serving.md"
    assert guarded.ask("/v1/completions")[0] == 405


def test_a_stopping_server_refuses_what_waits():
    with ThreadPoolExecutor(1) as pool, running(diffusion()) as server, held(server.batcher):
        waiting = pool.submit(server.ask, "/v1/completions", {"prompt": "1"})
        deadline = time.monotonic() + 10
        while not server.batcher._waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        server.stop()
        status, answer = waiting.result(10)
    assert status == 503 and answer["error"]["message"] == "the server is stopping; ask another one"
