"""What it means that a cut model is right: it returns what the masked model returns.

`masked_model` is the reference, `agreement` compares all that two models return, `decisions` holds one to the other's
choices, and `precision` makes the copies on which both are run.
"""
