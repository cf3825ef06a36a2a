"""Proof that a parallel model computes what the unsharded one does: tolerances, comparisons."""
