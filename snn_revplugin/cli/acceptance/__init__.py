"""``snn-revplugin accept``: what only the device itself can show, in parts that can be chosen.

===============  ==================================================================================
case.py          what one process examines, what it finds, and the sizes of a run
environment.py   versions, device, driver, the settings of cuDNN and of TF32
replay.py        each operation: the recomputed tensor against the first one
kernels.py       each kernel form against the plain code
steps.py         capture of a training step, synchronisation, settings of another thread
works.py         whole works and models: spikes, gradients, memory, time, by every way
floor.py         kernels' time over the bandwidth floor, and launches
fit.py           the longest T and the largest batch
parts.py         the table of parts
process.py       a case in a process of its own, within its time
run.py           all cases of the chosen parts, one after another; results as they come
page.py          the results as a page of Markdown
===============  ==================================================================================
"""
