"""The tables of SageAttention3's paper and reviews, computed again on tensors that a clean clone has."""
