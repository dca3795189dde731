"""Compensations of other methods, written from their papers' formulas, beside ours on the same channels and images."""
