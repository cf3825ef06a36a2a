"""How a vocabulary lies on the ranks, under the name that layers and surgery know it by."""

from hf_sp.kernels.vocab import check_ids, vocab_range, vocab_sizes

__all__ = ["check_ids", "vocab_range", "vocab_sizes"]
