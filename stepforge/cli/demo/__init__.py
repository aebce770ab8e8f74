"""``stepforge demo``: every optimizer beside its torch.optim twin, on handwritten digits."""
