"""What goes on inside a block: does it settle, and how good are its gradients.

    from phantomgrad import diagnostics
    diagnostics.check(cell, torch.zeros(32, 64), x)  # run this first: one printed page

Every function takes a cell, attached or not, and the arguments of one call. What they measure leaves parameters,
`.grad`, buffers and random generators as they are. `Monitor` watches the attached modules of a model while it trains.
"""

from phantomgrad.diagnostics._alignment import Alignment as Alignment
from phantomgrad.diagnostics._alignment import GradientAlignment as GradientAlignment
from phantomgrad.diagnostics._alignment import gradient_alignment as gradient_alignment
from phantomgrad.diagnostics._ascent import AscentCondition as AscentCondition
from phantomgrad.diagnostics._ascent import ascent_condition as ascent_condition
from phantomgrad.diagnostics._check import check as check
from phantomgrad.diagnostics._error import PhantomError as PhantomError
from phantomgrad.diagnostics._error import phantom_error as phantom_error
from phantomgrad.diagnostics._monitor import Monitor as Monitor
from phantomgrad.diagnostics._penalty import jacobian_penalty as jacobian_penalty
from phantomgrad.diagnostics._report import CheckReport as CheckReport
from phantomgrad.diagnostics._spectrum import SpectralRadius as SpectralRadius
from phantomgrad.diagnostics._spectrum import spectral_radius as spectral_radius

__all__ = [
    "Alignment",
    "AscentCondition",
    "CheckReport",
    "GradientAlignment",
    "Monitor",
    "PhantomError",
    "SpectralRadius",
    "ascent_condition",
    "check",
    "gradient_alignment",
    "jacobian_penalty",
    "phantom_error",
    "spectral_radius",
]
