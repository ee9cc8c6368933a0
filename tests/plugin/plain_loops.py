"""Values and gradients of equilibria in plain loops with dense matrices.

They are written from the equations, in float64, one sample at a time, without autograd and without this library.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phantomgrad import (
    AdaptivePhantom,
    Anderson,
    Backprop,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    Shine,
    Solver,
    UnrolledPhantom,
)

SIZE, INPUTS, SAMPLES, CONSTANT = 6, 3, 4, 0.3
EYE = torch.eye(SIZE, dtype=torch.float64)
STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda z: z,
    "tuple": lambda z: (z[:, :4], z[:, 4:]),
    "dict": lambda z: {"a": z[:, :1], "b": [z[:, 1:4], (z[:, 4:],)]},
    "unread part": lambda z: (z[:, :4], z[:, 4:]),
    "constant part": lambda z: (z[:, :4], torch.full_like(z[:, 4:], CONSTANT).detach()),
}


def unpack(state: Any) -> Tensor:
    """The tensor that one of `STRUCTURES` was made from."""
    if isinstance(state, Tensor):
        return state
    return torch.cat([unpack(part) for part in (state.values() if isinstance(state, dict) else state)], dim=1)


class Cell(nn.Module):
    """`f(z, x) = tanh(W z + U x + b)` per row, in some structure, whose last two entries may be a constant, or may not be read."""

    def __init__(self, structure: str, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter((scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype))

        self.W = normal(SIZE, SIZE, scale=0.45)
        self.U = normal(SIZE, INPUTS, scale=0.5)
        self.b = normal(SIZE, scale=0.1)
        self.pack = STRUCTURES[structure]
        self.split = STRUCTURES["tuple" if structure == "constant part" else structure]
        self.mask = torch.ones(SIZE, dtype=torch.float64)
        self.read = SIZE
        if structure == "constant part":
            self.mask[4:] = 0.0
        elif structure == "unread part":
            self.read = 4

    def forward(self, state: Any, x: Tensor) -> Any:
        z = unpack(state) if self.read == SIZE else state[0]
        return self.pack(torch.tanh(z @ self.W[:, : self.read].T + x @ self.U.T + self.b))


@dataclass
class Grads:
    W: Tensor
    U: Tensor
    b: Tensor
    x: Tensor


class Block:
    """The cell for one sample in float64: its values, its dense Jacobian and its products, by hand."""

    def __init__(self, cell: Cell, x: Tensor) -> None:
        self.W, self.U, self.b = (p.detach().double() for p in (cell.W, cell.U, cell.b))
        self.reads = (torch.arange(SIZE) < cell.read).double()
        self.W = self.W * self.reads
        self.mask, self.x = cell.mask, x.detach().double()

    def __call__(self, z: Tensor) -> Tensor:
        return self.mask * torch.tanh(self.W @ z + self.U @ self.x + self.b) + (1 - self.mask) * CONSTANT

    def slope(self, z: Tensor) -> Tensor:
        return self.mask * (1 - torch.tanh(self.W @ z + self.U @ self.x + self.b) ** 2)

    def jacobian(self, z: Tensor) -> Tensor:
        return self.slope(z)[:, None] * self.W

    def pull_back(self, z: Tensor, v: Tensor) -> Grads:
        """`(df/d.)^T v` for parameters and input."""
        s = self.slope(z) * v
        return Grads(torch.outer(s, z * self.reads), torch.outer(s, self.x), s, self.U.T @ s)


@dataclass
class Solve:
    point: Tensor
    image: Tensor
    steps: int
    converged: bool
    H: Tensor
    """Broyden's dense estimate of the inverse Jacobian of `f(z) - z`, as the last step before the end left it."""


def plain_solve(f: Block, z: Tensor, solver: Solver) -> Solve:
    """The solver's published iteration; the iterate with the smallest relative residual is kept."""
    rtol, atol = solver.rtol or 0.0, solver.atol or 0.0
    best, best_residual, H = z, float("inf"), -EYE
    history: list[tuple[Tensor, Tensor]] = []
    last = kept = None
    for step in range(1, solver.max_steps + 1):
        image = f(z)
        g = image - z
        residual = (g.norm() / image.norm()).item()
        if residual <= best_residual:
            best, best_residual = z, residual
        converged = g.norm().item() <= atol + rtol * image.norm().item()
        if converged or step == solver.max_steps:
            return Solve(z if converged else best, f(z if converged else best), step, converged, H)
        if isinstance(solver, FixedPointIteration):
            z = z + solver.damping * g
        elif isinstance(solver, Anderson):
            history = [*history, (z, g)][-solver.memory :]
            G = torch.stack([residual for _, residual in history])
            gram = G @ G.T
            ridged = gram + solver.ridge * gram.diagonal().max() * torch.eye(len(history), dtype=torch.float64)
            a = torch.linalg.solve(ridged, torch.ones(len(history), dtype=torch.float64))
            a = a / a.sum()
            z = sum((w * (z + solver.mixing * g) for w, (z, g) in zip(a, history, strict=True)), torch.zeros_like(z))
        else:
            if last is not None:
                dz, dg = z - last[0], g - last[1]
                H = H + torch.outer(dz - H @ dg, dz @ H) / (dz @ H @ dg)
            lost = kept is not None and g.norm() > 10 * kept[1].norm()
            if kept is None or g.norm() < kept[1].norm():
                kept = (z, g)
            last = kept if lost else (z, g)
            z = last[0] - H @ last[1]
    raise AssertionError


def series(J: Tensor, g: Tensor, steps: int, damping: float) -> list[Tensor]:
    """The partial sums of the damped Neumann series."""
    B = damping * J + (1 - damping) * EYE
    terms = [damping * torch.linalg.matrix_power(B.T, i) @ g for i in range(steps)]
    return [torch.stack(terms[: n + 1]).sum(dim=0) for n in range(steps)]


def guarded(J: Tensor, g: Tensor, steps: int, damping: float) -> Tensor:
    """The whole sum if the last term is the smallest, else the sum whose residual, the next term, is."""
    sums = series(J, g, steps, damping)
    terms = [sums[0], *(later - earlier for earlier, later in itertools.pairwise(sums))]
    smallest = min(range(steps), key=lambda i: (terms[i].norm().item(), -i))
    return sums[-1] if smallest == steps - 1 else sums[max(smallest - 1, 0)]


def krylov(J: Tensor, g: Tensor, products: int) -> tuple[Tensor, float]:
    """One step from the best vector of the Krylov space of that many products, and its estimated relative error."""
    vectors = torch.stack([torch.linalg.matrix_power(J.T, i) @ g for i in range(products)], dim=1)
    basis = torch.linalg.qr(vectors)[0]
    image = basis - J.T @ basis
    v = basis @ torch.linalg.lstsq(image, g[:, None]).solution[:, 0]
    improved = g + J.T @ v
    left = (g - (v - J.T @ v)).norm()
    return improved, (left / torch.linalg.svdvals(image).min() / improved.norm()).item()


def adaptive(Js: list[Tensor], gs: list[Tensor], gradient: AdaptivePhantom) -> list[Tensor]:
    """As many products for all samples as the slowest needs."""
    for products in range(1, min(gradient.max_steps, SIZE + 1)):
        found = [krylov(J, g, products) for J, g in zip(Js, gs, strict=True)]
        if max(error for _, error in found) <= gradient.target:
            break
    return [v for v, _ in found]


def shine(J: Tensor, H: Tensor, g: Tensor, refine: int) -> Tensor:
    """The inverse estimate applied, then preconditioned steps of minimal residual."""
    v = -H.T @ g
    for _ in range(refine):
        residual = g - (v - J.T @ v)
        direction = -H.T @ residual
        change = direction - J.T @ direction
        v = v + (change @ residual) / (change @ change) * direction
    return v


def add(one: Grads | None, other: Grads) -> Grads:
    return (
        other if one is None else Grads(*(a + b for a, b in zip(vars(one).values(), vars(other).values(), strict=True)))
    )


def through_steps(f: Block, points: list[Tensor], g: Tensor, damping: float) -> tuple[Grads, Tensor]:
    """Backpropagation through damped steps from these points, by hand: gradients, and the cotangent of the first point."""
    total: Grads | None = None
    for z in reversed(points):
        total = add(total, f.pull_back(z, damping * g))
        g = (1 - damping) * g + damping * f.jacobian(z).T @ g
    assert total is not None
    return total, g


@dataclass
class Answer:
    value: Tensor
    solution: Tensor
    W: Tensor
    U: Tensor
    b: Tensor
    x: Tensor
    start: Tensor | None


def reference(cell: Cell, start: Tensor, x: Tensor, cotangent: Tensor, solver: Solver, gradient: Gradient) -> Answer:
    """Value and gradients of `<cotangent, equilibrium>`, dense and in plain loops."""
    blocks = [Block(cell, row) for row in x]
    if isinstance(gradient, Backprop):
        solver = FixedPointIteration(max_steps=gradient.steps, rtol=0.0, atol=0.0)
    solves = [plain_solve(f, z, solver) for f, z in zip(blocks, start.detach().double(), strict=True)]
    gs = list(cotangent.double())
    Js = [f.jacobian(s.point) for f, s in zip(blocks, solves, strict=True)]
    solutions = [s.image for s in solves]
    values, grads, starts = list(solutions), [], None
    if isinstance(gradient, UnrolledPhantom | Backprop):
        steps, damping = gradient.steps, getattr(gradient, "damping", 1.0)
        origins = list(start.detach().double()) if isinstance(gradient, Backprop) else solutions
        values, firsts = [], []
        for f, h, g in zip(blocks, origins, gs, strict=True):
            points = [h]
            for _ in range(steps):
                points.append(points[-1] + damping * (f(points[-1]) - points[-1]))
            values.append(points.pop())
            parameter_grads, first = through_steps(f, points, g, damping)
            grads.append(parameter_grads)
            firsts.append(first)
        if isinstance(gradient, Backprop):
            solutions, starts = values, torch.stack(firsts)
    else:
        if isinstance(gradient, NeumannPhantom):
            total = guarded if gradient.safeguard else lambda *args: series(*args)[-1]
            vs = [total(J, g, gradient.steps, gradient.damping) for J, g in zip(Js, gs, strict=True)]
        elif isinstance(gradient, KrylovPhantom):
            vs = [krylov(J, g, gradient.steps - 1)[0] for J, g in zip(Js, gs, strict=True)]
        elif isinstance(gradient, AdaptivePhantom):
            vs = adaptive(Js, gs, gradient)
        elif isinstance(gradient, Shine):
            vs = [shine(J, s.H, g, gradient.refine) for J, s, g in zip(Js, solves, gs, strict=True)]
        elif isinstance(gradient, Implicit):
            vs = [torch.linalg.solve((EYE - J).T, g) for J, g in zip(Js, gs, strict=True)]
        else:
            assert isinstance(gradient, OneStep)
            vs = gs
        grads = [f.pull_back(s.point, v) for f, s, v in zip(blocks, solves, vs, strict=True)]
    W, U, b = (sum(getattr(each, name) for each in grads) for name in "WUb")
    return Answer(torch.stack(values), torch.stack(solutions), W, U, b, torch.stack([g.x for g in grads]), starts)
