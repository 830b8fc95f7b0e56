"""Layers, masks and networks: pure torch, usable in anybody's training loop."""
