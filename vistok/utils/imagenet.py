"""The mean and the standard deviation of ImageNet's pixels in [0, 1], per channel (RGB), as pretrained networks take
them."""

from __future__ import annotations

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
