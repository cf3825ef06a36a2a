"""What the tests stand on.

Ranks (pool), tiny models and batches (tiny, batches), gradient parity (parity).
"""
