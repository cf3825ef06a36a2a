"""What the tests stand on: ranks (pool), tiny models and batches (tiny, batches), gradient parity (parity)."""
