"""Vector-Jacobian products without the checks that take as long as a small product.

`torch.autograd.grad` compares shapes and looks for tensor subclasses, in Python, before it calls the engine. For edges of a
graph whose cotangents are right by construction nothing can be found. The engine's entry is private to torch, so
where it is missing the public function does the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import graph
from torch.autograd.graph import GradientEdge

from phantomgrad._state import Leaves

Edges = tuple[GradientEdge, ...]
Products = Sequence[Tensor | None]


def by_engine(outputs: Edges, inputs: Edges, cotangents: Leaves) -> Products:
    """`sum_i cotangents_i^T d outputs_i / d inputs_j` for every input, None where it plays no part; keeps the graph."""
    return graph._engine_run_backward(
        outputs, cotangents, True, torch.is_grad_enabled(), inputs, True, accumulate_grad=False
    )


def by_autograd(outputs: Edges, inputs: Edges, cotangents: Leaves) -> Products:
    """The same by the public function."""
    return torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph=True, create_graph=torch.is_grad_enabled(), allow_unused=True
    )


vector_jacobian_products = by_engine if hasattr(graph, "_engine_run_backward") else by_autograd
