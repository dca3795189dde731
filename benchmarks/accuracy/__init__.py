"""How much accuracy is left after pruning, by criterion, compensation and budget."""
