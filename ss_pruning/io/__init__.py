"""Models to files and back: checkpoints, exports, plans for many processes, Torch-Pruning histories."""
