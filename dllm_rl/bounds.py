"""Bounds of keyword arguments: `bounded` declares them and checks each call; `check_bound` checks a partial."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from numbers import Integral, Real
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
# The numbers that float32, in which losses and distributions are computed, holds with all its digits. A smaller one
# would count as 0 or lose digits, a larger one as infinity.
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Bound:
    """The range of a number. A number that is not finite, or that float32 or int64 cannot hold, is never in range."""

    at_least: int | float | None = None
    above: int | float | None = None
    at_most: int | float | None = None
    below: int | float | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError if the value is outside the range. None is always valid."""
        if value is None:
            return
        if not issubclass(type(value), Real):  # mypy does not narrow Real to a number
            raise ValueError(f"{name}={value!r} must be a number")
        low = -math.inf if self.above is None else self.above
        high = math.inf if self.below is None else self.below
        inside = low < value < high  # NaN and the infinities fail here
        inside &= self.at_least is None or value >= self.at_least
        inside &= self.at_most is None or value <= self.at_most
        if not inside:
            verb = "lie" if str(self).startswith("in") else "be"
            is_finite = -math.inf < value < math.inf
            raise ValueError(f"{name}={value} must {verb} {self}" + ("" if is_finite else ", and be finite"))
        if isinstance(value, Integral):
            if abs(int(value)) > INT64_MAX:
                raise ValueError(f"{name}={value} must be an integer of 64 bits, at most {INT64_MAX}")
        elif value and not FLOAT32_MIN <= abs(value) <= FLOAT32_MAX:
            may_be_zero = low < 0 if self.at_least is None else self.at_least <= 0
            limits = f"{FLOAT32_MIN:.2g} to {FLOAT32_MAX:.2g}" + (", or 0" if may_be_zero else "")
            raise ValueError(f"{name}={value} must be a number that float32 can hold: {limits}")

    def __str__(self) -> str:
        """Format as `at least 1`, `above 0` or `in [0, 1)`."""
        low = f"({self.above}" if self.at_least is None else f"[{self.at_least}"
        if self.at_most is not None:
            return f"in {low}, {self.at_most}]"
        if self.below is not None:
            return f"in {low}, {self.below})"
        return f"above {self.above}" if self.at_least is None else f"at least {self.at_least}"


def bounded(
    check_all: Callable[[dict[str, Any]], None] | None = None, **bounds: Bound
) -> Callable[[Function], Function]:
    """Decorate a function so that each call checks its keyword arguments; those of the type int must be integers.

    Args:
        check_all: Function of the dict of all keywords, including defaults, that raises ValueError if they cannot be
            combined. None (default): no such check.
        **bounds: Bound of each keyword, by name.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            check_keywords(checked, keywords)
            return function(*arguments, **keywords)

        parameters = inspect.signature(function).parameters
        vars(checked)["integers"] = [name for name in bounds if parameters[name].annotation in (int, int | None)]
        vars(checked)["bounds"] = bounds  # read by the help text and by `check_bound`
        vars(checked)["check_all"] = check_all
        return cast(Function, checked)

    return decorate


def check_keywords(function: Callable, keywords: dict[str, Any]) -> None:
    """Raise ValueError if a keyword is outside the function's bounds, or is not an integer where it must be one."""
    for name, bound in getattr(function, "bounds", {}).items():
        if name in keywords:  # a default is within its bounds
            bound.check(name, value := keywords[name])
            if name in getattr(function, "integers", ()) and not isinstance(value, Integral | None):
                raise ValueError(f"{name}={value!r} must be an integer")
    if check_all := getattr(function, "check_all", None):
        parameters = inspect.signature(function).parameters.values()
        check_all({p.name: p.default for p in parameters if p.default is not p.empty} | keywords)


def check_bound(value: Any) -> None:
    """Raise ValueError if a partial, or a partial nested in it or in a tuple, binds a keyword outside its bounds."""
    if isinstance(value, partial):
        check_keywords(value.func, value.keywords)
        check_bound((*value.args, *value.keywords.values()))  # arguments may be partials too
    elif isinstance(value, tuple):
        for item in value:
            check_bound(item)
