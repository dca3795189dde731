"""Synapse masks, sparse training, and the compaction of what is dead.

`penalty` and `reparametrization` train towards weak synapses, `masks` keep them at zero, and `compaction` cuts the
channels that `dead_channels` finds, whose constants `constant_folding` puts into biases.
"""
