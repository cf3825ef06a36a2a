"""Weights and optimizer state, to disk and back."""
