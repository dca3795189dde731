"""How much a channel matters: synaptic strength, activation statistics, relevance, and layer sensitivity."""
