"""Numbers on images that training never sees."""
