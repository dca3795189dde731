"""Measurements behind the figures in the documentation; each file is a script."""
