"""Passes of a model that stop at a layer and go on from there, and two models that take them side by side."""
