"""What a module computes or updates once per solve although it is evaluated many times."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from phantomgrad._batch_statistics import BatchStatistics, NormBase, couples_samples
from phantomgrad._parametrizations import SharedParametrizations, parametrizations_of


class OncePerSolve:
    """The parametrized weights and running statistics of one call; as a context it covers one evaluation.

    With `ahead` the weights are computed now rather than at their first use, which a compiled evaluation could not share.
    See Note [Parametrizations] and Note [Batch statistics].
    """

    def __init__(self, module: nn.Module, *, ahead: bool = False) -> None:
        parametrizations: dict[ParametrizationList, bool] = {}
        norms: list[NormBase] = []
        for each in module.modules():
            if "parametrizations" in each._modules:
                parametrizations.update(parametrizations_of(each))
            if isinstance(each, NormBase) and each.training and each.track_running_stats:
                norms.append(each)
        self.couples_samples = any(map(couples_samples, module.modules()))
        """Whether the samples of a batch depend on each other, or an update on all of them."""
        self._shared = SharedParametrizations(parametrizations) if parametrizations else None
        self._statistics = BatchStatistics(norms) if norms else None
        self.needed = bool(parametrizations or norms)
        if ahead and self._shared is not None:
            self._shared.compute()

    @contextmanager
    def __call__(self, *, constant: bool = False) -> Generator[None, None, None]:
        """One evaluation; with `constant` no gradient goes to the weights."""
        with (
            self._shared(constant=constant) if self._shared else nullcontext(),
            self._statistics() if self._statistics else nullcontext(),
        ):
            yield

    def prepare(self) -> None:
        """Compute the weights that no evaluation has computed."""
        if self._shared is not None:
            self._shared.compute()

    def solved(self) -> None:
        """The next evaluation is that of the solution."""
        if self._statistics is not None:
            self._statistics.solved()

    def commit(self) -> None:
        """After the solve: make the one update of the running statistics."""
        if self._statistics is not None:
            self._statistics.commit()
