"""Which models can be pruned, and how long that takes."""
