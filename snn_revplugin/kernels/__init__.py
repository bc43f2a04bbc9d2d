"""A neuron's arithmetic in fused Triton kernels, and the one place that decides between them and
plain torch code.

    equations.py      what kernels are made of: tiles, rounding, the equations forward and backward
    neuron.py         kernels of the exact neurons, and of packing
    coupled.py        kernels of the coupled neuron
    form.py           what a kernel has to know of a neuron when it is compiled
    launch.py         launchers: flat memory, grids, outputs
    fused.py          the interface of snn_revplugin.dynamics, on launchers
    fused_coupled.py  the interface of snn_revplugin.coupled, on launchers
    proof.py          kernels beside the plain code on a sample, before they are trusted
    backend.py        the decision

Importing this package does not import Triton.
"""

from . import packing  # noqa: F401  (registers its codec)
from .backend import BackendChoice

__all__ = ["BackendChoice"]
