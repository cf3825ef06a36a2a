"""Collectives, meshes, and what autograd Functions share."""
