"""Frameworks that LiteAttention plugs into: a file each, which imports its host when it is imported itself."""
