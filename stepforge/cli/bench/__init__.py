"""``stepforge bench``: step times beside torch.optim and the limit of memory."""
