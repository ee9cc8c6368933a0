"""Spectral radius, phantom error, alignment, ascent condition and Jacobian penalty against dense Jacobians in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, LinearBlock
from torch import Tensor, nn

from phantomgrad import (
    AdaptivePhantom,
    Backprop,
    Broyden,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    NotConvergedError,
    NotConvergedWarning,
    OneStep,
    PhantomGradError,
    Shine,
    UnrolledPhantom,
    attach,
    diagnostics,
)
from phantomgrad.diagnostics import (
    ascent_condition,
    gradient_alignment,
    jacobian_penalty,
    phantom_error,
    spectral_radius,
)

EXACT = FixedPointIteration(max_steps=2000, rtol=1e-14, atol=1e-14)
AT_START = FixedPointIteration(max_steps=0)


class Tanh(nn.Module):
    """A nonlinear cell whose Jacobian differs from sample to sample."""

    def __init__(self, size: int = 5, inputs: int = 3, gain: float = 0.8) -> None:
        super().__init__()
        self.recurrent = nn.Linear(size, size).double()
        self.inputs = nn.Linear(inputs, size).double()
        with torch.no_grad():
            self.recurrent.weight.copy_(gain * torch.linalg.qr(torch.randn(size, size, dtype=DTYPE))[0])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + self.inputs(x))


def _solved(cell: Callable[..., Tensor], z: Tensor, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        for _ in range(500):
            z = cell(z, *inputs)
    return z


def _jacobians(cell: Callable[..., Tensor], z: Tensor, *inputs: Tensor) -> Tensor:
    """The dense Jacobian of every row's image with respect to that row, shape (rows, size, size)."""
    rows = [
        torch.autograd.functional.jacobian(lambda row, i=i: cell(row[None], *(x[i : i + 1] for x in inputs))[0], z[i])
        for i in range(z.shape[0])
    ]
    return torch.stack(rows)


def _linear(J: Tensor) -> Callable[[Tensor], Tensor]:
    """A linear map of rows with this Jacobian; its solution is zero."""
    return lambda z: z @ J.T


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def _rotation(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=DTYPE)


def _non_normal() -> Tensor:
    """Spectral radius 0.4, 2-norm above 3."""
    J = torch.diag(torch.linspace(-0.4, 0.4, 6, dtype=DTYPE))
    return J + torch.diag(torch.full((5,), 3.0, dtype=DTYPE), 1)


def test_everything_public_has_a_docstring_and_is_listed() -> None:
    for name in diagnostics.__all__:
        assert getattr(diagnostics, name).__doc__, name
    for name in ("check", "spectral_radius", "phantom_error", "gradient_alignment", "ascent_condition"):
        parameters = inspect.signature(getattr(diagnostics, name)).parameters
        assert {"solver", "state", "output", "batch_dim", "kwargs"} <= set(parameters), name


# -- spectral radius -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1.0, 0.5, 1.3])
def test_spectral_radius_of_a_nonlinear_cell_is_that_of_its_dense_jacobians(damping: float) -> None:
    cell, x = Tanh(), _normal(4, 3)
    start = torch.zeros(4, 5, dtype=DTYPE)
    found = spectral_radius(cell, start, x, damping=damping, solver=EXACT)
    J = _jacobians(cell, _solved(cell, start, x), x)
    truth = torch.linalg.eigvals(damping * J + (1 - damping) * torch.eye(5, dtype=DTYPE)).abs().amax(dim=1)
    torch.testing.assert_close(found.value, truth, rtol=1e-9, atol=0)
    assert found.converged.all()
    assert float(found) == pytest.approx(truth.max().item(), rel=1e-9)
    torch.testing.assert_close(found.eigenvalue.abs(), found.value)
    assert abs(found.worst) == pytest.approx(float(found))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 9), batch=st.integers(1, 3), damping=st.floats(0.1, 1.5))
def test_spectral_radius_of_a_random_linear_map(seed: int, size: int, batch: int, damping: float) -> None:
    J = _normal(size, size, seed=seed)
    start = torch.zeros(batch, size, dtype=DTYPE)
    found = spectral_radius(_linear(J), start, damping=damping, rtol=1e-9, solver=AT_START)
    B = damping * J + (1 - damping) * torch.eye(size, dtype=DTYPE)
    truth = torch.linalg.eigvals(B).abs().max()
    torch.testing.assert_close(found.value, truth.expand(batch), rtol=1e-6, atol=1e-9)
    assert found.products <= size


@pytest.mark.parametrize(
    ("J", "eigenvalue"),
    [
        (0.6 * _rotation(1.0), 0.6 * complex(math.cos(1.0), math.sin(1.0))),
        (
            torch.block_diag(0.9 * _rotation(2.0), 0.2 * torch.eye(3, dtype=DTYPE)),
            0.9 * complex(math.cos(2), math.sin(2)),
        ),
        (torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=DTYPE), 1j),
        (torch.diag(torch.tensor([-1.5, 0.5, 1.2], dtype=DTYPE)), -1.5),
        (0.5 * torch.eye(4, dtype=DTYPE), 0.5),
        (_non_normal(), None),
    ],
    ids=["rotation", "pair among others", "quarter turn", "negative", "multiple of I", "non-normal"],
)
def test_spectral_radius_of_known_matrices(J: Tensor, eigenvalue: complex | None) -> None:
    found = spectral_radius(_linear(J), torch.zeros(2, J.shape[0], dtype=DTYPE), solver=AT_START)
    truth = torch.linalg.eigvals(J).abs().max().item()
    assert float(found) == pytest.approx(truth, rel=1e-9)
    assert found.converged.all()
    if eigenvalue is not None:
        assert abs(found.worst - eigenvalue) < 1e-9


@pytest.mark.parametrize("pairs", [True, False], ids=["complex", "real"])
def test_spectral_radius_of_a_large_map_needs_restarts_and_is_as_accurate_as_it_says(pairs: bool) -> None:
    size = 120
    moduli = torch.linspace(0.95, 0.05, size // 2, dtype=DTYPE)
    blocks = [
        m * (_rotation(0.1 + i) if pairs else torch.diag(torch.tensor([1.0, -0.5]))) for i, m in enumerate(moduli)
    ]
    basis = torch.linalg.qr(_normal(size, size))[0]
    J = basis @ torch.block_diag(*blocks).to(DTYPE) @ basis.T
    evaluations = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return z @ J.T

    found = spectral_radius(counted, torch.zeros(1, size, dtype=DTYPE), rtol=1e-6, max_products=2000, solver=AT_START)
    assert found.converged.all()
    assert 24 < found.products < 1000  # more than one basis
    assert evaluations <= 3  # one recorded evaluation serves all products
    assert abs(float(found) - 0.95) <= 1e-6 * 0.95  # the matrix is normal
    assert found.residual.max() <= 1e-6 * float(found)


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


def test_alignment_counts_imaginary_parts_of_complex_parameters() -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5 + 0.4j, -0.3 + 0.6j], dtype=torch.complex128))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(z) * self.weight) + x

    cell, start, x = Filter(), torch.zeros(1, 2, 2, dtype=DTYPE), torch.randn(1, 2, 2, dtype=DTYPE)
    g = torch.randn(1, 2, 2, dtype=DTYPE)
    found = gradient_alignment(cell, start, x, gradient=OneStep(), cotangent=g, solver=EXACT)
    (parameter,) = cell.parameters()
    grads = []
    for gradient in (OneStep(), Implicit(rtol=1e-14)):
        with attach(cell, gradient, solver=EXACT):
            grads.append(torch.view_as_real(torch.autograd.grad(cell(start, x), parameter, g)[0]).flatten())
    expected = torch.nn.functional.cosine_similarity(*grads, dim=0).item()
    assert float(found.by_name["weight"].cosine) == pytest.approx(expected, rel=1e-9)
    assert expected < 0.999


def test_an_unfinished_search_says_so() -> None:
    J = torch.linalg.qr(_normal(80, 80))[0]  # all eigenvalues on the unit circle: nothing stands out
    found = spectral_radius(_linear(J), torch.zeros(1, 80, dtype=DTYPE), max_products=5, solver=AT_START)
    assert not found.converged.any()
    assert found.products == 5
    assert 0 < float(found) <= 1 + 1e-12  # a Ritz value of a normal matrix lies inside
    assert str(found).endswith("not settled after 5 products: take it as a lower bound)")
    assert found.residual.max() > 1e-3 * float(found)


def test_the_radius_of_a_constant_map_is_zero() -> None:
    found = spectral_radius(lambda z: torch.ones_like(z), torch.zeros(2, 3, dtype=DTYPE))
    assert found.value.tolist() == [0.0, 0.0]
    assert found.converged.all()


def test_a_map_that_is_not_finite_is_reported_as_nan_and_not_converged() -> None:
    found = spectral_radius(lambda z: z / 0, torch.zeros(2, 3, dtype=DTYPE), solver=AT_START)
    assert found.value.isnan().all()
    assert not found.converged.any()


def test_spectral_radius_in_float32_and_its_text() -> None:
    J = torch.block_diag(0.9 * _rotation(2.0), 0.2 * torch.eye(40, dtype=DTYPE)).float()
    found = spectral_radius(lambda z: z @ J.T, torch.zeros(3, 42), solver=AT_START)
    assert float(found) == pytest.approx(0.9, rel=1e-5)
    text = str(spectral_radius(lambda z: -0.5 * z, torch.zeros(3, 2), damping=0.25))
    assert text.startswith(
        "spectral radius of 0.25 J + 0.75 I: 0.625, the largest of 3 samples (eigenvalue 0.625, residual "
    )


# -- states, modules, and what stays as it is ---------------------------------------------------------------------------


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
    cell, x, start = Tanh(), _normal(4, 3), torch.zeros(4, 5, dtype=DTYPE)

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
    g = _normal(4, 5, seed=5)
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


def test_samples_may_lie_along_another_dimension_or_be_coupled() -> None:
    J = _normal(3, 3)
    found = spectral_radius(lambda z: J @ z, torch.zeros(3, 4, dtype=DTYPE), batch_dim=1, solver=AT_START)
    truth = torch.linalg.eigvals(J).abs().max()
    torch.testing.assert_close(found.value, truth.expand(4), rtol=1e-9, atol=0)

    graph = _normal(6, 6, seed=1)
    joint = torch.linalg.eigvals(torch.kron(graph, J)).abs().max()  # of z -> graph z J^T
    start = torch.zeros(6, 3, dtype=DTYPE)
    found = spectral_radius(lambda z: graph @ z @ J.T, start, batch_dim=None, rtol=1e-9, solver=AT_START)
    torch.testing.assert_close(found.value, joint[None], rtol=1e-6, atol=0)
    with pytest.warns(
        UserWarning, match=r"^The map couples the samples along batch_dim=0, so all of them are measured as one"
    ):
        found = spectral_radius(lambda z: graph @ z @ J.T, start, rtol=1e-9, solver=AT_START)
    torch.testing.assert_close(found.value, joint[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_coupling_in_one_direction_is_noticed(count: int) -> None:
    causal = torch.tril(torch.full((count, count), 0.1, dtype=DTYPE))
    with pytest.warns(UserWarning, match="couples the samples"):
        spectral_radius(lambda z: causal @ z, torch.zeros(count, 2, dtype=DTYPE), solver=AT_START)


class Keyword(nn.Module):
    """The state is the second argument and the first part of what is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Tanh()

    def forward(self, x: dict[str, Tensor], hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        return scale * self.cell(hidden, x["features"]), "extra"


def test_attached_modules_use_their_own_options_and_bare_ones_take_them() -> None:
    module, x, start = Keyword(), {"features": _normal(4, 3)}, torch.zeros(4, 5, dtype=DTYPE)
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


def test_a_solve_that_fails_warns_as_the_attachment_would() -> None:
    expanding = _linear(1.5 * torch.eye(3, dtype=DTYPE))
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_outside_does_not_matter(mode: Any) -> None:
    cell = Tanh()
    with mode():
        x = _normal(4, 3)
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
    cell, x = Attention(), _normal(2, 3, 8)
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


# -- phantom error ------------------------------------------------------------------------------------------------------


MATRICES = {
    "random": 0.3 * _normal(6, 6, seed=2),
    "rotation": torch.block_diag(0.9 * _rotation(2.0), 0.5 * _rotation(0.3)),
    "non-normal": _non_normal(),
    "expanding": 1.2 * torch.eye(4, dtype=DTYPE),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (5, 0.5), (9, 0.8)])
def test_phantom_error_is_the_norm_of_the_dense_power(name: str, steps: int, damping: float) -> None:
    J = MATRICES[name]
    B = damping * J + (1 - damping) * torch.eye(J.shape[0], dtype=DTYPE)
    power = torch.linalg.matrix_power(B, steps)
    start = torch.zeros(3, J.shape[0], dtype=DTYPE)
    found = phantom_error(_linear(J), start, steps=steps, damping=damping, rtol=1e-8, solver=AT_START)
    torch.testing.assert_close(found.value, torch.linalg.matrix_norm(power, 2).expand(3), rtol=1e-6, atol=0)
    assert found.converged.all()
    assert found.products % (2 * steps) == 0
    upper = phantom_error(
        _linear(J), start, steps=steps, damping=damping, norm="frobenius", probes=200, solver=AT_START
    )
    torch.testing.assert_close(upper.value, torch.linalg.matrix_norm(power).expand(3), rtol=0.2, atol=0)
    assert upper.products == 200 * steps


def test_phantom_error_of_a_nonlinear_cell_is_per_sample() -> None:
    cell, x, start = Tanh(gain=0.9), _normal(4, 3), torch.zeros(4, 5, dtype=DTYPE)
    J = _jacobians(cell, _solved(cell, start, x), x)
    power = torch.linalg.matrix_power(0.5 * J + 0.5 * torch.eye(5, dtype=DTYPE), 5)
    found = phantom_error(cell, start, x, solver=EXACT)
    torch.testing.assert_close(found.value, torch.linalg.matrix_norm(power, 2), rtol=1e-6, atol=0)
    assert len(set(found.value.tolist())) == 4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 6), damping=st.floats(0.2, 1.0))
def test_phantom_error_bounds_the_relative_error_of_the_adjoint(seed: int, steps: int, damping: float) -> None:
    block = LinearBlock.random(seed, batch=1)
    bound = float(phantom_error(block, block.solution().detach(), steps=steps, damping=damping, solver=AT_START))
    g = _normal(1, 5, seed=seed)
    exact = block.adjoint(g)
    phantom = exact @ (torch.eye(5, dtype=DTYPE) - torch.linalg.matrix_power(block.damped_jacobian(damping), steps))
    assert (phantom - exact).norm() <= bound * exact.norm() * (1 + 1e-6)


def test_phantom_error_takes_the_attached_gradients_options() -> None:
    cell, x, start = Tanh(), _normal(2, 3), torch.zeros(2, 5, dtype=DTYPE)
    attachment = attach(cell, NeumannPhantom(steps=3, damping=0.7), solver=EXACT)
    found = phantom_error(cell, start, x)
    assert (found.steps, found.damping) == (3, 0.7)
    assert phantom_error(cell, start, x, steps=4).steps == 4
    attachment.gradient = OneStep()
    assert (phantom_error(cell, start, x).steps, phantom_error(cell, start, x).damping) == (1, 1.0)
    attachment.gradient = KrylovPhantom()
    with pytest.raises(
        ValueError,
        match=r"^The module is attached with KrylovPhantom\(steps=5\), which has no B\^k to measure\. Pass steps= and damping=",
    ):
        phantom_error(cell, start, x)
    assert phantom_error(cell, start, x, steps=2, damping=0.5).steps == 2


def test_phantom_error_says_what_it_cannot_tell() -> None:
    start = torch.zeros(1, 60, dtype=DTYPE)
    unfinished = phantom_error(_linear(_normal(60, 60)), start, max_products=20, solver=AT_START)
    assert not unfinished.converged.any()
    assert str(unfinished).endswith("at 1 or above it bounds nothing useful; not settled after 20 products")
    small = phantom_error(lambda z: 0.5 * z, start, steps=2, damping=1.0)
    assert str(small) == (
        "2-norm of B^2, B = 1 J + 0 I: 0.25, the largest of 1 samples; bounds the relative error of the adjoint"
    )
    one_entry = torch.zeros(1, 50, dtype=DTYPE)
    J = torch.zeros(50, 50, dtype=DTYPE)
    J[:, 0] = 1.0  # J^T e is far larger where the signs agree
    assert not phantom_error(
        _linear(J), one_entry, steps=1, damping=1.0, norm="frobenius", probes=4, solver=AT_START
    ).converged.all()


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 0.5 * z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 0.5 * g


def test_a_backward_that_cannot_be_differentiated_leaves_what_needs_one_sided_products() -> None:
    start = torch.zeros(2, 3, dtype=DTYPE)
    assert float(spectral_radius(_FirstOnly.apply, start)) == pytest.approx(0.5)
    assert float(phantom_error(_FirstOnly.apply, start, norm="frobenius", steps=1, damping=1.0)) == pytest.approx(
        math.sqrt(3) / 2
    )
    with pytest.raises(
        PhantomGradError,
        match=r"^Products with the Jacobian from the right need a map whose backward can be differentiated again; this one's cannot: its second derivatives are not those of its first\.$",
    ):
        phantom_error(_FirstOnly.apply, start)


# -- gradient alignment -------------------------------------------------------------------------------------------------


def _dense_alignment(block: LinearBlock, adjoint: Tensor, exact: Tensor) -> tuple[float, float, list[float]]:
    """Overall cosine and norm ratio, and the cosine per parameter, of the gradients that two adjoints give."""
    z = block.solution().detach()
    a, b = (torch.autograd.grad((block(z) * v).sum(), block.parameters) for v in (adjoint, exact))
    flat_a, flat_b = (torch.cat([part.flatten() for part in parts]) for parts in (a, b))
    cosines = [
        torch.nn.functional.cosine_similarity(p.flatten(), q.flatten(), dim=0).item() for p, q in zip(a, b, strict=True)
    ]
    overall = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=0).item()
    return overall, (flat_a.norm() / flat_b.norm()).item(), cosines


@pytest.mark.parametrize("radius", [0.5, 0.9, 1.6])
@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (4, 0.6)])
def test_alignment_of_a_linear_block_is_the_dense_one(radius: float, steps: int, damping: float) -> None:
    block = LinearBlock.random(3, radius=radius)
    g = _normal(4, 5, seed=9)
    parameters = dict(zip(("J", "U", "c", "x"), block.parameters, strict=True))
    found = gradient_alignment(
        block,
        block.solution().detach(),
        gradient=NeumannPhantom(steps=steps, damping=damping, safeguard=False),
        cotangent=g,
        parameters=parameters,
        solver=AT_START,
    )
    exact = block.adjoint(g)
    phantom = exact @ (torch.eye(5, dtype=DTYPE) - torch.linalg.matrix_power(block.damped_jacobian(damping), steps))
    cosine, ratio, cosines = _dense_alignment(block, phantom, exact)
    assert found.cosine == pytest.approx(cosine, rel=1e-9)
    assert float(found) == found.cosine
    assert found.norm_ratio == pytest.approx(ratio, rel=1e-9)
    assert list(found.by_name) == list(parameters)
    assert [each.cosine for each in found.by_name.values()] == pytest.approx(cosines, rel=1e-9)
    assert found.exact_residual < 1e-10


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_alignment_of_the_scalar_map_is_its_closed_form(steps: int) -> None:
    a = torch.tensor(0.5, dtype=DTYPE, requires_grad=True)
    found = gradient_alignment(
        lambda x, b: a * x + b,
        torch.tensor(0.0, dtype=DTYPE),
        torch.tensor(1.0, dtype=DTYPE, requires_grad=True),
        gradient=UnrolledPhantom(steps=steps, damping=0.5),
        loss=lambda x: x**2,
        parameters={"a": a},
        solver=EXACT,
    )
    assert found.cosine == pytest.approx(1.0)
    assert list(found.by_name) == ["a", "input b"]
    for alignment in found.by_name.values():
        assert alignment.norm_ratio == pytest.approx(1 - 0.75**steps, rel=1e-10)


@pytest.mark.parametrize(
    "gradient",
    [Implicit(rtol=1e-12), KrylovPhantom(steps=6), AdaptivePhantom(target=1e-9), Backprop(steps=400), Shine(refine=40)],
    ids=lambda gradient: type(gradient).__name__,
)
def test_gradients_that_are_exact_are_seen_to_be(gradient: Gradient) -> None:
    cell, x = Tanh(), _normal(4, 3).requires_grad_()
    solver = Broyden(max_steps=200, rtol=1e-13) if isinstance(gradient, Shine) else EXACT
    found = gradient_alignment(cell, torch.zeros(4, 5, dtype=DTYPE), x, gradient=gradient, solver=solver)
    assert found.cosine == pytest.approx(1.0, abs=1e-7)
    assert found.norm_ratio == pytest.approx(1.0, abs=1e-5)
    assert "input x" in found.by_name


def test_alignment_of_a_nonlinear_cell_with_a_loss() -> None:
    cell, x, readout = Tanh(gain=0.9), _normal(4, 3), _normal(5, seed=4)
    attach(cell, UnrolledPhantom(steps=2), solver=EXACT)
    start = torch.zeros(4, 5, dtype=DTYPE)

    def loss(z: Tensor) -> Tensor:
        return (z @ readout).square().mean()

    found = gradient_alignment(cell, start, x, loss=loss)
    names = [name for name, _ in cell.named_parameters()]
    z = _solved(lambda z: torch.tanh(cell.recurrent(z) + cell.inputs(x)), start).requires_grad_()
    (g,) = torch.autograd.grad(loss(z), z)
    J = torch.autograd.functional.jacobian(lambda z: torch.tanh(cell.recurrent(z) + cell.inputs(x)), z).reshape(20, 20)
    v = torch.linalg.solve(torch.eye(20, dtype=DTYPE) - J.T, g.flatten()).reshape(4, 5)
    image = torch.tanh(cell.recurrent(z.detach()) + cell.inputs(x))
    exact = torch.autograd.grad((image * v).sum(), list(cell.parameters()))
    h = z.detach()
    for _ in range(2):
        h = 0.5 * h + 0.5 * torch.tanh(cell.recurrent(h) + cell.inputs(x))
    phantom = torch.autograd.grad((h * g).sum(), list(cell.parameters()))
    for name, a, b in zip(names, phantom, exact, strict=True):
        assert found.by_name[name].cosine == pytest.approx(
            (a * b).sum().item() / (a.norm() * b.norm()).item(), rel=1e-8
        )
        assert found.by_name[name].norm_ratio == pytest.approx((a.norm() / b.norm()).item(), rel=1e-8)
    assert str(found).startswith(
        f"UnrolledPhantom(steps=2, damping=0.5) against the exact gradient: cosine {found.cosine:.4f}"
    )
    assert len(str(found).splitlines()) == 1 + len(names)


def test_frozen_parameters_are_left_out_and_unused_ones_do_not_count() -> None:
    cell, x = Tanh(), _normal(4, 3)
    cell.inputs.requires_grad_(False)
    cell.unused = nn.Parameter(torch.ones(2, dtype=DTYPE))
    found = gradient_alignment(cell, torch.zeros(4, 5, dtype=DTYPE), x, solver=EXACT)
    assert set(found.by_name) == {"recurrent.weight", "recurrent.bias"}
    zero = gradient_alignment(
        cell, torch.zeros(4, 5, dtype=DTYPE), x, solver=EXACT, cotangent=torch.zeros(4, 5, dtype=DTYPE)
    )
    assert math.isnan(zero.cosine)
    assert math.isnan(zero.norm_ratio)


def test_without_anything_that_requires_grad_the_inputs_count() -> None:
    found = gradient_alignment(lambda z, x: 0.5 * z + x, torch.zeros(2, 3, dtype=DTYPE), torch.ones(2, 3, dtype=DTYPE))
    assert list(found.by_name) == ["input x"]


def test_a_singular_adjoint_is_not_passed_off_as_exact() -> None:
    weight = torch.ones(1, dtype=DTYPE, requires_grad=True)
    with pytest.warns(
        NotConvergedWarning, match=r"^The exact adjoint was solved only to a relative residual of 1\.0e\+00"
    ):
        found = gradient_alignment(lambda z: weight * z, torch.zeros(2, 3, dtype=DTYPE), parameters={"w": weight})
    assert found.exact_residual > 0.5


# -- ascent condition ---------------------------------------------------------------------------------------------------


def _dense_terms(block: LinearBlock, power: Tensor) -> tuple[float, float, float]:
    """`||dF/dz B^k||`, `s_max` and `s_min` for the whole batch, from dense matrices."""
    z = block.solution().detach()
    names = block.parameters
    jacobians = torch.autograd.functional.jacobian(lambda *p: LinearBlock(*p)(z), tuple(p.detach() for p in names))
    n = z.numel()
    dF = torch.cat([j.reshape(n, -1) for j in jacobians], dim=1).T  # the paper's layout: z times state
    B = torch.block_diag(*[power.T] * z.shape[0])
    singular = torch.linalg.svdvals(dF)
    return torch.linalg.matrix_norm(dF @ B, 2).item(), singular[0].item(), singular[-1].item()


@pytest.mark.parametrize(
    "gradient", [UnrolledPhantom(steps=3, damping=0.6), NeumannPhantom(steps=3, damping=0.6, safeguard=False)], ids=repr
)
@pytest.mark.parametrize("dense", [True, False])
def test_ascent_condition_has_the_dense_terms(gradient: Any, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr("phantomgrad.diagnostics._ascent._DENSE_ROWS", 0)
    block = LinearBlock.random(6, size=4, batch=2)
    g = _normal(2, 4, seed=3)
    parameters = dict(zip(("J", "U", "c", "x"), block.parameters, strict=True))
    found = ascent_condition(
        block, block.solution().detach(), gradient=gradient, cotangent=g, parameters=parameters, solver=AT_START
    )
    left, s_max, s_min = _dense_terms(block, torch.linalg.matrix_power(block.damped_jacobian(0.6), 3))
    rel = 1e-9 if dense else 1e-4
    assert found.dense is dense
    assert found.applicable
    assert found.left == pytest.approx(left, rel=rel)
    assert found.s_max == pytest.approx(s_max, rel=rel)
    assert found.s_min == pytest.approx(s_min, rel=rel)
    assert found.bound == pytest.approx(s_min**2 / s_max, rel=2 * rel)
    assert found.kappa == pytest.approx(s_max / s_min, rel=2 * rel)
    assert (found.state_entries, found.variable_entries) == (8, 16 + 12 + 4 + 6)
    exact = block.adjoint(g)
    phantom = exact @ (torch.eye(4, dtype=DTYPE) - torch.linalg.matrix_power(block.damped_jacobian(0.6), 3))
    z = block.solution().detach()
    a, b = (torch.autograd.grad((block(z) * v).sum(), block.parameters) for v in (phantom, exact))
    assert found.inner_product == pytest.approx(sum((p * q).sum().item() for p, q in zip(a, b, strict=True)), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 8), damping=st.floats(0.3, 1.0), radius=st.floats(0.1, 0.8))
def test_where_the_condition_holds_the_inner_product_is_not_negative(
    seed: int, steps: int, damping: float, radius: float
) -> None:
    block = LinearBlock.random(seed, size=3, batch=1, radius=radius)
    parameters = dict(zip(("J", "U", "c", "x"), block.parameters, strict=True))
    found = ascent_condition(
        block,
        block.solution().detach(),
        gradient=UnrolledPhantom(steps=steps, damping=damping),
        parameters=parameters,
        seed=seed,
        solver=AT_START,
    )
    assert found.applicable
    assert found.holds is (found.left <= found.bound)
    if found.holds:
        assert found.inner_product >= 0
        assert "holds" in str(found)


def test_enough_steps_fulfil_the_condition() -> None:
    block = LinearBlock.random(2, size=3, batch=1)
    parameters = dict(zip(("J", "U", "c", "x"), block.parameters, strict=True))
    for steps, holds in ((1, False), (100, True)):
        gradient = NeumannPhantom(steps=steps, safeguard=False)
        found = ascent_condition(
            block, block.solution().detach(), gradient=gradient, parameters=parameters, solver=AT_START
        )
        assert found.holds is holds
        assert found.inner_product > 0


def test_the_exact_gradient_fulfils_the_condition_with_nothing_left() -> None:
    cell, x = Tanh(), _normal(1, 3)
    found = ascent_condition(cell, torch.zeros(1, 5, dtype=DTYPE), x, gradient=Implicit(rtol=1e-13), solver=EXACT)
    assert found.holds
    assert found.left < 1e-9 < found.bound
    assert found.cosine == pytest.approx(1.0)


def test_fewer_inputs_and_parameters_than_states_are_not_applicable() -> None:
    bias = torch.ones(2, dtype=DTYPE, requires_grad=True)
    found = ascent_condition(
        lambda z: 0.5 * z + bias.sum(), torch.zeros(1, 5, dtype=DTYPE), parameters={"bias": bias}, solver=EXACT
    )
    assert not found.applicable
    assert found.holds is None
    assert (found.s_min, found.bound, found.kappa) == (0.0, 0.0, math.inf)
    assert found.s_max == pytest.approx(math.sqrt(10))
    assert found.inner_product > 0
    assert found.cosine == pytest.approx(1.0)
    text = str(found)
    assert text.startswith(
        "Ascent condition of UnrolledPhantom(steps=5, damping=0.5): not applicable: the inputs and parameters have fewer entries (2) than the state (5), so s_min = 0"
    )
    assert "measured: <phantom, exact> = " in text


def test_a_rank_that_is_too_small_and_a_gradient_that_is_not_linear_are_not_applicable() -> None:
    weight = torch.ones(8, dtype=DTYPE, requires_grad=True)
    flat = ascent_condition(
        lambda z: 0.5 * z + weight.sum(), torch.zeros(1, 3, dtype=DTYPE), parameters={"w": weight}, solver=EXACT
    )
    assert flat.reason == "dF/dz has not the full rank of the state, so s_min = 0"
    cell, x = Tanh(), _normal(1, 3)
    krylov = ascent_condition(cell, torch.zeros(1, 5, dtype=DTYPE), x, gradient=KrylovPhantom(steps=3), solver=EXACT)
    assert krylov.reason == "KrylovPhantom(steps=3) is not a linear function of its cotangent here"
    assert math.isnan(krylov.left)
    assert krylov.s_min > 0
    assert krylov.cosine > 0.5


def test_estimates_do_not_claim_what_they_cannot_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phantomgrad.diagnostics._ascent._DENSE_ENTRIES", 0)
    cell, x = Tanh(), _normal(1, 3)
    start = torch.zeros(1, 5, dtype=DTYPE)
    good = ascent_condition(cell, start, x, gradient=UnrolledPhantom(steps=100), solver=EXACT)
    assert good.applicable
    assert good.holds is None  # the bound is an upper bound only
    assert "undecided: left is below the bound, but the bound is an estimate from above" in str(good)
    bad = ascent_condition(cell, start, x, gradient=OneStep(), solver=EXACT)
    assert bad.holds is False
    assert "(estimates)" in str(bad)
    other = ascent_condition(cell, start, x, gradient=Implicit(), solver=EXACT)
    assert other.reason.startswith("with 5 state entries the dense matrices that Implicit() needs are too large")


# -- Jacobian penalty ---------------------------------------------------------------------------------------------------


def test_penalty_of_a_diagonal_map_is_exact_and_so_is_its_gradient() -> None:
    scale = torch.tensor([0.5, -2.0, 3.0], dtype=DTYPE, requires_grad=True)
    z = _normal(4, 3)
    penalty = jacobian_penalty(lambda z: scale * z, z)  # signs leave no noise where J is diagonal
    assert penalty.item() == pytest.approx(scale.square().mean().item())
    (grad,) = torch.autograd.grad(penalty, scale)
    torch.testing.assert_close(grad, 2 * scale.detach() / 3)


def test_penalty_is_an_unbiased_estimate_of_the_squared_norm() -> None:
    cell, x, z = Tanh(), _normal(4, 3), _normal(4, 5, seed=1)
    J = _jacobians(cell, z, x)
    truth = J.square().sum(dim=(1, 2)).mean() / 5
    estimate = jacobian_penalty(cell, z, x, probes=1000)
    assert estimate.item() == pytest.approx(truth.item(), rel=0.05)


def test_penalty_gradients_reach_parameters_inputs_and_what_computed_them() -> None:
    cell, z = Tanh(), _normal(4, 5)
    encoder = nn.Linear(2, 3).double()
    generator = torch.Generator().manual_seed(7)
    penalty = jacobian_penalty(cell, z, encoder(_normal(4, 2)), generator=generator)
    penalty.backward()
    for parameter in (*cell.parameters(), *encoder.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0

    weight = cell.recurrent.weight
    direction = torch.randn_like(weight)
    x = encoder(_normal(4, 2)).detach()

    def value() -> Tensor:
        return jacobian_penalty(cell, z, x, generator=torch.Generator().manual_seed(7))

    (grad,) = torch.autograd.grad(value(), weight)
    with torch.no_grad():
        weight += 1e-6 * direction
        above = value()
        weight -= 2e-6 * direction
        below = value()
    assert not above.requires_grad
    assert (grad * direction).sum().item() == pytest.approx((above - below).item() / 2e-6, rel=1e-6)


def test_training_with_the_penalty_lowers_the_spectral_radius() -> None:
    cell, x = Tanh(gain=1.4), _normal(8, 3)
    attach(cell, on_failure="ignore")
    start = torch.zeros(8, 5, dtype=DTYPE)
    before = float(spectral_radius(cell, start, x))
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    for _ in range(40):
        z = cell(start, x)
        loss = 0.0 * z.sum() + jacobian_penalty(cell, z, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(spectral_radius(cell, start, x)) < 0.7 * before


def test_penalty_makes_one_evaluation_and_leaves_state_inside_alone() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5).double()
            self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5).double())
            self.calls = 0

        def forward(self, z: Tensor) -> Tensor:
            self.calls += 1
            return torch.tanh(self.norm(self.linear(z)))

    bare, attached = Normed(), Normed()
    attached.load_state_dict(bare.state_dict())
    attach(attached)
    z = _normal(6, 5)
    values = []
    for module in (bare, attached):
        mean = module.norm.running_mean.clone()
        values.append(jacobian_penalty(module, z, generator=torch.Generator().manual_seed(0)))
        assert module.calls == 1
        assert torch.equal(module.norm.running_mean, mean)
        assert all("forward" not in each.__dict__ for each in bare.modules())
        values[-1].backward()
        assert all(p.grad is not None for p in module.linear.parameters() if p.dim() == 2)
    assert values[0].item() == pytest.approx(values[1].item())


def test_penalty_of_a_map_without_a_state_is_zero() -> None:
    assert jacobian_penalty(lambda z: torch.ones_like(z), torch.zeros(2, 3)).item() == 0.0


# -- bad input ----------------------------------------------------------------------------------------------------------


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


def test_the_start_and_the_solver_decide_where_the_jacobian_is_taken() -> None:
    cell = lambda z: 2 - 3 / (z + 2)  # noqa: E731  (solutions 1 and -1, with slopes 1/3 and 3)
    near, far = torch.full((1, 2), 0.9, dtype=DTYPE), torch.full((1, 2), -1.0, dtype=DTYPE)
    assert float(spectral_radius(cell, near)) == pytest.approx(1 / 3)
    assert float(spectral_radius(cell, far)) == pytest.approx(3.0)
    assert float(spectral_radius(cell, far + 0.01, solver=Broyden(rtol=1e-12))) == pytest.approx(3.0)
    assert float(spectral_radius(cell, torch.zeros(1, 2, dtype=DTYPE), solver=AT_START)) == pytest.approx(0.75)
