"""How to iterate: one algorithm per file, all driven by `phantomgrad._solve`.

A new solver is one new file with a subclass of `Solver`, and one line here and in `phantomgrad/__init__.py`.
"""

from phantomgrad.solvers._anderson import Anderson as Anderson
from phantomgrad.solvers._base import Solver as Solver
from phantomgrad.solvers._broyden import Broyden as Broyden
from phantomgrad.solvers._fixed_point_iteration import FixedPointIteration as FixedPointIteration
