"""Passes of a model that stop at a layer and go on from there, and two models that take them side by side.

Layers are solved front to back, and each reads what those before it put out from now on: `lockstep` runs the pruned
and the dense model as far as the next layer, by `partial` passes that hold no more than `memory` allows.
"""
