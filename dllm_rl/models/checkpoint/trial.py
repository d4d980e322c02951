"""The script that `untrusted.try_out` starts: it uses an untrusted tokenizer or chat templates, within limits.

It reads {"tokenizer": the path of a tokenizer.json, or null; "templates": texts; "tokens": the tokenizer's special
tokens; "limits": {"seconds" of processor time after the imports, "memory": bytes of address space}} as JSON. It ends
with 0, or with 1 and the reason as the last line of standard error, or by a limit's signal.
"""

import json
import string
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

MAX_TRIAL_LENGTH = 200  # characters of a string that is tried
MAX_TOTAL_LENGTH = 100_000  # characters of all strings that are tried
# Largest number of tokens per character, and of characters of the decoded text per character of the tokens.
MAX_GROWTH = 100
MAX_RENDERED_LENGTH = 100_000  # characters that a template may write for a short chat
USER = {"role": "user", "content": "1+1="}
# Errors of a template, in addition to jinja2's own: its expressions run as Python code does.
TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
CHATS = [[USER], [{"role": "system", "content": "Add."}, USER, {"role": "assistant", "content": "2"}, USER]]


def main() -> None:
    """Run the tokenizer or the templates that standard input names."""
    request = json.load(sys.stdin)
    if request["tokenizer"]:
        from tokenizers import Tokenizer

        limit(**request["limits"])
        content = Path(request["tokenizer"]).read_text(encoding="utf-8")
        use_tokenizer(Tokenizer.from_str(content), list(trial_texts(json.loads(content))))
    if request["templates"]:
        # transformers later runs the template with this function too: the same variables in the same sandbox.
        from transformers.utils.chat_template_utils import render_jinja_template

        limit(**request["limits"])
        for template, add_generation_prompt in product(request["templates"], (False, True)):
            use_template(
                render_jinja_template,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                **request["tokens"],
            )


def limit(seconds: int, memory: int) -> None:
    """Make the kernel end the process after `seconds` more of processor time, and limit its memory."""
    import resource  # not at the top: Windows lacks it, and also imports TEMPLATE_ERRORS

    until = int(time.process_time()) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (until, until))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def trial_texts(fields: dict[str, Any]) -> Iterator[str]:
    """Yield short texts: each string in the tokenizer's pipeline, and each ASCII character, once and 64 times."""
    named = {
        text
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        for text in strings(fields.get(part))
    }
    length_left = MAX_TOTAL_LENGTH
    for text in [string.printable, *sorted(named, key=len), *string.printable]:
        if len(text) <= MAX_TRIAL_LENGTH and length_left > 0:
            yield text
            yield text * 64
            length_left -= 65 * len(text)


def strings(fields: Any) -> Iterator[str]:
    """Yield all strings of JSON, at any depth, that are not names of fields."""
    if isinstance(fields, str):
        yield fields
    elif isinstance(fields, dict | list):
        for value in fields.values() if isinstance(fields, dict) else fields:
            yield from strings(value)


def use_tokenizer(tokenizer: Any, texts: list[str]) -> None:
    """Encode the texts. Decode the results, and every token of the vocabulary. Raise OverflowError above MAX_GROWTH."""
    for text in texts:
        if tokenizer.normalizer and len(tokenizer.normalizer.normalize_str(text)) > MAX_GROWTH * len(text):
            raise OverflowError(
                f"the normalizer makes the {len(text)} characters {text[:40]!r} {MAX_GROWTH} times as long"
            )
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises the bare class for a character outside the vocabulary
                raise
            continue
        if len(ids) > MAX_GROWTH * len(text):
            raise OverflowError(f"{len(ids)} tokens for the {len(text)} characters {text[:40]!r}")
        decode(tokenizer, ids)
    vocabulary_ids = sorted(tokenizer.get_vocab().values())
    for first in range(0, len(vocabulary_ids), 1000):
        decode(tokenizer, vocabulary_ids[first : first + 1000])


def decode(tokenizer: Any, ids: list[int]) -> None:
    """Decode ids. Raise OverflowError above MAX_GROWTH."""
    length = sum(len(tokenizer.id_to_token(number) or "") for number in ids)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if len(text) > MAX_GROWTH * (length + 1):
        raise OverflowError(f"{len(text)} characters decoded from tokens of {length}")


def use_template(render: Any, **options: Any) -> None:
    """Render CHATS. Raise OverflowError on a long text, MemoryError, or jinja2's SecurityError."""
    from jinja2.exceptions import SecurityError, TemplateError

    for chat in CHATS:
        try:
            (text,), _ = render([chat], **options)
        except SecurityError:  # a kind of TemplateError
            raise
        except (TemplateError, *TEMPLATE_ERRORS):  # a template may support only other kinds of messages
            continue
        if len(text) > MAX_RENDERED_LENGTH:
            raise OverflowError(f"{len(text)} characters for a conversation of {len(chat)} messages")


if __name__ == "__main__":
    main()
