"""Tests of the interface of torch.optim, which a drop-in replacement must have."""
