"""The page that a newcomer sees first: what it finds, what it advises, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import (
    AdaptivePhantom,
    Anderson,
    Backprop,
    Broyden,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    Shine,
    StateMismatchError,
    UnrolledPhantom,
    attach,
)
from phantomgrad.diagnostics import CheckReport, check, spectral_radius


class Linear(nn.Module):
    """`f(z, x) = z J^T + x` with a trainable `J`."""

    def __init__(self, J: Tensor) -> None:
        super().__init__()
        self.J = nn.Parameter(J.to(DTYPE))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.J.T + x


def _diagonal(*eigenvalues: float) -> Linear:
    return Linear(torch.diag(torch.tensor(eigenvalues)))


def _examine(cell: Any, **options: Any) -> CheckReport:
    x = torch.ones(2, cell.J.shape[0], dtype=DTYPE)
    return check(cell, torch.zeros_like(x), x, show=False, **options)


def _says(report: CheckReport, text: str) -> bool:
    return any(text in sentence for sentence in report.advice)


# -- findings -----------------------------------------------------------------------------------------------------------


def test_a_block_that_settles() -> None:
    report = _examine(_diagonal(0.5, -0.3, 0.1))
    assert report.settles
    assert report.chosen.solver == FixedPointIteration()
    assert float(report.radius) == pytest.approx(0.5)
    assert report.norm is not None
    assert float(report.norm) == pytest.approx(0.5)
    assert not report.coupled
    assert report.repeatable
    assert (report.samples, report.entries, report.variables) == (2, 3, {"J": 9})
    plain = report.solvers[0]
    assert plain.settles
    assert not plain.diverges
    # The error shrinks by the spectral radius, so 1e-8 takes about 27 steps.
    assert 24 <= plain.steps <= 30
    assert plain.residual[9] / plain.residual[8] == pytest.approx(0.5, rel=0.02)
    assert plain.after(9) == plain.residual[8]
    assert plain.after(1000) == plain.residual[-1]
    assert plain.best == pytest.approx(plain.residual.min().item())
    assert _says(report, f"FixedPointIteration(damping=1.0) settles every sample within {plain.steps} steps.")
    names = [type(trial.gradient) for trial in report.gradients]
    assert {OneStep, UnrolledPhantom, NeumannPhantom, KrylovPhantom, Implicit} <= set(names)
    exact = report.gradients[names.index(Implicit)]
    assert exact.alignment.cosine == pytest.approx(1.0, abs=1e-6)
    assert all(trial.seconds is not None and trial.seconds > 0 for trial in report.gradients)
    assert repr(report) == f"CheckReport(Linear settles in {plain.steps} steps, spectral radius 0.5)"


def test_a_block_that_wants_damping() -> None:
    report = _examine(_diagonal(-1.3, 0.2, 0.1))
    assert not report.solvers[0].settles
    # max(|1 - d - 1.3 d|, |1 - d + 0.2 d|) is smallest at d = 2 / 3.1, of the tenths at 0.6.
    assert report.damping == 0.6
    assert float(report.damped_radius) == pytest.approx(0.52)
    damped = next(trial for trial in report.solvers if trial.solver == FixedPointIteration(damping=0.6))
    assert damped.settles
    assert _says(report, "Plain iteration wants damping=0.6: a step then multiplies the error by 0.52 instead of 1.3.")
    assert _says(report, "FixedPointIteration(damping=1.0) does not settle within 50 steps, but ")
    assert any(trial.gradient == UnrolledPhantom(damping=0.6) for trial in report.gradients)


def test_a_complex_pair_near_the_imaginary_axis() -> None:
    J = torch.tensor([[0.0, -1.2], [1.2, 0.0]])
    report = _examine(Linear(J))
    assert float(report.radius) == pytest.approx(1.2)
    # |1 - d + 1.2 d i|^2 is smallest at d = 1 / 2.44.
    assert report.damping == 0.4
    assert float(report.damped_radius) == pytest.approx((0.6**2 + 0.48**2) ** 0.5)
    assert "leading eigenvalue" in str(report)
    assert "+- 1.2i" in str(report)


def test_a_block_that_no_damping_settles() -> None:
    report = _examine(_diagonal(1.4, 0.2))
    assert report.damping is None
    assert float(report.damped_radius) >= 1
    assert report.solvers[0].diverges or not report.solvers[0].settles
    assert report.chosen.settles  # a linear map of two entries is easy for Anderson
    assert isinstance(report.chosen.solver, (Anderson, Broyden))
    assert _says(
        report, "No damping up to 1 makes plain iteration contract: at best, 0.1, the spectral radius is 1.04 "
    )
    assert report.gradients  # at the solution that Anderson found
    assert report.chosen.best < 1e-6


class NoSolution(nn.Module):
    """`f(z) = z + 1 + w`, which has no fixed point."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return z + 1 + self.w


def test_a_block_without_a_solution() -> None:
    report = check(NoSolution(), torch.zeros(2, 3), show=False, max_steps=5)
    assert not report.settles
    assert report.gradients == ()
    assert _says(report, "Nothing that was tried settles; the closest is ")
    assert _says(
        report, "No gradients were compared: far from a solution they mean nothing; make the block settle first."
    )
    assert repr(report) == "CheckReport(NoSolution does not settle, spectral radius 1)"
    assert all(trial.solver.max_steps == 5 for trial in report.solvers)


def test_a_slow_block_says_how_slow() -> None:
    report = _examine(_diagonal(*([0.97] * 3)), max_steps=1)
    assert not report.settles
    # log(10) / -log(0.97) = 75.6
    assert _says(report, "every further digit takes plain iteration about 76 steps: raise max_steps")


def test_a_singular_adjoint_leaves_the_gradients_out() -> None:
    cell = _diagonal(1.0, 0.5)
    start = torch.zeros(2, 2, dtype=DTYPE)
    report = check(cell, start, torch.tensor([[0.0, 1.0]] * 2, dtype=DTYPE), show=False)
    assert report.settles
    assert report.gradients == ()
    assert _says(
        report, "No gradients were compared: the exact adjoint could be solved only to a relative residual of "
    )


def test_a_block_that_is_far_from_normal() -> None:
    J = torch.diag(torch.linspace(-0.3, 0.3, 6)) + torch.diag(torch.full((5,), 2.0), 1)
    report = _examine(Linear(J), max_steps=200)
    assert report.norm is not None
    assert float(report.norm) == pytest.approx(torch.linalg.matrix_norm(J, 2).item(), rel=0.01)
    assert _says(report, "The block is far from normal (2-norm 2.")


def test_a_norm_little_above_one_is_not_far_from_normal() -> None:
    J = torch.tensor([[0.5, 0.8], [0.0, 0.5]])
    report = _examine(Linear(J), max_steps=200)
    assert report.norm is not None
    assert 1 < float(report.norm) < 1.1
    assert not _says(report, "far from normal")


def test_your_poor_gradient_is_named() -> None:
    cell = Linear(torch.tensor([[0.0, 0.95], [-0.95, 0.0]]))
    attach(cell, OneStep(), solver=FixedPointIteration(damping=0.5, max_steps=300))
    report = _examine(cell)
    yours = next(trial for trial in report.gradients if trial.gradient == OneStep())
    assert yours.alignment.cosine < 0.9
    assert _says(report, f"Your OneStep() has a cosine of {yours.alignment.cosine:.2f} with the exact gradient")
    assert "OneStep() (yours)" in str(report)
    assert report.solvers[0].solver == FixedPointIteration(damping=0.5, max_steps=300)
    assert _says(report, "Your FixedPointIteration(max_steps=300, damping=0.5) settles every sample within ")


def test_every_solver_gets_the_tolerance_of_your_own() -> None:
    cell = _diagonal(0.5, -0.3)
    attach(cell, solver=FixedPointIteration(max_steps=7, rtol=1e-2, atol=1e-3))
    report = _examine(cell)
    assert {(trial.solver.rtol, trial.solver.atol) for trial in report.solvers} == {(1e-2, 1e-3)}
    assert [trial.solver.max_steps for trial in report.solvers] == [7, 50, 50, 50, 50]
    assert {t.solver.max_steps for t in _examine(cell, max_steps=30).solvers} == {30}
    taking_the_start = _examine(_diagonal(0.5), solver=FixedPointIteration(max_steps=0))
    assert taking_the_start.solvers[0].solver == FixedPointIteration()
    assert taking_the_start.settles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype: torch.dtype) -> None:
    cell = _diagonal(0.5, -0.3, 0.1).to(dtype)
    x = torch.ones(2, 3, dtype=dtype)
    report = check(cell, torch.zeros_like(x), x, show=False)
    assert report.settles
    assert float(report.radius) == pytest.approx(0.5, rel=0.02)
    assert min(trial.alignment.cosine for trial in report.gradients) > 0.8


@pytest.mark.parametrize(
    ("gradient", "solver"),
    [
        (Implicit(), FixedPointIteration(max_steps=100)),
        (AdaptivePhantom(), FixedPointIteration(max_steps=100)),
        (Backprop(steps=60), FixedPointIteration()),
        (Shine(), Broyden()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_attached_gradient_has_its_row(gradient: Gradient, solver: Any) -> None:
    cell = _diagonal(0.5, -0.3, 0.1)
    attach(cell, gradient, solver=solver)
    report = _examine(cell)
    yours = next(trial for trial in report.gradients if trial.gradient == gradient)
    assert yours.alignment.cosine > 0.97
    assert " (yours)" in str(report)


def test_the_loss_decides_what_is_compared() -> None:
    cell = _diagonal(0.5, -0.5)
    first = _examine(cell, loss=lambda z: z[:, 0].sum())
    second = _examine(cell, loss=lambda z: z[:, 1].sum())
    # For one eigenvector the one-step gradient is the exact one times 1 - eigenvalue.
    ratios = [
        next(trial.alignment.norm_ratio for trial in report.gradients if trial.gradient == OneStep())
        for report in (first, second)
    ]
    assert ratios == pytest.approx([0.5, 1.5])
    assert "GRADIENTS of the loss" in str(first)
    assert "GRADIENTS of a random cotangent" in str(_examine(cell))


# -- what is wrong with a block -----------------------------------------------------------------------------------------


def test_coupled_samples_are_noticed() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.4))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.w * (z + z.roll(1, dims=0)) + x

    report = check(Chain(), torch.zeros(6, 2), torch.ones(6, 2), show=False)
    assert report.coupled
    assert _says(report, "The map couples the samples, so they cannot stop one by one: attach it with batch_dim=None")
    assert float(report.radius) == pytest.approx(0.8, rel=1e-3)
    assert not check(Chain(), torch.zeros(6, 2), torch.ones(6, 2), batch_dim=None, show=False).coupled


def test_a_forward_that_is_no_map_is_noticed() -> None:
    class Noisy(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * z + x + 0.1 * random.random()

    report = check(Noisy(), torch.zeros(2, 3), torch.ones(2, 3), show=False)
    assert not report.repeatable
    assert _says(report, "Two evaluations at the same state differ, so there is no fixed point to find")


def test_a_first_evaluation_that_is_not_finite_is_said_first() -> None:
    class Broken(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 1 / z

    report = check(Broken(), torch.zeros(2, 3), show=False)
    assert report.advice == (
        "The first evaluation is not finite already: look for an overflow or a division by zero in the forward, or take "
        "another start.",
    )
    assert "diverges" in str(report)


def test_nothing_to_train_is_said() -> None:
    report = check(lambda z: 0.5 * z + 1, torch.zeros(2, 3), show=False)
    assert report.where == "<lambda>"
    assert report.variables == {}
    assert _says(
        report, "No gradients were compared: no parameter requires grad and no input is a floating-point tensor."
    )


def test_a_whole_model_in_place_of_its_cell_gets_a_hint() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = _diagonal(0.5, 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(torch.zeros_like(x), x).sum(dim=1)

    model = Model()
    attach(model.cell)
    with pytest.raises(StateMismatchError, match="A fixed point needs the same structure") as caught:
        check(model, torch.ones(2, 2, dtype=DTYPE))
    assert caught.value.__notes__ == [
        "Model is not attached, but Model.cell (Linear) inside it is: check that one, with the arguments that it is called with."
    ]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_steps of CheckOptions must be an integer of at least 1, got 0\.$"):
        check(_diagonal(0.5), torch.zeros(1, 1, dtype=DTYPE), torch.zeros(1, 1, dtype=DTYPE), max_steps=0)
    with pytest.raises(TypeError, match=r"^Diagnostics take an "):
        check(3, torch.zeros(1))  # type: ignore[arg-type]


# -- the page -----------------------------------------------------------------------------------------------------------


def test_the_page_is_printed_once_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    cell = _diagonal(-1.3, 0.2, 0.1)
    x = torch.ones(2, 3, dtype=DTYPE)
    report = check(cell, torch.zeros_like(x), x)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    lines = printed.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 125
    assert lines[0] == "phantomgrad check of Linear, not attached"
    assert lines[1] == "state (2, 3) float64 on cpu: 2 samples of 3 entries; gradients for 9 numbers in 1 tensor"
    for heading in ("DOES IT SETTLE?", "THE JACOBIAN at the solution", "GRADIENTS of a random cotangent", "ADVICE"):
        assert sum(line.startswith(heading) for line in lines) == 1
    row = next(line for line in lines if line.startswith("  FixedPointIteration(damping=1.0)"))
    assert ">50" in row
    assert "0/2" in row
    check(cell, torch.zeros_like(x), x, show=False)
    assert capsys.readouterr().out == ""


def test_the_whole_path_of_the_module_is_shown() -> None:
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"cell": _diagonal(0.5, 0.1)})})
    report = check(model["backbone"]["cell"], torch.zeros(1, 2, dtype=DTYPE), torch.ones(1, 2, dtype=DTYPE), show=False)
    assert report.where == "ModuleDict.backbone.cell (Linear)"


def test_states_outputs_and_keywords() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, h: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
            a, b = h[0], h[1]["b"]
            return {"aux": 1, "state": (self.w * b + x, {"b": 0.5 * a})}

    cell, x = Cell(), torch.ones(2, 3)
    start = (torch.zeros(2, 3), {"b": torch.zeros(2, 3)})
    reports = [
        check(cell, x, start, state="h", output="state", show=False),
        check(cell, x, state="h", output="state", kwargs={"h": start}, show=False),
    ]
    with attach(cell, state=1, output="state"):
        reports.append(check(cell, x, start, show=False))
    for report in reports:
        assert report.settles
        assert float(report.radius) == pytest.approx(0.5, rel=1e-3)  # the square root of 0.5 * 0.5
        assert report.entries == 6
    assert not reports[0].gradient


def test_the_documentation_runs_as_printed_and_shows_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "diagnostics.md", "exec"), namespace)
    printed = capsys.readouterr().out
    [shown] = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)

    def rows(page: str) -> list[str]:  # headings and the first column: numbers depend on the machine
        return [re.split(r"\s{2,}", line.strip())[0] for line in page.split("ADVICE")[0].splitlines()]

    assert rows(str(namespace["report"])) == rows(shown)
    assert printed.startswith(str(namespace["report"]))
    assert [step for step, _ in namespace["history"]] == [10, 20]
    for key in re.findall(
        r"`(\w+)`", "".join(re.findall(r"^\| (`.*?`.*?) \|", text.split("when to act")[1], re.MULTILINE))
    ):
        logged = f"cell/{key}" in namespace["history"][1][1]
        assert logged or key == "adjoint_steps", key


# -- no trace -----------------------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Everything that a forward may change: running statistics, dropout, parametrizations, an own counter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4).double())
        self.inputs = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4).double())
        self.norm = nn.BatchNorm1d(4).double()
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("alias", self.norm.running_mean, persistent=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(0.3 * self.linear(self.dropout(z)) + self.norm(self.inputs(x)))


def _everything(cell: nn.Module) -> dict[str, Any]:
    return {
        "parameters": [(id(p), p._version, p.detach().clone(), p.grad) for p in cell.parameters()],
        "buffers": [
            (id(b), b._version, b.clone()) for m in cell.modules() for b in m._buffers.values() if b is not None
        ],
        "training": [m.training for m in cell.modules()],
        "dictionaries": [list(m.__dict__) for m in cell.modules()],
        "forwards": [m.__dict__.get("forward") for m in cell.modules()],
        "hooks": [len(m._forward_hooks) for m in cell.modules()],
        "generator": torch.get_rng_state(),
        "python": random.getstate(),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or a == b


MEASURES: dict[str, Callable[..., Any]] = {
    "check": lambda cell, *inputs: check(cell, *inputs, show=False, max_steps=10),
    "spectral_radius": lambda cell, *inputs: spectral_radius(cell, *inputs),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("attached", [False, True], ids=["bare", "attached"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.filterwarnings("ignore:The map couples the samples:UserWarning")
def test_nothing_changes(measure: str, attached: bool, training: bool) -> None:
    cell = Stateful().train(training)
    x = torch.randn(5, 3, dtype=DTYPE, requires_grad=True)
    start = torch.zeros(5, 4, dtype=DTYPE)
    gradient, solver = NeumannPhantom(steps=2), Anderson(max_steps=9)
    attachment = attach(cell, gradient, solver=solver, on_failure="ignore") if attached else None
    z = cell(start, x)
    z.sum().backward()  # .grad exists, and the graph has saved buffers
    pending = cell(start, x)
    grads = [None if p.grad is None else p.grad.clone() for p in cell.parameters()]
    solution = attachment.solution if attachment else None
    unconverged = attachment.unconverged if attachment else 0
    x_grad = x.grad.clone()
    before = _everything(cell)

    MEASURES[measure](cell, start, x)

    after = _everything(cell)
    for name, value in before.items():
        assert _same(value, after[name]), name
    for parameter, grad in zip(cell.parameters(), grads, strict=True):
        assert _same(parameter.grad, grad)
    assert torch.equal(x.grad, x_grad)
    assert x.requires_grad
    assert not start.requires_grad
    if attachment is not None:
        assert (attachment.gradient, attachment.solver) == (gradient, solver)
        assert attachment.solution is solution
        assert attachment.unconverged == unconverged
    pending.sum().backward()  # what the graph has saved is as it was


@pytest.mark.filterwarnings("ignore:The map couples the samples:UserWarning")
def test_nothing_changes_when_it_fails() -> None:
    class Failing(Stateful):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            super().forward(z, x)
            raise RuntimeError("broken")

    cell = Failing().train()
    before = _everything(cell)
    with pytest.raises(RuntimeError, match="broken"):
        check(cell, torch.zeros(5, 4, dtype=DTYPE), torch.ones(5, 3, dtype=DTYPE))
    assert _same(before, _everything(cell))


def test_bare_and_attached_modules_get_the_same_answers() -> None:
    bare = _diagonal(-0.9, 0.4, 0.1)
    attached = copy.deepcopy(bare)
    attach(attached)
    reports = [_examine(cell) for cell in (bare, attached)]
    assert float(reports[0].radius) == float(reports[1].radius)
    assert reports[0].damping == reports[1].damping
    assert [t.steps for t in reports[0].solvers] == [t.steps for t in reports[1].solvers]
    cosines = [{t.gradient: t.alignment.cosine for t in report.gradients} for report in reports]
    assert cosines[0] == cosines[1]
    assert reports[0].gradient is None
    assert reports[1].gradient == UnrolledPhantom()


def test_the_report_keeps_neither_module_nor_graph() -> None:
    cell = _diagonal(0.5, 0.1)
    report = _examine(cell)
    gone = weakref.ref(cell)
    del cell
    assert gone() is None
    assert "Linear" in str(report)


# torch 2.11 warns about its own use of torch.jit when the compiler is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_dropout_and_compiled_attachments_can_be_checked() -> None:
    cell = Stateful().train()
    cell.norm.eval()
    x, start = torch.randn(5, 3, dtype=DTYPE), torch.zeros(5, 4, dtype=DTYPE)
    report = check(cell, start, x, show=False)
    assert report.repeatable
    assert not report.coupled
    assert next(t.alignment.cosine for t in report.gradients if isinstance(t.gradient, Implicit)) > 0.999

    compiled = _diagonal(0.5, 0.1)
    attach(compiled, compile=True)
    assert _examine(compiled).settles
