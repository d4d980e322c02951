"""The HTTP server: OpenAI's completions and chat completions, and the endpoints of the rollout engine.

`make_app` checks access. Its handlers then read the body within limits of size and time, parse it, wait for the
batcher, and write the response. User text is never printed by the server.
"""

import asyncio
import hmac
import ipaddress
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from dllm_rl.integrations.serving.batching import Batcher, CompletionJob, Job, PolicyCall, Refused
from dllm_rl.integrations.serving.openai_api import choice, events, read_request, response
from dllm_rl.integrations.serving.settings import ServerSettings
from dllm_rl.integrations.serving.updates import Lease, compute_logits, sample_rollout, update_weights
from dllm_rl.models.base import Policy
from dllm_rl.rng import generator_for, row_seeds
from dllm_rl.screen import escape_controls, line_of

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    raise ImportError(f"dllm-rl serve needs {error.name}: pip install -e '.[serve]'") from None

ENGINE_PATHS = {"/weights": update_weights, "/rollouts": sample_rollout, "/logits": compute_logits}
MAX_ENGINE_BODY_BYTES = 2**28  # largest body of a request for /rollouts or /logits
MAX_WEIGHTS_HEADER_BYTES = 2**24  # a body for /weights may be this much larger than the weights in fp32
SPARE_REQUESTS = 64  # requests that may be open in addition to a full queue
CHAT_PATH = "/v1/chat/completions"
HEALTH_PATH = "/health"  # needs no token, because it reveals nothing about the model


def error_response(refused: Refused) -> Response:
    """Return an error in OpenAI's format."""
    types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    error_type = types.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    error = {"message": line_of(refused), "type": error_type, "param": refused.param, "code": refused.status}
    headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
    if refused.status in (429, 503):
        headers["Retry-After"] = "1"
    return json_response({"error": error}, refused.status, headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # json.dumps escapes non-ASCII characters. A tokenizer may decode to a lone surrogate, which UTF-8 cannot encode.
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


def check_access(request: Request, settings: ServerSettings) -> None:
    """Raise Refused unless the request has the token, or without a token comes from a page of this machine."""
    path = request.url.path
    if settings.token is None:
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if not is_local(name.strip("[]")):  # DNS rebinding: a web page whose host name resolves to this machine
            raise Refused(403, "without a token only requests to localhost are answered; give the server a token")
    elif path != HEALTH_PATH:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), settings.token.encode()):
            raise Refused(401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN")
    if path in ENGINE_PATHS and not settings.allow_updates:
        raise Refused(403, f"{path} is for the learner of a run; start the server with --allow_updates")


async def read_body(
    request: Request, limit: int, seconds: float, *, advice: str, time_for_each_part: bool = False
) -> bytes:
    """Read a request's body.

    Args:
        request: Request to read.
        limit: Largest size in bytes. The rest of a larger body is read and thrown away, because a client that is still
            sending would otherwise see a reset connection in place of the error response.
        seconds: Time for the whole body.
        advice: What to do about a body that is too large.
        time_for_each_part: Whether `seconds` is the time for each part that arrives.

    Raises:
        Refused: The body is too large or too slow.
        ClientDisconnect: The client has closed the connection.
    """
    too_large = Refused(413, f"the body has more than {limit} bytes; {advice}")
    if "expect" in request.headers and int(request.headers.get("content-length", 0)) > limit:
        raise too_large  # the client waits for a response before it sends the body
    body = bytearray()
    try:
        async with asyncio.timeout(seconds) as deadline:
            async for part in request.stream():
                if len(body) <= limit:
                    body += part
                    if time_for_each_part:
                        deadline.reschedule(asyncio.get_running_loop().time() + seconds)
    except TimeoutError:
        if len(body) <= limit:
            raise Refused(408, f"the body did not arrive within {seconds:g} s; send it faster") from None
    if len(body) > limit:
        raise too_large
    return bytes(body)


def make_app(batcher: Batcher, settings: ServerSettings, learner: Policy | None = None) -> ASGIApp:
    """Return the ASGI app of a server.

    Args:
        batcher: Queue of the policy. Its `defaults` must have `max_new_tokens`.
        settings: Access and limits.
        learner: Policy that receives the weights of updates, if the batcher's policy is a quantized copy of it. None:
            the batcher's policy receives them.
    """
    numbers = itertools.count()
    lease = Lease(learner or batcher.policy)
    weights = lease.learner.module.state_dict().values()
    weight_bytes = 4 * sum(tensor.numel() for tensor in weights) + MAX_WEIGHTS_HEADER_BYTES
    started = int(time.time())
    # FastAPI's docs pages are switched off, because they load scripts from other hosts.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (Refused, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)

    @app.api_route(HEALTH_PATH, methods=["GET", "HEAD"])
    async def health() -> Response:
        return json_response({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model(settings.name, started)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != settings.name:
            raise Refused(404, f"model={name!r} is not served here; use model={settings.name!r}", "model")
        return json_response(_model(name, started))

    async def completions(request: Request) -> Response:
        return await _answer(request, batcher, settings, numbers)

    async def engine(request: Request) -> Response:
        path = request.url.path
        limit = weight_bytes if path == "/weights" else MAX_ENGINE_BODY_BYTES
        advice = "start the server with the same model as the training run"
        # Weights are large: such a client, which has the token, gets the time for each part.
        data = await read_body(request, limit, settings.client_timeout, advice=advice, time_for_each_part=True)
        job = PolicyCall(partial(ENGINE_PATHS[path], lease, data))
        (answer,) = await run_jobs(request, batcher, [job], settings.timeout, first=True)
        return Response(answer, media_type="application/octet-stream")

    for path in ("/v1/completions", CHAT_PATH):
        app.add_api_route(path, completions, methods=["POST"])
    for path in ENGINE_PATHS:
        app.add_api_route(path, engine, methods=["POST"])
    return _with_access(app, settings)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, HTTPException):
        path = f"{request.method} {request.url.path}"
        error = Refused(error.status_code, f"{path}: {error.detail}; see docs/serving.md")
    elif not isinstance(error, Refused):
        kind = type(error).__name__
        error = Refused(500, f"the server failed with {kind}; see the traceback in the server's output")
    return error_response(error)


def _with_access(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """Return an app that answers only requests that may be answered, and only a limited number at the same time."""
    num_open = 0

    async def guarded_app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal num_open
        num_open += 1
        try:
            check_access(Request(scope), settings)
            if num_open > settings.max_waiting + SPARE_REQUESTS and scope["path"] != HEALTH_PATH:
                raise Refused(429, f"{num_open} requests are open; ask again later")
            await app(scope, receive, send)
        except Refused as refused:
            await error_response(refused)(scope, receive, send)
        finally:
            num_open -= 1

    return guarded_app


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "dllm_rl"}


async def _answer(request: Request, batcher: Batcher, settings: ServerSettings, numbers: Iterator[int]) -> Response:
    """Answer a request for completions, whose number is the next one if it is not refused."""
    # Web pages of other sites may send forms and plain text to this server without a CORS preflight, but not JSON.
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Refused(415, f"Content-Type is {content_type or 'missing'}; send application/json")
    is_chat = request.url.path == CHAT_PATH
    policy, advice = batcher.policy, "send less, or raise --max_body_bytes"
    data = await read_body(request, settings.max_body_bytes, settings.client_timeout, advice=advice)
    parsed = read_request(data, policy, batcher.defaults, settings, is_chat=is_chat)

    number = next(numbers)
    key = (settings.seed, "request", number) if parsed.fields.seed is None else (parsed.fields.seed,)
    prompts = [ids for ids in parsed.prompts for _ in range(parsed.fields.n)]
    seeds = row_seeds(generator_for(*key), len(prompts)).tolist()  # as `dllm-rl sample` draws them
    pairs = zip(prompts, seeds, strict=True)
    jobs = [CompletionJob(ids, seed, parsed.sampler, parsed.suffix) for ids, seed in pairs]
    rollouts = await run_jobs(request, batcher, jobs, settings.timeout)

    versions = sorted({rollout.weights_version for rollout in rollouts})  # several if an update came between batches
    complete = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{number}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": settings.name,
        "system_fingerprint": f"weights_version={','.join(map(str, versions))}",
        **response(parsed, [choice(policy, rollout, parsed) for rollout in rollouts]),
    }
    if not parsed.fields.stream:
        return json_response(complete)
    return Response("".join(events(complete, parsed)), media_type="text/event-stream")


async def run_jobs(
    request: Request, batcher: Batcher, jobs: Sequence[Job], timeout: float, *, first: bool = False
) -> list[Any]:
    """Submit jobs and return their results. Cancel them if the client leaves or the time is over.

    Args:
        request: Request that the jobs belong to; its connection is watched.
        batcher: Queue to submit to.
        jobs: Jobs to run.
        timeout: Seconds to wait.
        first: Whether the jobs run before all waiting jobs.

    Raises:
        Refused: The queue is full, the time is over, the server is stopping, or a job failed.
        ClientDisconnect: The client has closed the connection.
    """
    batcher.submit(jobs, first=first)
    results: asyncio.Future[Any] = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    # A gathering that is cancelled below has an exception, which asyncio would print if nobody reads it.
    results.add_done_callback(lambda future: future.cancelled() or future.exception())
    disconnect: asyncio.Future[Any] = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({results, disconnect}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if results.done():
            if error := results.exception():
                raise refusal_of(error) from None
            return results.result()
        if disconnect.done():
            raise ClientDisconnect
        if any(job.future.running() or job.future.done() for job in jobs):
            raise Refused(504, f"not finished within {timeout:g} s; ask for fewer tokens, or raise --timeout")
        raise Refused(
            503, f"the request was still in the queue after {timeout:g} s; ask again later, or raise --timeout"
        )
    finally:
        disconnect.cancel()
        results.cancel()
        batcher.cancel(jobs)


async def _wait_for_disconnect(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal_of(error: BaseException) -> Refused:
    """Convert the error of a job to the error response of its request. Also print an unexpected error, in one line."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ValueError):
        return Refused(400, str(error))
    print(f"error: {type(error).__name__}: {line_of(error)}", file=sys.stderr)
    if isinstance(error, torch.OutOfMemoryError):
        return Refused(500, "the device has too little memory for this batch; start with a smaller --max_batch_size")
    return Refused(500, f"the sampler failed with {type(error).__name__}; see the error in the server's output")


class EscapedFormatter(logging.Formatter):
    """Escapes control characters in uvicorn's warnings and errors, which may quote a request."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record), keep="\n\t")


LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"escaped": {"()": EscapedFormatter}},
    "handlers": {"screen": {"class": "logging.StreamHandler", "formatter": "escaped"}},
    "loggers": {"uvicorn": {"handlers": ["screen"], "level": "WARNING", "propagate": False}},
}


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, with a time limit for a request's headers.

    Args:
        seconds: Seconds until the headers of a request must be complete, from the connection or their first byte on.
        arguments: Arguments of `H11Protocol`.
    """

    def __init__(self, *arguments: Any, seconds: float, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.seconds = seconds
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        """Start the timer if no request is complete or running, and stop it if one is."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class Server(uvicorn.Server):
    """uvicorn's server. On shutdown it refuses the waiting jobs and finishes the running batch."""

    def __init__(self, batcher: Batcher, settings: ServerSettings, learner: Policy | None = None) -> None:
        config = uvicorn.Config(
            make_app(batcher, settings, learner),
            http=partial(TimedProtocol, seconds=settings.client_timeout),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=LOGGING,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, int(settings.timeout)),
        )
        super().__init__(config)
        self.batcher = batcher

    async def shutdown(self, sockets: Any = None) -> None:
        self.batcher.close(wait=False)
        await super().shutdown(sockets)


def check_access_settings(host: str, settings: ServerSettings) -> None:
    """Raise ValueError if the settings would let anyone use the server or replace its weights."""
    if settings.allow_updates and settings.token is None:
        raise ValueError("allow_updates lets requests replace the weights, and needs a token: give --token_file")
    if not is_local(host) and settings.token is None:
        raise ValueError(f"host={host!r} is open to other machines, and needs a token: give --token_file FILE")


def is_local(host: str) -> bool:
    """Return whether a host is localhost or a loopback address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False
