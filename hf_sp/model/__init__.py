"""The dense model: linears, blocks, norms, MLPs, embedding, head and loss."""
