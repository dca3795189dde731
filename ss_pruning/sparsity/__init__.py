"""Synapse masks, sparse training, and the compaction of what is dead."""
