"""Parallel layers over the collectives: linears, embedding, head and loss."""
