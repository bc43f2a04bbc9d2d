"""A neuron's arithmetic in fused Triton kernels, and the one place that decides between them and
plain torch code.

======================  ======================================================================
jit.py                  the decorator of kernels: compiled, or run by Triton's interpreter
equations.py            what kernels are made of: tiles, rounding, equations and derivatives
neuron.py               kernels of the neurons with one state, and of packing
coupled.py              kernels of the coupled neuron
surrogate_constants.py  the surrogates that kernels differentiate, and their constants
launch.py               launchers: flat memory, grids, outputs
triton_transition.py    what both kinds of kernels share behind the interface of a neuron
triton_neuron.py        a neuron with one state behind that interface
triton_coupled.py       the coupled neuron behind that interface
fuse.py                 the kernels for a neuron
packing.py              packing and unpacking of spikes, registered as a codec
self_test.py            kernels compared with the plain code on a sample, before they are used
backend.py              the decision
======================  ======================================================================

What a kernel has to know of a neuron is :mod:`..neurons.kernel_spec`. Importing this package does
not import Triton.
"""

from . import packing  # noqa: F401  (registers its codec)
from .backend import BackendChoice

__all__ = ["BackendChoice"]
