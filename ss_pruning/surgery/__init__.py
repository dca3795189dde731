"""Apply a plan and prove it: what is cut, the masked reference model, and the verification that they are equal."""
