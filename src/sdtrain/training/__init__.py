"""A training run: checks, start, steps, curves, saved states and resuming."""
