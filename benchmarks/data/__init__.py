"""The images that the benchmarks use, the models for them, and how these are trained."""
