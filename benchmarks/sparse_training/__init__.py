"""Training with the penalty on synaptic strength, then pruning and fine-tuning."""
