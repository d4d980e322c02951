"""The HTTP server: OpenAI's completions and chat completions, and the endpoints of the rollout engine.

`Guard` answers before a request is read: access, size and time. The app's functions read, wait for the batcher, and
write. Texts of users never reach the server's output.
"""

import asyncio
import hmac
import ipaddress
import itertools
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dllm_rl.models.base import Policy
from dllm_rl.rng import generator_for, row_seeds
from dllm_rl.screen import escape_controls, line_of
from dllm_rl.serving.batching import (
    Batcher,
    Call,
    Completion,
    Job,
    PromptScores,
    QueueFull,
    ShuttingDown,
    sample_rows,
    score_prompt,
)
from dllm_rl.serving.openai_api import (
    Answered,
    Limits,
    Refused,
    TextRequest,
    choice,
    events,
    read_request,
    response,
    sampler_settings,
)
from dllm_rl.serving.page import HEADERS, PAGE
from dllm_rl.serving.settings import read_settings
from dllm_rl.serving.updates import Conflict, Lease, compute_logits, sample_rollout, update_weights
from dllm_rl.types import Rollout

try:
    import h11
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import Response
    from starlette.exceptions import HTTPException
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    raise ImportError(f"dllm-rl serve needs {error.name}: pip install 'dllm_rl[serve]'") from None

ENGINE_PATHS = {"/weights": update_weights, "/rollouts": sample_rollout, "/logits": compute_logits}
ENGINE_BYTES = 2**28  # of prompts and of tokens to score
WEIGHTS_MARGIN = 2**24  # bytes of a header, in addition to the weights in fp32
DISCARDED_BYTES = 2**26  # of a refused body, which a client sends before it reads the answer
SPARE_REQUESTS = 64  # requests that may be read or answered while all places in the queue are taken
OPEN_PATHS = {"/", "/health"}  # they tell nothing of the model

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class ServerSettings:
    """Access and limits of a server.

    Args:
        name: Name of the model in requests and responses.
        token: Token that requests must have. None: no token; requests must then name this machine.
        allow_updates: Whether requests with the token may replace the weights.
        limits: What a request for completions may ask for.
        max_body_bytes: Size of a request's body.
        timeout: Seconds that a request may wait and run.
        client_timeout: Seconds in which a client must send its headers, and then its body.
        seed: Seed of requests that give none, with their number.
    """

    name: str
    token: str | None = field(default=None, repr=False)
    allow_updates: bool = False
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = 2**20
    timeout: float = 300.0
    client_timeout: float = 30.0
    seed: int = 0


class ClientLeft(Exception):
    """Raised when the client has closed the connection, so that nobody reads an answer."""


def error_response(refused: Refused, *, close: bool = False) -> Response:
    """Return the error in the form of OpenAI's API. `close` also ends the connection."""
    headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
    if refused.status in (429, 503):
        headers["Retry-After"] = "1"
    if close:
        headers["Connection"] = "close"
    return json_response(refused.body(), refused.status, headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # In ASCII, because a custom tokenizer may decode to a lone surrogate, which UTF-8 lacks.
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


class Guard:
    """ASGI app around another one: it checks access, and reads the body within the limits of size and time.

    Args:
        app: App that gets the requests with their whole body.
        settings: Access and limits.
        weight_bytes: Largest size of the body that updates the weights.
    """

    def __init__(self, app: Any, settings: ServerSettings, *, weight_bytes: int) -> None:
        self.app = app
        self.settings = settings
        self.weight_bytes = weight_bytes
        self.num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.num_open += 1
        try:
            body = await self._checked_body(scope, receive)
        except Refused as refused:
            if refused.status != 408:  # a slow client gets its answer at once
                await self._discard(scope, receive)
            await error_response(refused, close=True)(scope, receive, send)  # type: ignore[arg-type]
            return
        except ClientLeft:
            return
        else:
            await self.app(scope, _after(body, receive), send)
        finally:
            self.num_open -= 1

    async def _checked_body(self, scope: Scope, receive: Receive) -> bytes:
        headers = dict(scope["headers"])
        path = scope["path"]
        self._check_access(path, headers)
        if self.num_open > self.settings.limits.max_waiting + SPARE_REQUESTS:
            raise Refused(429, f"{self.num_open} requests are open; ask again later")
        is_engine = path in ENGINE_PATHS
        limit = self.settings.max_body_bytes
        if is_engine:
            limit = self.weight_bytes if path == "/weights" else ENGINE_BYTES
        advice = "serve the run's model" if is_engine else "send less, or raise --max_body_bytes"
        too_large = Refused(413, f"the body has more than {limit} bytes; {advice}")
        if int(headers.get(b"content-length", b"0")) > limit:
            raise too_large
        body = bytearray()
        seconds = self.settings.client_timeout
        deadline = time.monotonic() + seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise Refused(408, f"the body did not arrive within {seconds:g} s; send it faster") from None
            if message["type"] == "http.disconnect":
                raise ClientLeft
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)
            if is_engine:  # weights are large: such a client, who has the token, has the time for each part
                deadline = time.monotonic() + seconds

    def _check_access(self, path: str, headers: dict[bytes, bytes]) -> None:
        settings = self.settings
        if settings.token is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if not is_local(name.strip("[]")):  # a page of the internet whose name a browser resolved to this machine
                raise Refused(403, "without a token only requests to localhost are answered; give the server a token")
        elif path not in OPEN_PATHS:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), settings.token.encode()):
                raise Refused(401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN")
        if path in ENGINE_PATHS and not settings.allow_updates:
            raise Refused(403, f"{path} is for the learner of a run; start the server with --allow_updates")

    async def _discard(self, scope: Scope, receive: Receive) -> None:
        """Read the rest of a refused body, within limits: a client that still sends would see a reset connection."""
        if dict(scope["headers"]).get(b"expect"):  # the client waits for the answer before it sends
            return
        size, deadline = 0, time.monotonic() + min(self.settings.client_timeout, 10.0)
        while size < DISCARDED_BYTES:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                return
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return


def _after(body: bytes, receive: Receive) -> Receive:
    """Return a function that receives the whole body first, and then what `receive` does."""
    bodies = [body]

    async def received() -> MutableMapping[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return received


def make_app(batcher: Batcher, settings: ServerSettings) -> Guard:
    """Return the ASGI app of a server.

    Args:
        batcher: The policy and its queue. Its `defaults` must have `max_new_tokens`.
        settings: Access and limits.
    """
    policy, lease, numbers = batcher.policy, Lease(), itertools.count()
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close(wait=False)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)  # the pages need other hosts

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> Response:
        return error_response(refused)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        path = f"{request.method} {request.url.path}"
        return error_response(Refused(error.status_code, f"{path}: {error.detail}; see docs/serving.md"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(Refused(500, f"the server failed with {type(error).__name__}; its output has the lines"))

    @app.exception_handler(ClientLeft)
    async def client_left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)

    @app.get("/")
    async def page() -> Response:
        return Response(PAGE, headers=HEADERS, media_type="text/html")

    @app.get("/health")
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

    async def answer(request: Request, is_chat: bool) -> Response:
        _check_content_type(request)
        data = await request.body()
        asked = read_request(data, policy, batcher.defaults, settings.limits, name=settings.name, is_chat=is_chat)
        number = next(numbers)
        rows, scores = await _completed(request, batcher, settings, asked, number)
        versions = tuple(sorted({row.weights_version for row in rows}))
        choices = [choice(policy, row, asked) for row in rows]
        answered = Answered(asked, settings.name, number, int(time.time()), versions, choices, scores)
        if not asked.stream:
            return json_response(response(policy, answered))
        return Response("".join(events(policy, answered)), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, is_chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, is_chat=True)

    async def engine(request: Request) -> Response:
        function = ENGINE_PATHS[request.url.path]
        job = Call(partial(function, lease, await request.body()))
        (data,) = await finished(request, batcher, [job], settings.timeout, first=True)
        return Response(data, media_type="application/octet-stream")

    for path in ENGINE_PATHS:
        app.add_api_route(path, engine, methods=["POST"])
    weight_bytes = 4 * sum(tensor.numel() for tensor in policy.module.state_dict().values()) + WEIGHTS_MARGIN
    return Guard(app, settings, weight_bytes=weight_bytes)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "dllm_rl"}


def _check_content_type(request: Request) -> None:
    """Raise Refused for forms and plain text, which a page of the internet may send without the browser's question."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"Content-Type is {kind or 'missing'}; send application/json")


async def _completed(
    request: Request, batcher: Batcher, settings: ServerSettings, asked: TextRequest, number: int
) -> tuple[list[Rollout], list[PromptScores]]:
    """Return the completions of a request, `n` for each prompt, and the scores of the prompts if they are asked for."""
    key = (settings.seed, "request", number) if asked.seed is None else (asked.seed,)
    seeds = row_seeds(generator_for(*key), len(asked.prompts) * asked.n).tolist()  # those of `dllm-rl sample`
    sampling = sampler_settings(batcher.policy, asked, batcher.defaults)
    prompts = [ids for ids in asked.prompts for _ in range(asked.n)]
    jobs = [Completion(ids, seed, sampling) for ids, seed in zip(prompts, seeds, strict=True)]
    if not asked.score_prompt:
        return await finished(request, batcher, jobs, settings.timeout), []

    def sample_and_score(policy: Policy) -> tuple[list[Rollout], list[PromptScores]]:
        keywords = batcher.defaults | read_settings(policy, dict(sampling))
        size = batcher.max_batch_size
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        rows = [row for batch in batches for row in sample_rows(policy, keywords, batch)]
        return rows, [score_prompt(policy, ids) for ids in asked.prompts]

    (both,) = await finished(request, batcher, [Call(sample_and_score)], settings.timeout)
    return both


async def finished(
    request: Request, batcher: Batcher, jobs: Sequence[Job], timeout: float, *, first: bool = False
) -> list[Any]:
    """Submit jobs and return their results. Drop them if the client leaves or the time is over.

    Args:
        request: Request, whose connection is watched.
        batcher: Queue of the jobs.
        jobs: Jobs of the request.
        timeout: Seconds to wait.
        first: Whether the jobs run before those that wait.

    Raises:
        Refused: The queue is full, the time is over, the server stops, or a job failed.
        ClientLeft: The client has closed the connection.
    """
    try:
        batcher.submit(jobs, first=first)
    except QueueFull:
        advice = "ask again later, or raise --max_waiting"
        raise Refused(429, f"the queue of {batcher.max_waiting} completions is full; {advice}") from None
    except ShuttingDown:
        raise Refused(503, "the server is stopping; ask another one") from None
    everything = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs), return_exceptions=True)
    client_leaves = asyncio.ensure_future(_left(request))
    events_to_await: set[asyncio.Future[Any]] = {everything, client_leaves}
    try:
        await asyncio.wait(events_to_await, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            if client_leaves.done():
                raise ClientLeft
            if any(job.future.running() or job.future.done() for job in jobs):
                raise Refused(504, f"not finished within {timeout:g} s; ask for fewer tokens, or raise --timeout")
            raise Refused(503, f"no turn within {timeout:g} s; ask again later, or raise --timeout")
    finally:
        client_leaves.cancel()
        if not everything.done():
            everything.add_done_callback(_ignored)
            everything.cancel()
            batcher.cancel(jobs)
    results = everything.result()
    for result in results:
        if isinstance(result, BaseException):
            raise refusal_of(result) from None
    return results


def _ignored(cancelled: "asyncio.Future[Any]") -> None:
    """Read the outcome of jobs that nobody waits for, which asyncio would print."""
    if not cancelled.cancelled():
        cancelled.exception()


async def _left(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal_of(error: BaseException) -> Refused:
    """Return the error of a job as that of its request. An unexpected one is also printed, in one line."""
    if isinstance(error, ShuttingDown):
        return Refused(503, "the server is stopping; ask another one")
    if isinstance(error, Conflict):
        return Refused(409, str(error))
    if isinstance(error, ValueError):
        return Refused(400, str(error))
    print(f"error: {type(error).__name__}: {line_of(error)}", file=sys.stderr)
    if isinstance(error, torch.OutOfMemoryError):
        return Refused(500, "the device has too little memory for this batch; start with a smaller --max_batch_size")
    return Refused(500, f"the sampler failed with {type(error).__name__}; the server's output has the line")


class TimedProtocol(H11Protocol):
    """A connection of uvicorn, which also ends if a request's headers do not arrive in time."""

    header_seconds = 30.0
    header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self.header_timer is None:
            self.header_timer = self.loop.call_later(self.header_seconds, self._headers_late)

    def _stop_timer(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def _headers_late(self) -> None:
        self.header_timer = None
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            return
        text = f"the headers did not arrive within {self.header_seconds:g} s; send them faster"
        body = json.dumps(Refused(408, text).body()).encode()
        head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()


class EscapedFormatter(logging.Formatter):
    """Formatter of uvicorn's warnings and errors, whose text may quote a request."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record), keep="\n\t")


LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"escaped": {"()": EscapedFormatter}},
    "handlers": {"screen": {"class": "logging.StreamHandler", "formatter": "escaped"}},
    "loggers": {"uvicorn": {"handlers": ["screen"], "level": "WARNING", "propagate": False}},
}


class Server(uvicorn.Server):
    """uvicorn's server, which refuses the waiting jobs when it is told to stop, and finishes the running batch."""

    def __init__(self, batcher: Batcher, settings: ServerSettings) -> None:
        protocol = type("Protocol", (TimedProtocol,), {"header_seconds": settings.client_timeout})
        config = uvicorn.Config(
            make_app(batcher, settings),
            http=protocol,
            ws="none",
            lifespan="on",
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


def check_access(host: str, settings: ServerSettings) -> None:
    """Raise ValueError for a server that strangers could use."""
    if settings.allow_updates and settings.token is None:
        raise ValueError("allow_updates lets requests replace the weights, and needs a token: give --token_file")
    if not is_local(host) and settings.token is None:
        raise ValueError(f"host={host!r} is open to other machines, and needs a token: give --token_file FILE")


def is_local(host: str) -> bool:
    """Return whether a name or an address means this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False
