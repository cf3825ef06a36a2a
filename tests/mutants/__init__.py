"""Deliberate faults: each must turn the parity check red."""
