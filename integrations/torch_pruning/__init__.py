"""Torch-Pruning: an importance for its pruners, and its pruner on our dependency groups."""
