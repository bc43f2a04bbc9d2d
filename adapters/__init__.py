"""The neurons of snn_revplugin behind the APIs of their hosts, one adapter a host.

This is the one place that names the hosts. Importing it imports none of them:
``snn_revplugin.adapters.snntorch`` needs snnTorch, ``snn_revplugin.adapters.spikingjelly`` needs
SpikingJelly, and each is imported once its host has been.
"""

from snn_revplugin.swap.hosts import register_adapter

register_adapter("snntorch", "snn_revplugin.adapters.snntorch")
register_adapter("spikingjelly", "snn_revplugin.adapters.spikingjelly")
