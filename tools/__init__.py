"""What writes pages of the documentation out of the code: `python -m tools.pages`."""
