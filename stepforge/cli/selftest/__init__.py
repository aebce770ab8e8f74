"""``stepforge selftest``: a comparison of the bits that every backend computes."""
