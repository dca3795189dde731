"""Fine-tuning with labels, in one or many processes, through sparse training and pruning. Extra: train."""
