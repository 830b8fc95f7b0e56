"""Mixed operations in one piece: compiled kernels for what cell networks do on a processor.

A drop-in for the plain sum of operations, with the same values and gradients; whatever it does not know is left to the
modules themselves. See :mod:`netwright.search.fused.mixture`.
"""
