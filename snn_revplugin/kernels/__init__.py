"""A neuron's arithmetic in fused Triton kernels, and the one place that decides between them and plain torch code.

    neuron.py    kernels: the equations, forward and backward
    form.py      what a kernel has to know of a neuron when it is compiled
    launch.py    launchers: flat memory, grids, outputs
    fused.py     the interface of snn_revplugin.dynamics, on launchers
    proof.py     kernels beside the plain code on a sample, before they are trusted
    backend.py   the decision

Importing this package does not import Triton.
"""

from .backend import arithmetic

__all__ = ["arithmetic"]
