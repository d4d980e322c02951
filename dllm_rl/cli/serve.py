"""`dllm-rl serve`: answer requests for completions over HTTP."""

import argparse
import errno
import os
import socket
import sys
from typing import Any

from dllm_rl.cli.options import open_policy, read_methods
from dllm_rl.cli.run_settings import sampler_of
from dllm_rl.cli.sample import passed_options
from dllm_rl.integrations.serving.batching import Batcher
from dllm_rl.integrations.serving.engine import TOKEN_VARIABLE, read_token
from dllm_rl.integrations.serving.server import Server, check_access_settings
from dllm_rl.integrations.serving.settings import ServerSettings
from dllm_rl.models.base import Policy
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import Scheme
from dllm_rl.samplers import Sampler, Unmask
from dllm_rl.samplers.unmask import check_number_of_steps
from dllm_rl.samplers.with_settings import sampler_with
from dllm_rl.screen import escape_controls


def serve_command(arguments: argparse.Namespace) -> None:
    """Serve a model until a signal ends the process.

    Raises:
        ValueError: An option is out of its range, or the server would be open to other machines without a token.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    if arguments.token_file is not None:
        token = read_token(arguments.token_file)
    settings = ServerSettings(
        name=arguments.name or arguments.model,
        token=token,
        allow_updates=arguments.allow_updates,
        max_tokens=arguments.max_tokens,
        max_waiting=arguments.max_waiting,
        max_body_bytes=arguments.max_body_bytes,
        timeout=arguments.timeout,
        client_timeout=arguments.client_timeout,
        seed=arguments.seed,
    )
    check_access_settings(arguments.host, settings)
    passed = passed_options(arguments)
    if arguments.max_new_tokens == 0:
        raise ValueError("max_new_tokens=0 fills in a prompt, which the server does not do; give at least 1")
    (scheme,) = read_methods(Scheme, "quantization", [arguments.quantization], arguments.fields)
    run_sampler = sampler_of(arguments.model)
    # Before the model is loaded, so that a port in use is known at once.
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    with listening(arguments.host, arguments.port, family) as listener:
        policy = open_policy(arguments)
        learner = policy if arguments.allow_updates else None
        if scheme is not None:
            policy = quantized_copy(policy, scheme)
        defaults = served_sampler(policy, run_sampler, passed)
        check_number_of_steps(defaults)
        batcher = Batcher(
            policy,
            defaults,
            max_batch_size=arguments.max_batch_size,
            max_waiting=arguments.max_waiting,
            exact_batches=arguments.exact_batches,
        )
        try:
            server = Server(batcher, settings, learner)
            host, port = listener.getsockname()[:2]
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(escape_controls(f"{settings.name} at {address}/v1"), file=sys.stderr, flush=True)
            server.run(sockets=[listener])
        finally:
            batcher.close()


def listening(host: str, port: int, family: socket.AddressFamily) -> socket.socket:
    """Return a socket that listens on a port of a host.

    Raises:
        ValueError: This is not possible.
    """
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = "another program uses it" if error.errno == errno.EADDRINUSE else error
        raise ValueError(f"{host}, port {port}: {reason}; give another --host or --port") from None


def served_sampler(policy: Policy, run_sampler: Sampler | None, passed: dict[str, Any]) -> Sampler:
    """Return the sampler of requests that set nothing: the run's, or the default of `sample`, with passed settings."""
    if isinstance(run_sampler, Unmask):
        run_sampler = run_sampler.replace(compile_step=False)  # it would compile a graph for each shape of a batch
        if run_sampler.max_new_tokens == 0:  # the run fills in blanks of prompts, which the server does not do
            run_sampler = run_sampler.replace(max_new_tokens=16, diffusion_steps=None)
    return sampler_with(policy, run_sampler, passed)
