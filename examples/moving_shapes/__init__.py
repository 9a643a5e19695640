"""A small video diffusion transformer trained on procedural videos, so that what is true of a sample is known."""
