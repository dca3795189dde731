"""Prune CNNs by synaptic strength."""
