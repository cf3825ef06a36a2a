"""Attention over a sequence of which each context parallel rank has a part."""
