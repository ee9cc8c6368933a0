"""The core that `torchdeq.get_deq(core="phantom")` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from phantomgrad._attach import Attachment, attach, attachments
from phantomgrad._state import State, Structure
from phantomgrad.diagnostics import spectral_radius
from phantomgrad.gradients import Gradient, Implicit, OneStep, UnrolledPhantom
from phantomgrad.solvers import FixedPointIteration, Solver
from phantomgrad.torchdeq._gradients import SupervisedPhantom, Writer, WrittenImplicit
from phantomgrad.torchdeq._options import OPTIONS, DEQOptions
from phantomgrad.torchdeq._solver_kwargs import for_this_call
from phantomgrad.torchdeq._watch import Watch

Info = dict[str, Tensor]
_HERE = FixedPointIteration(max_steps=0)
"""Takes the start itself as the solution."""


class Map(nn.Module):
    """The map of the current call; attached, so that it settles."""

    def forward(self, state: State, step: Callable[[State], Any], owner: nn.Module) -> Any:
        # An attachment does not keep its module alive, but a backward pass that evaluates again needs it: hence `owner`.
        return step(state)


class PhantomDEQ(nn.Module):
    """A torchdeq core that solves and differentiates with phantomgrad.

    `deq(func, z_init)` returns `(states, info)`. In training `states` lists the states that `n_states`, `indexing`, `sup_gap`
    and `sup_loc` ask for, the solution last, with their gradients; in evaluation the solution alone, without one. A state is a
    tensor, or a list of tensors that `func` takes one by one, or a dict that it takes as one. `info` has torchdeq's
    keys and shapes, those of the last solve.

    `deq.attachment` is the handle of the solve: its `gradient`, `solver` and `eval_solver` are assignable. torchdeq's
    options can be read as attributes, but not assigned.
    """

    def __init__(self, options: DEQOptions) -> None:
        super().__init__()
        self.options = options
        self.map = Map()
        attach(
            self.map,
            options.gradients()[-1],
            solver=options.forward_solver(),
            eval_solver=options.eval_solver(),
            batch_dim=options.batch_dim,
            on_failure=options.on_failure,
        )

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options")
        if options is not None and name in OPTIONS and name not in ("gradient", "solver"):
            return getattr(options, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            raise AttributeError(
                f"{name} of a deq cannot be assigned. Assign deq.attachment.solver, .eval_solver or .gradient, or pass "
                "solver_kwargs={'f_max_iter': ...} to a call."
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{self.attachment.gradient}, solver={self.attachment.solver}"

    @property
    def attachment(self) -> Attachment:
        """The handle of the solve."""
        return next(attachments(self.map))

    def forward(
        self,
        func: Callable[..., Any],
        z_init: State,
        solver_kwargs: dict[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Writer | None = None,
    ) -> tuple[list[State], Info]:
        """Solve `z = func(z)` from `z_init`.

        solver_kwargs: options of the solver for this call: `f_max_iter` and `return_final`; `tau` of fixed-point iteration
            and Anderson, `m` of Anderson, `LBFGS_thres` of Broyden.
        sradius_mode: in evaluation, estimate the spectral radius at the solution: `info["sradius"]`.
        backward_writer: called in backward with the `info` of an exact gradient's adjoint solve.
        """
        step, z = _as_map_of_one_argument(func, z_init)
        if not self.attachment.gradient.records_solve:
            z = _detached(z)
        if self.training:
            return self._train(step, z, solver_kwargs or {}, backward_writer)
        attachment = self.attachment
        solver = for_this_call(attachment.eval_solver or attachment.solver, solver_kwargs or {})
        with torch.no_grad():
            state, info = self._solve(step, z, attachment.gradient, solver)
        info["sradius"] = torch.zeros(1, device=info["abs_lowest"].device)
        if sradius_mode:
            info["sradius"] = spectral_radius(step, state, solver=_HERE, batch_dim=self.options.batch_dim).value
        return [state], info

    def _train(
        self, step: Callable[[State], Any], z: State, solver_kwargs: dict[str, Any], writer: Writer | None
    ) -> tuple[list[State], Info]:
        attachment = self.attachment
        solver = for_this_call(attachment.solver, solver_kwargs)
        gradients = [*self.options.gradients()[:-1], attachment.gradient]
        gradients = [self._in_training(gradient, solver, writer) for gradient in gradients]
        budgets = self.options.budgets(solver.max_steps)
        if len(budgets) > 1 and self.options.core == "phantom-indexing":
            return self._take_from_one_solve(step, z, gradients, solver, budgets)
        states: list[State] = []
        info: Info = {}
        for gradient, budget in zip(gradients, budgets, strict=True):
            value, info = self._solve(step, z, gradient, replace(solver, max_steps=budget))
            states += self._returned(value, gradient)
            z = _detached(states[-1])
        return states, info

    def _take_from_one_solve(
        self,
        step: Callable[[State], Any],
        z: State,
        gradients: list[Gradient],
        solver: Solver,
        taken: list[int],
    ) -> tuple[list[State], Info]:
        watch = self._watch(step, z, OneStep(), solver, taken)
        with torch.no_grad():
            self._settle(watch, z, OneStep(), solver)
        solution = self.attachment.solution
        assert solution is not None
        info = watch.finish(solution)
        states: list[State] = []
        for gradient, state in zip(gradients, watch.states, strict=True):
            value = self._settle(step, state, gradient, _HERE)
            states += self._returned(value, gradient)
        return states, info

    def _in_training(self, gradient: Gradient, solver: Solver, writer: Writer | None) -> Gradient:
        """What stands for `gradient` in a call in training mode."""
        options = self.options
        if isinstance(gradient, Implicit):
            # Slices may leave the forward solver no steps, so the adjoint's is fixed here.
            gradient = replace(gradient, solver=gradient.solver or solver)
            return (
                gradient
                if writer is None
                else WrittenImplicit(implicit=gradient, writer=writer, stop_mode=options.b_stop_mode)
            )
        if writer is not None and (options.ift or options.hook_ift):
            raise ValueError(
                "backward_writer needs a b_solver that measures its steps, b_solver='simple_fixed_point_iter' does not."
            )
        if not isinstance(gradient, UnrolledPhantom):
            return gradient
        if options.sup_gap > 0:
            at = tuple(range(options.sup_gap, gradient.steps + 1, options.sup_gap))
        else:
            at = options.sup_locations
        if at:
            return SupervisedPhantom(steps=gradient.steps, damping=gradient.damping, at=at)
        # torchdeq's training returns the refined state whether grad mode is on or off.
        return replace(gradient, refine_in_eval=True)

    def _returned(self, value: State, gradient: Gradient) -> list[State]:
        """The states that one solve contributes, given its solution."""
        if not isinstance(gradient, SupervisedPhantom):
            return [value]
        structure = Structure.of(value)
        kept = [structure.unflatten(leaves) for leaves in gradient.kept]
        gradient.kept.clear()
        return kept if self.options.sup_gap > 0 else [*kept, value]

    def _watch(
        self, step: Callable[[State], Any], z: State, gradient: Gradient, solver: Solver, sampled: list[int]
    ) -> Watch:
        return Watch(
            step,
            z,
            self.options.batch_dim,
            solver=gradient.solver_for(solver) if gradient.records_solve else solver,
            recorded=gradient.records_solve,
            stop_mode=self.options.f_stop_mode,
            monitored=self.options.monitored,
            sampled=sampled,
        )

    def _solve(self, step: Callable[[State], Any], z: State, gradient: Gradient, solver: Solver) -> tuple[State, Info]:
        watch = self._watch(step, z, gradient, solver, [])
        value = self._settle(watch, z, gradient, solver)
        solution = self.attachment.solution
        assert solution is not None
        return value, watch.finish(solution)

    def _settle(self, step: Callable[[State], Any], z: State, gradient: Gradient, solver: Solver) -> State:
        with self.attachment.using(gradient=gradient, solver=solver):
            return self.map(z, step, self)


def _as_map_of_one_argument(func: Callable[..., Any], z_init: State) -> tuple[Callable[[State], Any], State]:
    """`func` as a function of the state, and the start."""
    if not isinstance(z_init, (tuple, list)):
        return func, z_init

    def step(state: State) -> Any:
        image = func(*state)
        return list(image) if isinstance(image, (tuple, list)) else image

    return step, list(z_init)


def _detached(state: State) -> State:
    structure = Structure.of(state)
    return structure.unflatten(tuple(leaf.detach() for leaf in structure.flatten(state) or ()))
