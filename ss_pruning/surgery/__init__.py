"""Apply a plan and prove it: what is cut, the masked reference model, and the verification that they are equal.

`plan` says which channels stay and applies that, `cut` cuts one layer, `size_attributes` finds the stored numbers
that follow. `verification` compares the cut copy with the masked model; `equivalence` says what equal means.
"""
