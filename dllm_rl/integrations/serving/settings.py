"""The settings of a server."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServerSettings:
    """Access and limits of a server.

    Args:
        name: Name of the model in requests and responses.
        token: Token that requests must send. None: no token is needed, but only requests to localhost are answered.
        allow_updates: Whether requests with the token may replace the weights.
        max_tokens: Largest number of tokens of a completion.
        max_waiting: Largest number of waiting completions of all requests, and so of one request.
        max_body_bytes: Largest size of a request's body.
        timeout: Seconds until a request must be finished, including its time in the queue.
        client_timeout: Seconds that a client has to send a request's headers, and then its body.
        seed: Seed of the server. A request without a seed gets one derived from it and from the request's number.
    """

    name: str
    token: str | None = field(default=None, repr=False)
    allow_updates: bool = False
    max_tokens: int = 1024
    max_waiting: int = 256
    max_body_bytes: int = 2**20
    timeout: float = 300.0
    client_timeout: float = 30.0
    seed: int = 0
