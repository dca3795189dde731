"""Fine-tuning with labels, in one or many processes, through sparse training and pruning. Needs the extra `train`."""
