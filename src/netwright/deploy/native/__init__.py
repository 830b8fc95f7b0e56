"""The native backend: C kernels for sparse networks, written for a network, compiled by the system, run by ctypes."""
