"""A request to a server that makes rollouts."""

import http.client
from collections.abc import Mapping
from urllib.parse import urlsplit

CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}


def check_url(url: str) -> None:
    """Raise ValueError unless `url` is the address of a server."""
    parts = urlsplit(url)
    if parts.scheme not in CONNECTIONS or not parts.hostname:
        raise ValueError(f"url={url!r} is not the address of a server; give http://HOST:PORT")


def request(
    url: str,
    path: str,
    body: bytes | None,
    headers: Mapping[str, str],
    *,
    timeout: float,
    program: str,
    method: str = "POST",
) -> tuple[int, bytes]:
    """Send a request to `path` of the server at `url`, and return the status and the body of the response.

    Args:
        timeout: Seconds to wait for the response.
        program: What runs at the address, for the error message.

    Raises:
        ValueError: `url` is not the address of a server.
        ConnectionError: The server is not reachable, or does not respond in time.
    """
    check_url(url)
    parts = urlsplit(url)
    connection = CONNECTIONS[parts.scheme](parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request(method, parts.path.rstrip("/") + path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"rollout_engine: {url}{path}: {type(error).__name__} {error}; is {program} running there?"
        ) from error
    finally:
        connection.close()
