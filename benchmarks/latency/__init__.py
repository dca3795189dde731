"""What pruning gains in time, and what it costs in time and memory."""
