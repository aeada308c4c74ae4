"""Metrics on images that training never sees."""
