"""What diagnostics refuse or warn of: bad input, and cells that do not settle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from known_jacobians import Tanh, linear_map
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import NotConvergedError, NotConvergedWarning, attach
from phantomgrad.diagnostics import (
    ascent_condition,
    gradient_alignment,
    jacobian_penalty,
    phantom_error,
    spectral_radius,
)


@pytest.mark.parametrize("measure", [spectral_radius, phantom_error, gradient_alignment, ascent_condition])
def test_a_cell_that_does_not_settle_is_never_measured_silently(measure: Callable[..., object]) -> None:
    cell = Tanh(size=1, inputs=1)
    with torch.no_grad():
        cell.recurrent.weight.fill_(-1.5)
        cell.recurrent.bias.zero_()
        cell.inputs.bias.zero_()
        cell.inputs.weight.fill_(0.1)
    start, x = torch.zeros(2, 1, dtype=DTYPE), torch.ones(2, 1, dtype=DTYPE)
    with pytest.warns(NotConvergedWarning, match=r"2 of 2 samples are above .* or pass on_failure=\"ignore\""):
        measure(cell, start, x)
    measure(cell, start, x, on_failure="ignore")
    with pytest.raises(NotConvergedError, match="2 of 2 samples"):
        measure(cell, start, x, on_failure="raise")
    with pytest.raises(ValueError, match=r"^on_failure must be one of 'warn', 'raise', 'ignore', got 'no'\.$"):
        measure(cell, start, x, on_failure="no")
    with attach(cell, on_failure="ignore"):
        measure(cell, start, x)
        with pytest.raises(NotConvergedError):
            measure(cell, start, x, on_failure="raise")


def test_a_solve_that_fails_warns_as_the_attachment_would() -> None:
    expanding = linear_map(1.5 * torch.eye(3, dtype=DTYPE))
    start = torch.ones(2, 3, dtype=DTYPE)
    with pytest.warns(NotConvergedWarning, match="did not converge"):
        found = spectral_radius(expanding, start)
    assert float(found) == pytest.approx(1.5)

    class Expanding(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 1.5 * z

    module = Expanding()
    attachment = attach(module, on_failure="ignore")
    assert float(spectral_radius(module, start)) == pytest.approx(1.5)
    assert attachment.unconverged == 0


def _start() -> Tensor:
    return torch.zeros(2, 3, dtype=DTYPE)


def _attached() -> nn.Module:
    cell = Tanh(3)
    attach(cell, batch_dim=None)
    return cell


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: spectral_radius("cell", _start()), TypeError, "Diagnostics take an nn.Module, its attachment or a function f(z, *inputs), got a str."),  # type: ignore[arg-type]
        (lambda: spectral_radius(Tanh, _start()), TypeError, "Diagnostics take an nn.Module, its attachment or a function f(z, *inputs), got the class Tanh."),
        (lambda: spectral_radius(Tanh()), ValueError, "Pass the cell's arguments after it: the start of the solve, then its further inputs."),
        (lambda: spectral_radius(torch.tanh, _start(), state=1), ValueError, "A function takes its state first, so state=1 is for modules only."),
        (lambda: spectral_radius(torch.tanh, kwargs={"input": _start()}), ValueError, "A function takes its state first: pass it by position, before kwargs."),
        (lambda: spectral_radius(torch.tanh, torch.zeros(2, 3, dtype=torch.complex64)), ValueError, "Diagnostics work on real states, got (2, 3) complex64 on cpu. Let the cell take torch.view_as_real of its state."),
        (lambda: spectral_radius(torch.tanh, torch.zeros(0, 3)), ValueError, "The state is empty: (0, 3) float32 on cpu. Pass a batch with at least one sample."),
        (lambda: spectral_radius(_attached(), _start(), _start(), batch_dim=1), ValueError, "Tanh is attached with batch_dim=None, so batch_dim=1 cannot hold. Leave batch_dim out, or attach it again."),
        (lambda: spectral_radius(_attached(), _start(), _start(), state="x"), ValueError, "Tanh is attached with state='z', so state='x' cannot hold. Leave state out, or attach it again."),
        (lambda: spectral_radius(torch.tanh, _start(), damping=0), ValueError, "damping of RadiusOptions must be a finite number above 0.0 and at most 2.0, got 0."),
        (lambda: spectral_radius(torch.tanh, _start(), max_products=0), ValueError, "max_products of RadiusOptions must be an integer of at least 1, got 0."),
        (lambda: phantom_error(torch.tanh, _start(), norm="2"), ValueError, "norm of ErrorOptions must be one of 'spectral', 'frobenius', got '2'."),  # type: ignore[arg-type]
        (lambda: phantom_error(torch.tanh, _start(), steps=0), ValueError, "steps of ErrorOptions must be an integer of at least 1, got 0."),
        (lambda: gradient_alignment(torch.tanh, _start()), ValueError, "There is nothing to take gradients for: no parameter requires grad and no further input is a floating-point tensor. For a function that has captured its parameters, pass parameters={'name': tensor}."),
        (lambda: gradient_alignment(Tanh(3), _start(), _start(), cotangent=torch.zeros(3)), ValueError, "The cotangent must be nested and shaped like the state, (2, 3) float64 on cpu; got (3,) float32 on cpu."),
        (lambda: gradient_alignment(Tanh(3), _start(), _start(), loss=torch.sum, cotangent=_start()), ValueError, "Pass loss or cotangent, not both: the cotangent is the loss's gradient at the solution."),
        (lambda: gradient_alignment(Tanh(3), _start(), _start(), loss=lambda z: z), ValueError, "loss must map the state to a scalar tensor that depends on it; it returned (2, 3) float64 on cpu."),
        (lambda: gradient_alignment(Tanh(3), _start(), _start(), loss=lambda z: 1.0), ValueError, "loss must map the state to a scalar tensor that depends on it; it returned a float."),  # type: ignore[arg-type,return-value]
        (lambda: jacobian_penalty(Tanh(3), _start(), _start(), probes=0), ValueError, "probes of PenaltyOptions must be an integer of at least 1, got 0."),
    ],
)  # fmt: skip
def test_bad_input_is_answered_in_one_sentence(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'dampening'"):
        spectral_radius(torch.tanh, _start(), dampening=0.5)  # type: ignore[call-arg]
