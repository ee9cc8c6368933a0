"""The map at its solution: one recorded evaluation, and products with its Jacobians.

Note [Products]
With `out = f(z)` recorded once, `J^T u` is autograd's vector-Jacobian product. It is linear in `u`, so
differentiating it once more with respect to `u` gives `J v`: no forward-mode formulas are needed, only a backward that
can be differentiated. The fused attention kernels cannot, so the evaluation uses the one made of plain operations,
whose values are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from phantomgrad._errors import PhantomGradError
from phantomgrad._report import OnFailure
from phantomgrad._samples import Samples
from phantomgrad._solution import Solution
from phantomgrad._state import Leaves, State, detach
from phantomgrad.diagnostics._subject import Subject
from phantomgrad.gradients import Gradient
from phantomgrad.gradients._base import Problem
from phantomgrad.solvers import Solver


class Linearisation:
    """The map near one point. Rows are states laid out by `Samples.to_matrix`, shape (samples, entries)."""

    def __init__(self, problem: Problem, variables: dict[str, Tensor], solution: Solution) -> None:
        self.solution = solution
        self.point = tuple(leaf.detach().clone().requires_grad_() for leaf in problem.solved.point)
        torch.clear_autocast_cache()  # casts cached without grad would cut the evaluation off from the parameters
        with sdpa_kernel(SDPBackend.MATH):
            self.image = problem.evaluate(self.point)
        self._evaluate = problem.evaluate
        self.variables = variables
        self.rounding = problem.tolerance_dtype
        self.samples = problem.samples
        self.coupled = self._couples_samples()
        if self.coupled:
            self.samples = Samples(self.point, None)
        self._transposed: tuple[Leaves, list[Tensor | None]] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Samples, and entries of each."""
        total = sum(leaf.numel() for leaf in self.point)
        return self.samples.count, total // self.samples.count

    def rows(self, leaves: Leaves) -> Tensor:
        return self.samples.to_matrix(leaves)

    def leaves(self, rows: Tensor) -> Leaves:
        return self.samples.from_matrix(rows)

    def random_rows(self, seed: int) -> Tensor:
        """Normal rows that depend on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator, dtype=self.samples.dtype).to(self.samples.device)

    # -- products ----------------------------------------------------------------------------------------------------

    def vjp(self, cotangent: Leaves) -> Leaves:
        """`J^T g`: the paper's `J g`."""
        return _filled(_grad(self.image, self.point, cotangent), self.point)

    def vjp_rows(self, rows: Tensor, damping: float = 1.0, power: int = 1) -> Tensor:
        """`power` products with `B = damping J + (1 - damping) I` from the left."""
        for _ in range(power):
            rows = torch.lerp(rows, self.rows(self.vjp(self.leaves(rows))), damping)
        return rows

    def jvp_rows(self, rows: Tensor, damping: float = 1.0, power: int = 1) -> Tensor:
        """`power` products with `B` from the right."""
        for _ in range(power):
            rows = torch.lerp(rows, self._push(dict(enumerate(self.leaves(rows)))), damping)
        return rows

    def variables_vjp(self, cotangent: Leaves) -> list[Tensor | None]:
        """`dF/dz` times a cotangent, for every variable; None where it plays no part."""
        return _grad(self.image, tuple(self.variables.values()), cotangent)

    def variables_jvp_rows(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """The change of the image when the variables change by `tangents`."""
        first = len(self.point)
        return self._push({first + i: tangent for i, tangent in enumerate(tangents) if tangent is not None})

    def _push(self, tangents: dict[int, Tensor]) -> Tensor:
        """The derivative of the image along tangents of the point's leaves and then the variables. See Note
        [Products]."""
        try:
            if self._transposed is None:
                cotangent = tuple(torch.zeros_like(leaf).requires_grad_() for leaf in self.image)
                pulled = _grad(self.image, (*self.point, *self.variables.values()), cotangent, create_graph=True)
                self._transposed = cotangent, pulled
                self._verify_transpose()
            return self._pushed(tangents)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, (torch.OutOfMemoryError, PhantomGradError)):
                raise
            raise _cannot_push(str(error).splitlines()[0]) from error

    def _pushed(self, tangents: dict[int, Tensor]) -> Tensor:
        assert self._transposed is not None
        cotangent, pulled = self._transposed
        used = [(product, t) for i, t in tangents.items() if (product := pulled[i]) is not None]
        used = [(product, t) for product, t in used if product.requires_grad]
        if not used:
            return torch.zeros_like(self.rows(self.point))
        return self.rows(_filled(_grad([p for p, _ in used], cotangent, [t for _, t in used]), self.point))

    def _verify_transpose(self) -> None:
        """Where a backward is not differentiable, autograd may answer zero rather than raise; so see whether `<u, A A^T u>`
        is `||A^T u||^2`."""
        cotangent = self.random_rows(0)
        pulled = _grad(self.image, (*self.point, *self.variables.values()), self.leaves(cotangent))
        norms = [
            torch.linalg.vector_norm(part, dtype=self.samples.dtype).square() for part in pulled if part is not None
        ]
        expected = torch.stack(norms).sum() if norms else torch.zeros(())
        there_and_back = (cotangent * self._pushed({i: p for i, p in enumerate(pulled) if p is not None})).sum()
        tolerance = max(1e-3, 20 * torch.finfo(self.rounding).eps) * expected
        if expected.isfinite() and not (there_and_back - expected).abs() <= tolerance:
            raise _cannot_push("its second derivatives are not those of its first")

    def is_repeatable(self) -> bool:
        """Whether a second evaluation at the same point returns the same image, up to rounding."""
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            again = self._evaluate(self.point)
        change = self.samples.norm(tuple(map(torch.sub, again, self.image))).max()
        return bool(change <= 100 * torch.finfo(self.rounding).eps * self.samples.norm(self.image).max())

    def _couples_samples(self) -> bool:
        """Whether a change of some samples changes the image of others."""
        if self.samples.count < 2:
            return False
        cotangent = self.random_rows(0)
        chosen = torch.rand(self.samples.count, generator=torch.Generator().manual_seed(1)).argsort() % 2 == 0
        chosen = chosen.to(cotangent.device).unsqueeze(1)
        leaks = [
            torch.where(mask, 0.0, self.vjp_rows(torch.where(mask, cotangent, 0.0))).abs().amax()
            for mask in (chosen, ~chosen)
        ]
        scale = self.vjp_rows(cotangent).abs().amax()
        return bool(torch.stack(leaks).amax() > 100 * torch.finfo(scale.dtype).eps * scale)


@dataclass(frozen=True, kw_only=True)
class _Capture(Gradient):
    """Not a gradient: keeps the solved problem for further evaluations."""

    problems: list[Problem] = field(default_factory=list[Problem])

    def connect(self, problem: Problem) -> Leaves:
        self.problems.append(problem)
        return detach(problem.solved.image)

    without_grad = connect


def linearise(
    subject: Subject,
    *,
    solver: Solver | None = None,
    start: State | None = None,
    on_failure: OnFailure | None = None,
    warn_of_coupling: bool = True,
) -> Linearisation:
    """Solve, and record the map at the solution; warns where it couples the samples that it was said to keep apart."""
    capture = _Capture()
    solution = subject.solve(capture, solver=solver, start=start, on_failure=on_failure)
    at = Linearisation(capture.problems[-1], subject.variables, solution)
    if warn_of_coupling and at.coupled:
        warnings.warn(_coupled(subject.call.batch_dim), stacklevel=3)
    return at


def _cannot_push(reason: str) -> PhantomGradError:
    return PhantomGradError(
        "Products with the Jacobian from the right need a map whose backward can be differentiated again; this one's "
        f"cannot: {reason}."
    )


def _coupled(batch_dim: int | None) -> str:
    return (
        f"The map couples the samples along batch_dim={batch_dim}, so all of them are measured as one. Pass "
        "batch_dim=None if that is intended (graphs, sequences first); batch norm does it in training mode."
    )


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangent: Sequence[Tensor], *, create_graph: bool = False
) -> list[Tensor | None]:
    """Vector-Jacobian products that leave the graph for further ones; None for inputs that play no part."""
    connected = [(out, g) for out, g in zip(outputs, cotangent, strict=True) if out.requires_grad]
    if not connected or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [out for out, _ in connected],
            inputs,
            [g for _, g in connected],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    )


def _filled(products: Sequence[Tensor | None], like: Leaves) -> Leaves:
    return tuple(
        torch.zeros_like(leaf) if product is None else product.detach()
        for product, leaf in zip(products, like, strict=True)
    )
