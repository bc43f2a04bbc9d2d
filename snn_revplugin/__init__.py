"""Train spiking neural networks of snnTorch and SpikingJelly in a fraction of the memory: same
spikes, same gradients.

::

    import snn_revplugin

    snn_revplugin.convert(net)  # every supported neuron of a net, in place; restore(net) undoes it

or neuron by neuron, from ``snn_revplugin.adapters.snntorch`` and
``snn_revplugin.adapters.spikingjelly``. Importing this package imports no host.
"""

# Registers the names of the hosts that there are adapters for; imports neither.
from . import adapters as adapters
from .report.check import check_reversible
from .report.explain import explain
from .report.memory import memory_report
from .settings import Settings, get_settings, use_settings
from .swap.convert import Conversion, convert, restore
from .swap.plain import register_neuron
from .swap.table import reversible
from .swap.watch import watch

__all__ = [
    "Conversion",
    "Settings",
    "check_reversible",
    "convert",
    "explain",
    "get_settings",
    "memory_report",
    "register_neuron",
    "restore",
    "reversible",
    "use_settings",
    "watch",
]
__version__ = "0.1.0"
