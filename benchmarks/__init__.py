"""Measurements behind the figures in the documentation: `run` measures, `page` writes what came out."""
