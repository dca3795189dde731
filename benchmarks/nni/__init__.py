"""From masks of NNI to smaller models."""
