"""How to differentiate: one estimate per file, each a pure function of the map and its solution.

A new gradient is one new file with a subclass of `Gradient`, and one line here and in `phantomgrad/__init__.py`.
"""

from phantomgrad.gradients._adaptive import AdaptivePhantom as AdaptivePhantom
from phantomgrad.gradients._backprop import Backprop as Backprop
from phantomgrad.gradients._base import Gradient as Gradient
from phantomgrad.gradients._implicit import Implicit as Implicit
from phantomgrad.gradients._krylov import KrylovPhantom as KrylovPhantom
from phantomgrad.gradients._neumann import NeumannPhantom as NeumannPhantom
from phantomgrad.gradients._one_step import OneStep as OneStep
from phantomgrad.gradients._shine import Shine as Shine
from phantomgrad.gradients._unrolled import UnrolledPhantom as UnrolledPhantom
