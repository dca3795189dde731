"""Recovery: bring a pruned model's feature maps back to the dense model's, on images without labels.

`recover` checks what it is given and hands over to `training`; `imitation` is the loss, compared at the `places` that
both models share. With labels the same loss stands beside that of the task.
"""
