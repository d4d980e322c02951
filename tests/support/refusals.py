"""What a call's error must say: a line that names the field, the value, and the remedy where there is one."""

import inspect
import re
from collections.abc import Callable

import pytest


def refuses(said: str, call: Callable[[], object], error: type[Exception] = ValueError) -> None:
    """The call raises the error, and the regular expression finds it, in one line unless it has "\\\\n" itself."""
    __tracebackhide__ = True
    with pytest.raises(error, match=said) as caught:
        call()
    assert "\n" not in str(caught.value).strip() or r"\n" in said or "(?s)" in said


def refused(*rows: tuple, by: Callable[..., object] | None = None, error: type[Exception] = ValueError):
    """A test with a case for each row: the arguments of `by` (or the call itself), and what its error must say, which
    is the case's name too. Further parameters of the call are fixtures."""

    @pytest.mark.parametrize("row", rows, ids=["-".join(re.findall(r"\w+", row[-1])) for row in rows])
    def test(row, request):
        *arguments, said = row
        call = by or arguments.pop(0)
        names = [*inspect.signature(call).parameters][len(arguments) :]
        fixtures = {name: request.getfixturevalue(name) for name in names}
        refuses(said, lambda: call(*arguments, **fixtures), error)

    return test
