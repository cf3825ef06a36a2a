"""What the tests stand on.

Ranks (pool), models and batches (tiny, batches), comparisons (report, compare), training parity
(parity), kinds of use (inputs, uses, generation, noise).
"""
