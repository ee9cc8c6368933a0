"""What a solve must know of `torch.func`, forward-mode differentiation and `torch.compile`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor, maybe_current_level
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_OUTSIDE_THE_COMPILER = (
    "phantomgrad solves outside the compiler: compile the model without fullgraph=True and export it with strict=False; "
    "attach(..., compile=True) compiles the cell itself."
)


def outside_the_compiler(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, for which code that is being compiled pauses, once, and says why where it may not.

    What a solve does next depends on values, so the compiler would break its graph at every check.
    """
    eager = _disable_dynamo(function)  # unlike torch.compiler.disable, imports the compiler only where it is in use

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg=_OUTSIDE_THE_COMPILER)
            return eager(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def compiled(function: Callable[Arguments, Result], mode: str | None = None) -> Callable[Arguments, Result]:
    """`function`, compiled so that its backward can run several times, as the products with one evaluation do.

    torch counts how often it has compiled the same code, and after eight times runs it uncompiled: a class's `forward` for
    all of its instances together. So this is code of its own.
    """

    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return function(*args, **kwargs)

    alone.__code__ = alone.__code__.replace()
    fast = torch.compile(alone) if mode is None else torch.compile(alone, mode=mode)

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with keeping_buffers():
            return fast(*args, **kwargs)

    return call


def keeping_buffers() -> AbstractContextManager[Any]:
    """A context in which compiled functions do not hand over at the first backward what a second one needs.

    torch asks at compilation and at each backward.
    """
    import torch._functorch.config as functorch

    return functorch.patch(donated_buffer=False)


def is_vmapped(tensor: Tensor) -> bool:
    """Whether `torch.func.vmap` maps over this tensor, at any level."""
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return False


def in_function_transform() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return maybe_current_level() is not None


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def without_tangents() -> AbstractContextManager[Any]:
    """A context in which operations drop tangents, as `no_grad` drops graphs."""
    return forward_ad._set_fwd_grad_enabled(False) if in_forward_mode() else nullcontext()
