"""The Hub's client: its errors by kind, and another try where one may help.

`huggingface_hub` is imported at the first use: it reads its environment then, and users of a local checkpoint need not have it.
"""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from types import ModuleType
from typing import Any, TypeVar

from phantomgrad_hub.extras import require

T = TypeVar("T")

TRIES = 5
UNCONNECTED_TRIES = 2
"""Where not even a connection comes about: whoever is offline should not wait to be told so."""
FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0
"""Seconds before the second try, which double from try to try, and the longest that is waited for one."""
PATIENCE = 60.0
"""Seconds after which no further try is begun: the client itself waits and tries again in some cases."""
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


def hub() -> ModuleType:
    """`huggingface_hub`."""
    return require("huggingface_hub")


def errors() -> ModuleType:
    """`huggingface_hub.errors`."""
    return require("huggingface_hub.errors")


def _http() -> Any:
    """The client's HTTP library: httpx, or its successor in newer clients."""
    base = next(kind for kind in errors().HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return importlib.import_module(base.__module__.split(".")[0])


def transport_error() -> type[Exception]:
    """What the client's HTTP library raises where no answer came."""
    return _http().TransportError


def chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what led to it, the outermost first."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def status(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with; None where it did not answer."""
    answer = _answer(error)
    return None if answer is None else answer.status_code


def is_forbidden(error: BaseException) -> bool:
    """Whether the Hub has refused for want of a right (403), also where the client then asked for something else."""
    refused = errors().HfHubHTTPError
    return any(isinstance(entry, refused) and _answer(entry).status_code == 403 for entry in chain(error))


def seconds_to_wait(error: BaseException) -> float | None:
    """What `Retry-After` of the Hub's answer asks for."""
    answer = _answer(error)
    text = "" if answer is None else answer.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else None


def _answer(error: BaseException) -> Any:
    """The response with which the Hub refused; None where it did not answer."""
    refused = errors().HfHubHTTPError
    return next((getattr(entry, "response", None) for entry in chain(error) if isinstance(entry, refused)), None)


def is_unreachable(error: BaseException) -> bool:
    """Whether the Hub could not be reached, or is out of order: a copy in the cache may then stand in."""
    if (answered := status(error)) is not None:
        return answered in _TRANSIENT and answered != 429
    unreachable = (errors().OfflineModeIsEnabled, transport_error())
    return any(isinstance(entry, unreachable) for entry in chain(error))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if (answered := status(error)) is not None:
        return answered in _TRANSIENT
    if any(isinstance(entry, errors().OfflineModeIsEnabled) for entry in chain(error)):
        return False
    return any(isinstance(entry, (transport_error(), JSONDecodeError)) or _ended_early(entry) for entry in chain(error))


def _is_unconnected(error: BaseException) -> bool:
    return any(isinstance(entry, _http().ConnectError) for entry in chain(error))


def _ended_early(error: BaseException) -> bool:
    """The client's own check of a body that is shorter than its header says is a bare OSError."""
    return type(error) is OSError and str(error).startswith("Consistency check")


def retried(call: Callable[[], T], *, tries: int | None = None) -> T:
    """The result of `call`, tried again with growing waits where its error is transient; its last error otherwise."""
    begun = time.monotonic()
    for attempt in range(tries or TRIES):
        try:
            return call()
        except Exception as error:
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.75, 1.25)
            if (asked := seconds_to_wait(error)) is not None:
                wait = asked
            out_of_time = time.monotonic() - begun + wait > PATIENCE
            most = UNCONNECTED_TRIES if _is_unconnected(error) else TRIES
            if attempt + 1 >= min(tries or TRIES, most) or out_of_time or not is_transient(error):
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")
