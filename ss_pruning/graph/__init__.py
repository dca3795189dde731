"""Which channels must be pruned together: the model is traced on labels, and dependency groups follow from it."""
