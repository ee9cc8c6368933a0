"""What attach, its decorator and its handle refuse."""

from __future__ import annotations

import pytest
from attached_model import Cell, Model, batch

from phantomgrad import AttachError, attach, equilibrium


def test_attaching_is_refused_without_a_trace() -> None:
    model = Model()
    before = dict(model.cell.__dict__)
    with pytest.raises(
        AttachError, match=r"^attach takes an nn\.Module, got a function\. For a function use fixed_point"
    ):
        attach(lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(AttachError, match=r"^attach takes an nn\.Module, got the class Cell\."):
        attach(Cell)  # type: ignore[arg-type]
    with pytest.raises(
        AttachError, match=r"Model\.cell \(Cell\) has no argument state='h': its forward takes \(z: .*x: "
    ):
        attach(model.cell, state="h")
    with pytest.raises(AttachError, match=r"has no argument state=2"):
        attach(model.cell, state=2)
    with pytest.raises(ValueError, match=r"^on_failure must be one of 'warn', 'raise', 'ignore', got 'quiet'\."):
        attach(model.cell, on_failure="quiet")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"gradient must be a phantomgrad Gradient object such as UnrolledPhantom\(steps=5\)"
    ):
        attach(model.cell, "upg")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'lam'"):
        attach(model.cell, lam=0.5)  # type: ignore[call-arg]
    assert model.cell.__dict__ == before
    attach(model.cell)
    with pytest.raises(
        AttachError, match=r"^Model\.cell \(Cell\) is attached already\. Change it by assignment .*attachments\(model\)"
    ):
        attach(model.cell)


def test_a_data_parallel_replica_raises() -> None:
    model, x = Model(), batch()
    attach(model.cell)
    replica = model.cell._replicate_for_data_parallel()
    with pytest.raises(
        AttachError, match=r"^nn\.DataParallel cannot run an attached module\. Use DistributedDataParallel"
    ):
        replica(x, x)
    model(x)


def test_options_that_cannot_be_assigned_or_have_the_wrong_type() -> None:
    attachment = attach(Cell())
    for name in ("sovler", "batch_dim", "on_failure"):
        with pytest.raises(AttributeError, match=f"An attachment has no '{name}' to assign: gradient, solver"):
            setattr(attachment, name, 1)
    with pytest.raises(TypeError, match=r"output must be a position, a key or None, got 1\.5\."):
        attach(Cell(), output=1.5)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"compile must be True, False or a mode of torch\.compile \(.*\), got 'yes'\."
    ):
        attach(Cell(), compile="yes")  # type: ignore[arg-type]


def test_the_decorator_without_parentheses_says_so() -> None:
    for target in (Cell, lambda z: z):
        with pytest.raises(AttachError, match=r"Write @equilibrium\(\)"):
            equilibrium(target)  # type: ignore[arg-type]
