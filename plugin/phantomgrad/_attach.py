"""Where to attach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from phantomgrad._attachment import Attachment as Attachment
from phantomgrad._attachment import attachment_of as attachment_of
from phantomgrad._bound import module_path
from phantomgrad._errors import AttachError
from phantomgrad._fixed_point import OnStep, Settings
from phantomgrad._report import OnFailure
from phantomgrad.gradients import Gradient, UnrolledPhantom
from phantomgrad.solvers import FixedPointIteration, Solver

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""The modes of `torch.compile`."""


def attach(
    module: nn.Module,
    gradient: Gradient | None = None,
    *,
    solver: Solver | None = None,
    state: int | str = 0,
    output: int | str | None = None,
    batch_dim: int | None = 0,
    eval_solver: Solver | None = None,
    on_failure: OnFailure = "warn",
    on_step: OnStep | None = None,
    compile: bool | str = False,
    process_group: Any = None,
    batched_inputs: Sequence[int | str] | None = None,
) -> Attachment:
    """Make `module` return its equilibrium: `module(z0, x)` now solves `z = forward(z, x)` from `z0`.

    The call convention, `state_dict`, parameters, `type` and `repr` stay as they are; `remove()` undoes it.

    gradient: which gradient the solution carries; `UnrolledPhantom()` by default.
    solver: how the equilibrium is found; `FixedPointIteration()` by default.
    state: which argument is the state, a position or a keyword.
    output: which part of a larger return value is the new state, a position or key; the rest comes back from the
        recorded evaluation.
    batch_dim: the dimension along which `forward` treats samples independently; each then stops by itself. None if it couples
        them (graphs, sequences first, batch statistics).
    eval_solver: the solver where grad mode is off; `solver` by default.
    on_failure: "warn" (once; a non-finite state raises), "raise", or "ignore" (the best finite iterate).
    on_step: called as `on_step(step, image, residual)` after each check of the solver. Samples for which it returns True (a
        bool tensor of shape (samples,)) stop at this image and count as converged: a test of your own beside the residual.
        `Backprop`, whose steps are all differentiated, stops none.
    compile: compile the cell with `torch.compile`, for solver and gradient alike. One of its modes, such as "reduce-overhead"
        (CUDA graphs), holds for the evaluations of the solve, of which nothing is recorded.
    process_group: processes that must stop and fail together (FSDP units or SyncBatchNorm inside the cell).
    batched_inputs: which further inputs, by position or keyword, have `batch_dim` too, all tensors in them. A solve then does not
        evaluate samples that have converged, with the same results. None leaves it unsaid: all are evaluated to the end.

    Raises AttachError if the module is attached already, is no module, or has no such argument.
    """
    if not isinstance(module, nn.Module):
        raise AttachError(
            f"attach takes an nn.Module, got {describe_type(module)}. For a function use fixed_point or @equilibrium."
        )
    if isinstance(module.__dict__.get("forward"), Attachment) and not is_attached(module):
        raise AttachError(
            f"{module_path(module)} is a shallow copy of an attached module and would run the original. Use copy.deepcopy, or "
            "remove() the attachment before copying."
        )
    if is_attached(module):
        raise AttachError(
            f"{module_path(module)} is attached already. Change it by assignment (attachment.gradient = ..., "
            "attachment.solver = ...; attachments(model) yields every attachment), or remove() it first."
        )
    if isinstance(output, bool) or not isinstance(output, int | str | None):
        raise TypeError(f"output must be a position, a key or None, got {output!r}.")
    if not isinstance(compile, bool) and compile not in MODES:
        kind = ValueError if isinstance(compile, str) else TypeError
        raise kind(f"compile must be True, False or a mode of torch.compile ({', '.join(MODES)}), got {compile!r}.")
    settings = Settings(
        gradient=UnrolledPhantom() if gradient is None else gradient,
        solver=FixedPointIteration() if solver is None else solver,
        eval_solver=eval_solver,
        batch_dim=batch_dim,
        on_failure=on_failure,
        on_step=on_step,
        process_group=process_group,
        batched_inputs=batched_inputs,
    )
    if compile and settings.batched_inputs is not None:
        raise ValueError(
            "batched_inputs lets converged samples be dropped from the batch, and with compile=True every size of it would be "
            "compiled anew. Leave out one of the two."
        )
    return Attachment(module, settings, state=state, output=output, compile=compile)


def is_attached(module: nn.Module) -> bool:
    """Whether `module` itself returns its equilibrium."""
    return attachment_of(module) is not None


def attachments(model: nn.Module) -> Iterator[Attachment]:
    """Every attachment in `model`, in the order of its modules."""
    for module in model.modules():
        attachment = attachment_of(module)
        if attachment is not None:
            yield attachment


def describe_type(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
