"""A tokenizer's chat template, without the time of day."""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dllm_rl.models.base import Tokenizer

# The time that a chat template may read: one that never passes, so that a row is always the same prompt. Templates of
# Llama write this day where they have no clock.
TEMPLATE_TIME = datetime(2024, 7, 26)
_CLOCK = re.compile(
    r"""\bstrftime_now\s*\(\s*(?:(?:format\s*=\s*)?(["'])((?:(?!\1)[^\\])*)\1\s*\))?"""
)  # quote, format
# Errors of a chat template, in addition to jinja2's own: its expressions run as Python code does.
TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def fixed_template(tokenizer: Tokenizer, tools: Any = None) -> dict[str, Any]:
    """Return arguments of `apply_chat_template` with which a row is the same prompt at each call: none, or a template
    that writes TEMPLATE_TIME where the tokenizer's own reads the clock.

    Raises:
        ValueError: The template draws at random, or computes the format of the time that it writes.
    """
    template = str(tokenizer.chat_template)
    if drawn := re.search(r"\|\s*random\b|\blipsum\b", template):
        raise ValueError(
            f"chat_template draws at random ({drawn[0]}), so that a row is another prompt at each call; correct it"
        )
    if not _CLOCK.search(template):
        return {}
    if isinstance(tokenizer.chat_template, Mapping):
        template = str(tokenizer.get_chat_template(tools=tools))
    fixed = _CLOCK.sub(lambda call: json.dumps(TEMPLATE_TIME.strftime(call[2])) if call[1] else call[0], template)
    if computed := _CLOCK.search(fixed):
        raise ValueError(
            f"chat_template reads the clock, {template[computed.start() :][:40]!r}, so that a row is another prompt at "
            "another time; write the time as text there"
        )
    return {"chat_template": fixed}
