"""Models to files and back: checkpoints, exports, plans for many processes, Torch-Pruning histories.

`checkpoint` saves and loads pruned models as safetensors; `export` writes files for other runtimes, `int8` those in
eight bits; `distributed` sees to it that all processes cut alike.
"""
