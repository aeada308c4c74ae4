"""Numbers on pictures that training never sees."""
