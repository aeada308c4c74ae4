"""A training run: how it is checked, started, stepped, watched, saved and resumed."""
