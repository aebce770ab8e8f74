"""What a drop-in for torch.optim must satisfy beyond numbers."""
