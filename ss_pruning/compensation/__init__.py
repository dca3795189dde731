"""Repair what stays: what pruned channels carried is moved onto the kept ones, without labels.

`apply` cuts a copy, repairs it by name, and leaves the repair out where `fidelity` says that it harms. "mean" and
"linear" are in `folding`, "reconstruct" in `reconstruction`; batch norms follow in `batchnorm`; `synthetic_data`
makes images where there are none.
"""
