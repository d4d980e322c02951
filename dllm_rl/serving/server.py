"""The HTTP server: OpenAI's completions and chat completions, and the endpoints of the rollout engine.

`Guard` checks access and reads the body of a request, within limits of size and time. The handlers of `make_app` then
parse the body, wait for the batcher, and write the response. User text is never printed by the server.
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
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dllm_rl.models.base import Policy
from dllm_rl.rng import generator_for, row_seeds
from dllm_rl.screen import escape_controls, line_of
from dllm_rl.serving.batching import (
    Batcher,
    CompletionJob,
    Job,
    PolicyCall,
    PromptScores,
    QueueFull,
    ShuttingDown,
    score_prompt,
)
from dllm_rl.serving.openai_api import (
    EMPTY,
    CompletedRequest,
    Limits,
    Refused,
    TextRequest,
    choice,
    events,
    read_request,
    response,
    sampler_of_request,
)
from dllm_rl.serving.page import HEADERS, PAGE
from dllm_rl.serving.updates import Conflict, Lease, compute_logits, sample_rollout, update_weights
from dllm_rl.types import Rollout

try:
    import h11
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    raise ImportError(f"dllm-rl serve needs {error.name}: pip install 'dllm_rl[serve]'") from None

ENGINE_PATHS = {"/weights": update_weights, "/rollouts": sample_rollout, "/logits": compute_logits}
MAX_ENGINE_BODY_BYTES = 2**28  # largest body of a request for /rollouts or /logits
MAX_WEIGHTS_HEADER_BYTES = 2**24  # a body for /weights may be this much larger than the weights in fp32
MAX_DISCARDED_BYTES = 2**26  # bytes of a refused request's body that are read and thrown away
SPARE_REQUESTS = 64  # requests that may be open in addition to a full queue
PUBLIC_PATHS = {"/", "/health"}  # need no token, because they reveal nothing about the model

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class ServerSettings:
    """Access and limits of a server.

    Args:
        name: Name of the model in requests and responses.
        token: Token that requests must send. None: no token is needed, but only requests to localhost are answered.
        allow_updates: Whether requests with the token may replace the weights.
        limits: Limits on a request for completions.
        max_body_bytes: Largest size of a request's body.
        timeout: Seconds until a request must be finished, including its time in the queue.
        client_timeout: Seconds that a client has to send a request's headers, and as many again to send its body.
        seed: Seed of the server. A request without a seed gets one derived from it and from the request's number.
    """

    name: str
    token: str | None = field(default=None, repr=False)
    allow_updates: bool = False
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = 2**20
    timeout: float = 300.0
    client_timeout: float = 30.0
    seed: int = 0


def error_response(refused: Refused, *, close: bool = False) -> Response:
    """Return an error in OpenAI's format. With `close`, the response also closes the connection."""
    headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
    if refused.status in (429, 503):
        headers["Retry-After"] = "1"
    if close:
        headers["Connection"] = "close"
    return json_response(refused.body(), refused.status, headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # json.dumps escapes non-ASCII characters. A tokenizer may decode to a lone surrogate, which UTF-8 cannot encode.
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


class Guard:
    """ASGI middleware that checks access and reads the body, within limits of size and time.

    Args:
        app: App that receives the requests with their whole body.
        settings: Access and limits.
        weight_bytes: Largest size of a body that updates the weights.
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
            if refused.status != 408:  # 408: the client was too slow already
                await self._discard(scope, receive)
            await error_response(refused, close=True)(scope, receive, send)  # type: ignore[arg-type]
            return
        except ClientDisconnect:
            return
        else:
            await self.app(scope, _replay_body(body, receive), send)
        finally:
            self.num_open -= 1

    async def _checked_body(self, scope: Scope, receive: Receive) -> bytes:
        """Check access, then read the body.

        Raises:
            Refused: The request has no access, or its body is too large or too slow.
            ClientDisconnect: The client has closed the connection.
        """
        headers = dict(scope["headers"])
        path = scope["path"]
        self._check_access(path, headers)
        if self.num_open > self.settings.limits.max_waiting + SPARE_REQUESTS:
            raise Refused(429, f"{self.num_open} requests are open; ask again later")
        is_engine = path in ENGINE_PATHS
        limit = self.settings.max_body_bytes
        if is_engine:
            limit = self.weight_bytes if path == "/weights" else MAX_ENGINE_BODY_BYTES
        advice = (
            "start the server with the same model as the training run"
            if is_engine
            else "send less, or raise --max_body_bytes"
        )
        too_large = Refused(413, f"the body has more than {limit} bytes; {advice}")
        if int(headers.get(b"content-length", b"0")) > limit:
            raise too_large
        body, seconds = bytearray(), self.settings.client_timeout
        try:
            async with asyncio.timeout(seconds) as deadline:
                async for part in Request(scope, receive).stream():
                    body += part
                    if len(body) > limit:
                        raise too_large
                    if is_engine:  # weights are large: such a client, which has the token, gets the time for each part
                        deadline.reschedule(asyncio.get_running_loop().time() + seconds)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {seconds:g} s; send it faster") from None
        return bytes(body)

    def _check_access(self, path: str, headers: dict[bytes, bytes]) -> None:
        settings = self.settings
        if settings.token is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if not is_local(name.strip("[]")):  # DNS rebinding: a web page whose host name resolves to this machine
                raise Refused(403, "without a token only requests to localhost are answered; give the server a token")
        elif path not in PUBLIC_PATHS:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), settings.token.encode()):
                raise Refused(401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN")
        if path in ENGINE_PATHS and not settings.allow_updates:
            raise Refused(403, f"{path} is for the learner of a run; start the server with --allow_updates")

    async def _discard(self, scope: Scope, receive: Receive) -> None:
        """Read the rest of a refused request's body and throw it away, within limits.

        A client that is still sending would otherwise see a reset connection in place of the error response.
        """
        if dict(scope["headers"]).get(b"expect"):  # the client waits for a response before it sends the body
            return
        size = 0
        with suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(min(self.settings.client_timeout, 10.0)):
                async for part in Request(scope, receive).stream():
                    size += len(part)
                    if size >= MAX_DISCARDED_BYTES:
                        return


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI `receive` function that first returns the whole body, and then calls `receive`."""
    unsent = [body]

    async def receive_body_first() -> MutableMapping[str, Any]:
        if unsent:
            return {"type": "http.request", "body": unsent.pop(), "more_body": False}
        return await receive()

    return receive_body_first


def make_app(batcher: Batcher, settings: ServerSettings, learner: Policy | None = None) -> Guard:
    """Return the ASGI app of a server.

    Args:
        batcher: Queue of the policy. Its `defaults` must have `max_new_tokens`.
        settings: Access and limits.
        learner: Policy that receives the weights of updates, if the batcher's policy is a quantized copy of it. None:
            the batcher's policy receives them.
    """
    policy, numbers = batcher.policy, itertools.count()
    lease = Lease(learner or policy)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close(wait=False)

    # FastAPI's docs pages are switched off, because they load scripts from other hosts.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> Response:
        return error_response(refused)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = f"{request.method} {request.url.path}"
        return error_response(Refused(error.status_code, f"{path}: {error.detail}; see docs/serving.md"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        kind = type(error).__name__
        return error_response(Refused(500, f"the server failed with {kind}; see the traceback in the server's output"))

    @app.exception_handler(ClientDisconnect)
    async def client_left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

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
        parsed = read_request(data, policy, batcher.defaults, settings.limits, name=settings.name, is_chat=is_chat)
        number = next(numbers)
        rollouts, scores = await _complete(request, batcher, settings, parsed, number)
        versions = {rollout.weights_version for rollout in rollouts} | {score.weights_version for score in scores}
        choices = [choice(policy, rollout, parsed) for rollout in rollouts] or [EMPTY] * len(scores) * parsed.fields.n
        completed = CompletedRequest(
            parsed, settings.name, number, int(time.time()), tuple(sorted(versions)), choices, scores
        )
        if not parsed.fields.stream:
            return json_response(response(policy, completed))
        return Response("".join(events(policy, completed)), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, is_chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, is_chat=True)

    async def engine(request: Request) -> Response:
        function = ENGINE_PATHS[request.url.path]
        job = PolicyCall(partial(function, lease, await request.body()))
        (data,) = await run_jobs(request, batcher, [job], settings.timeout, first=True)
        return Response(data, media_type="application/octet-stream")

    for path in ENGINE_PATHS:
        app.add_api_route(path, engine, methods=["POST"])
    weights = lease.learner.module.state_dict().values()
    weight_bytes = 4 * sum(tensor.numel() for tensor in weights) + MAX_WEIGHTS_HEADER_BYTES
    return Guard(app, settings, weight_bytes=weight_bytes)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "dllm_rl"}


def _check_content_type(request: Request) -> None:
    """Raise Refused unless the request declares JSON.

    Web pages of other sites may send forms and plain text to this server without a CORS preflight, but not JSON.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Refused(415, f"Content-Type is {content_type or 'missing'}; send application/json")


async def _complete(
    request: Request, batcher: Batcher, settings: ServerSettings, parsed: TextRequest, number: int
) -> tuple[list[Rollout], list[PromptScores]]:
    """Return a request's completions, `n` per prompt, and the log-probs of the prompts if requested."""
    key = (settings.seed, "request", number) if parsed.fields.seed is None else (parsed.fields.seed,)
    seeds = row_seeds(
        generator_for(*key), len(parsed.prompts) * parsed.fields.n
    ).tolist()  # as `dllm-rl sample` draws them
    sampling = sampler_of_request(batcher.policy, parsed, batcher.defaults)
    prompts = [ids for ids in parsed.prompts for _ in range(parsed.fields.n)]
    jobs: list[Job] = []
    if parsed.max_tokens:
        jobs += [CompletionJob(ids, seed, sampling, parsed.suffix) for ids, seed in zip(prompts, seeds, strict=True)]
    num_completions = len(jobs)
    if parsed.score_prompt:
        jobs += [PolicyCall(partial(score_prompt, ids=ids)) for ids in parsed.prompts]
    results: list[Any] = await run_jobs(request, batcher, jobs, settings.timeout)
    return results[:num_completions], results[num_completions:]


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
    try:
        batcher.submit(jobs, first=first)
    except QueueFull:
        advice = "ask again later, or raise --max_waiting"
        raise Refused(429, f"the queue of {batcher.max_waiting} completions is full; {advice}") from None
    except ShuttingDown:
        raise Refused(503, "the server is stopping; ask another one") from None
    all_jobs = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs), return_exceptions=True)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    awaited: set[asyncio.Future[Any]] = {all_jobs, disconnect}
    try:
        await asyncio.wait(awaited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not all_jobs.done():
            if disconnect.done():
                raise ClientDisconnect
            if any(job.future.running() or job.future.done() for job in jobs):
                raise Refused(504, f"not finished within {timeout:g} s; ask for fewer tokens, or raise --timeout")
            raise Refused(
                503, f"the request was still in the queue after {timeout:g} s; ask again later, or raise --timeout"
            )
    finally:
        disconnect.cancel()
        if not all_jobs.done():
            all_jobs.add_done_callback(_retrieve_exception)
            all_jobs.cancel()
            batcher.cancel(jobs)
    results = all_jobs.result()
    for result in results:
        if isinstance(result, BaseException):
            raise refusal_of(result) from None
    return results


def _retrieve_exception(future: "asyncio.Future[Any]") -> None:
    """Retrieve the exception of jobs that nobody waits for. Otherwise asyncio would log it as never retrieved."""
    if not future.cancelled():
        future.exception()


async def _wait_for_disconnect(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal_of(error: BaseException) -> Refused:
    """Convert the error of a job to the error response of its request. Also print an unexpected error, in one line."""
    if isinstance(error, ShuttingDown):
        return Refused(503, "the server is stopping; ask another one")
    if isinstance(error, Conflict):
        return Refused(409, str(error))
    if isinstance(error, ValueError):
        return Refused(400, str(error))
    print(f"error: {type(error).__name__}: {line_of(error)}", file=sys.stderr)
    if isinstance(error, torch.OutOfMemoryError):
        return Refused(500, "the device has too little memory for this batch; start with a smaller --max_batch_size")
    return Refused(500, f"the sampler failed with {type(error).__name__}; see the error in the server's output")


class TimedProtocol(H11Protocol):
    """uvicorn's connection, with a timeout for the headers of a request."""

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
        if self.conn.their_state is not h11.IDLE:  # the headers are complete
            self._stop_timer()
        elif self.header_timer is None:
            self.header_timer = self.loop.call_later(self.header_seconds, self._refuse_late_headers)

    def _stop_timer(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def _refuse_late_headers(self) -> None:
        self.header_timer = None
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            return
        text = f"the headers did not arrive within {self.header_seconds:g} s; send them faster"
        body = json.dumps(Refused(408, text).body()).encode()
        head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()


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


class Server(uvicorn.Server):
    """uvicorn's server. On shutdown it refuses the waiting jobs and finishes the running batch."""

    def __init__(self, batcher: Batcher, settings: ServerSettings, learner: Policy | None = None) -> None:
        protocol = type("Protocol", (TimedProtocol,), {"header_seconds": settings.client_timeout})
        config = uvicorn.Config(
            make_app(batcher, settings, learner),
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
