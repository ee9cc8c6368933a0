"""The states, modules and modes that every diagnostic takes: nested, attached or bare, with dropout, without grad."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from known_jacobians import EXACT, Tanh, normal
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import Implicit, OneStep, attach, diagnostics
from phantomgrad.diagnostics import (
    ascent_condition,
    gradient_alignment,
    jacobian_penalty,
    phantom_error,
    spectral_radius,
)


def test_everything_public_has_a_docstring_and_is_listed() -> None:
    for name in diagnostics.__all__:
        assert getattr(diagnostics, name).__doc__, name
    for name in ("check", "spectral_radius", "phantom_error", "gradient_alignment", "ascent_condition"):
        parameters = inspect.signature(getattr(diagnostics, name)).parameters
        assert {"solver", "state", "output", "batch_dim", "kwargs"} <= set(parameters), name


def _as_tuple(z: Tensor) -> Any:
    return z[:, :2], z[:, 2:]


STRUCTURES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (_as_tuple, lambda s: torch.cat(s, dim=1)),
    "list": (lambda z: list(_as_tuple(z)), lambda s: torch.cat(s, dim=1)),
    "dict": (lambda z: {"a": z[:, :2], "b": [z[:, 2:]]}, lambda s: torch.cat((s["a"], s["b"][0]), dim=1)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nested_states_give_the_same_answers(structure: str) -> None:
    pack, unpack = STRUCTURES[structure]
    cell, x, start = Tanh(), normal(4, 3), torch.zeros(4, 5, dtype=DTYPE)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, state: Any, x: Tensor) -> Any:
            return pack(self.cell(unpack(state), x))

    packed = Packed()
    for function in (spectral_radius, phantom_error):
        plain = function(cell, start, x, solver=EXACT)
        nested = function(packed, pack(start), x, solver=EXACT)
        torch.testing.assert_close(nested.value, plain.value, rtol=1e-6, atol=0)
    g = normal(4, 5, seed=5)
    plain = gradient_alignment(cell, start, x, solver=EXACT, cotangent=g)
    nested = gradient_alignment(packed, pack(start), x, solver=EXACT, cotangent=pack(g))
    assert nested.cosine == pytest.approx(plain.cosine, rel=1e-9)
    assert nested.norm_ratio == pytest.approx(plain.norm_ratio, rel=1e-9)
    ascent = [
        ascent_condition(target, z, x, solver=EXACT, cotangent=c)
        for target, z, c in ((cell, start, g), (packed, pack(start), pack(g)))
    ]
    assert ascent[0].left == pytest.approx(ascent[1].left, rel=1e-9)
    assert jacobian_penalty(packed, pack(start), x, probes=2) > 0


class Keyword(nn.Module):
    """The state is the second argument and the first part of what is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Tanh()

    def forward(self, x: dict[str, Tensor], hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        return scale * self.cell(hidden, x["features"]), "extra"


def test_attached_modules_use_their_own_options_and_bare_ones_take_them() -> None:
    module, x, start = Keyword(), {"features": normal(4, 3)}, torch.zeros(4, 5, dtype=DTYPE)
    plain = spectral_radius(module.cell, start, x["features"], solver=EXACT)
    bare = spectral_radius(module, x, start, state="hidden", output=0, solver=EXACT)
    by_position = spectral_radius(module, x, start, state=1, output=0, solver=EXACT)
    by_keyword = spectral_radius(module, x, state="hidden", output=0, solver=EXACT, kwargs={"hidden": start})
    attachment = attach(module, OneStep(), state="hidden", output=0, solver=EXACT)
    attached = spectral_radius(module, x, start)
    by_handle = spectral_radius(attachment, x, kwargs={"hidden": start})
    halved = spectral_radius(module, x, start, kwargs={"scale": 0.0})
    for found in (bare, by_position, by_keyword, attached, by_handle):
        torch.testing.assert_close(found.value, plain.value)
    assert float(halved) == 0.0
    assert attachment.solution is None
    names = gradient_alignment(module, {"features": x["features"].requires_grad_()}, start).by_name
    assert set(names) == {f"cell.{name}" for name, _ in module.cell.named_parameters()} | {"input x.features"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_outside_does_not_matter(mode: Any) -> None:
    cell = Tanh()
    with mode():
        x = normal(4, 3)
        start = torch.zeros(4, 5, dtype=DTYPE)
        inside = [
            float(spectral_radius(cell, start, x, solver=EXACT)),
            gradient_alignment(cell, start, x, solver=EXACT).cosine,
        ]
    x, start = x.clone(), start.clone()
    assert inside[0] == pytest.approx(float(spectral_radius(cell, start, x, solver=EXACT)))
    assert inside[1] == pytest.approx(gradient_alignment(cell, start, x, solver=EXACT).cosine)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True).double()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.layer(0.5 * z + x)


def test_dropout_is_held_through_all_solves_of_a_measurement() -> None:
    cell, x = Attention(), normal(2, 3, 8)
    cell.train()
    start = torch.zeros_like(x)
    before = torch.get_rng_state()
    assert phantom_error(cell, start, x, solver=EXACT).converged.all()
    exact = gradient_alignment(cell, start, x, gradient=Implicit(rtol=1e-11), solver=EXACT)
    assert exact.cosine == pytest.approx(1.0, abs=1e-9)  # the same masks in both solves
    assert torch.equal(torch.get_rng_state(), before)
    assert jacobian_penalty(cell, x, x).requires_grad


class Fused(nn.Module):
    """Attention by torch's fused kernel, whose backward cannot be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        heads = (0.3 * self.mix(z) + x).unflatten(2, (2, 4)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def test_fused_attention_can_be_differentiated_twice() -> None:
    cell, x = Fused(), torch.randn(2, 3, 8)
    z = torch.zeros_like(x).requires_grad_()
    (once,) = torch.autograd.grad(cell(z, x).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):  # else this test would show nothing
        once.sum().backward()
    start = torch.zeros_like(x)
    assert phantom_error(cell, start, x).converged.all()
    assert ascent_condition(cell, start[:1], x[:1]).inner_product > 0
    jacobian_penalty(cell, start, x).backward()
    assert cell.mix.weight.grad is not None
    assert cell.mix.weight.grad.abs().max() > 0
