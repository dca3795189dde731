"""Nets with attention: ours beside uniform closed-form pruning and Torch-Pruning's magnitude, at the same MACs."""
