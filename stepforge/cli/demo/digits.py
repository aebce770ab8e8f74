"""The demo's task: scikit-learn's handwritten digits and a small convolutional network."""

from __future__ import annotations

import torch
from torch import nn

from stepforge.cli.demo.side_by_side import Task

__all__ = ["LEARNING_RATES", "load_digits"]

#: The learning rate of each optimizer for this task.
LEARNING_RATES = {"Adagrad": 2e-2, "Adam": 2e-3, "AdamW": 2e-3, "NAdam": 2e-3, "RAdam": 3e-3}

_TEST_IMAGES = 360


def load_digits() -> Task:
    """Return 1797 images of 8x8 pixels: 1437 to train on and 360 to test on, always the same.

    scikit-learn has them in its package; nothing is downloaded.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # pixels: 0 to 16
    labels = torch.tensor(digits.target)
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = shuffled[:_TEST_IMAGES], shuffled[_TEST_IMAGES:]
    return Task(
        make_network=_network,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        batch_size=64,
    )


def _network() -> nn.Module:
    # Smooth on purpose: with ReLU and max pooling, twins that differ in last bits ended up to 0.4
    # apart in some weight, and the comparison showed the network instead of the optimizers.
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),  # 32 channels of 4x4
        nn.Linear(512, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    )
