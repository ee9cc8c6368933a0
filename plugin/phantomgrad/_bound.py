"""Callables that stand in a module's instance dictionary.

Note [Instance forward]
`module.__dict__["forward"]` is found before the class's `forward`, so a callable there is what `module(...)` runs, inside
the user's hooks and wrappers, with `state_dict`, parameters, `type` and `repr` untouched. The callable refers to its module
weakly, or the two would keep each other (and the weights) alive until the garbage collector runs. Copies must follow
the copied module: `copy.deepcopy` and `pickle` create the module before its dictionary, so it can be looked up then.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, Self

from torch import nn

from phantomgrad._errors import AttachError


class Bound:
    """A callable that belongs to one module, follows its copies and does not keep it alive."""

    def __init__(self, module: nn.Module) -> None:
        self._module_ref = weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        """The module this belongs to; an `AttachError` once it is gone."""
        module = self._module_ref()
        if module is None:
            raise AttachError("The attached module no longer exists: keep a reference to the model it is part of.")
        return module

    def _copied_state(self) -> dict[str, Any]:
        """The attributes that copies and pickles carry, all but the module."""
        return {name: value for name, value in self.__dict__.items() if name != "_module_ref"}

    def __getstate__(self) -> dict[str, Any]:
        return {**self._copied_state(), "module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._module_ref = weakref.ref(state.pop("module"))
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        module = copy.deepcopy(self.module, memo)
        if id(self) in memo:  # copying the module has copied this
            return memo[id(self)]
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__({**copy.deepcopy(self._copied_state(), memo), "module": module})
        return clone


def module_path(module: nn.Module) -> str:
    """Where `module` sits, from the outermost module that contains it: `Classifier.backbone.cell (Cell)`.

    Modules do not know their parents, so this asks the garbage collector; it is meant for messages.
    """
    names: list[str] = []
    current = module
    for _ in range(64):
        parent = _parent(current)
        if parent is None:
            break
        current, name = parent
        names.append(name)
    if not names:
        return type(module).__name__
    return ".".join([type(current).__name__, *reversed(names)]) + f" ({type(module).__name__})"


def _parent(module: nn.Module) -> tuple[nn.Module, str] | None:
    for children in gc.get_referrers(module):
        if not isinstance(children, dict):
            continue
        for holder in gc.get_referrers(children):
            owner = holder if isinstance(holder, nn.Module) else _owner_of(holder)
            if owner is not None and owner is not module and owner._modules is children:
                name = next((key for key, child in children.items() if child is module), None)
                if name is not None:
                    return owner, name
    return None


def _owner_of(dictionary: object) -> nn.Module | None:
    if not isinstance(dictionary, dict):
        return None
    return next(
        (
            holder
            for holder in gc.get_referrers(dictionary)
            if isinstance(holder, nn.Module) and holder.__dict__ is dictionary
        ),
        None,
    )


def located(module: Callable[[], nn.Module | None]) -> Callable[[], str]:
    """A text such as ` in Classifier.cell (Cell)`, made when it is needed; empty once the module is gone."""

    def text() -> str:
        found = module()
        return "" if found is None else f" in {module_path(found)}"

    return text
