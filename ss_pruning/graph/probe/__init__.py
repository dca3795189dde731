"""The label probe: labels pulled back through what lies between layers, and what can be read from where they arrive."""
