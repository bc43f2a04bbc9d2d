"""The neurons of snn_revplugin behind the APIs of their hosts, one module a host.

Nothing here is imported before you ask for it: ``snn_revplugin.adapters.snntorch`` needs snnTorch,
``snn_revplugin.adapters.spikingjelly`` needs SpikingJelly.
"""
