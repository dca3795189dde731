"""NNI: a pruner that ranks by synaptic strength, and the compaction of its masks."""
