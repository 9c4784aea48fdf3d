"""What convolutions read, cut out of images one by one."""

import torch
from torch import nn
from torch.nn import functional as F


def padded(inputs, module):
    """A convolution's inputs with what it puts around them."""
    around = [0, 0, 0, 0]
    for dim, size in enumerate(module.kernel_size):
        if module.padding == "same":
            total = module.dilation[dim] * (size - 1)
            sides = total // 2, total - total // 2
        else:
            sides = module.padding[dim], module.padding[dim]
        around[2 - 2 * dim : 4 - 2 * dim] = sides
    return F.pad(inputs, around, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def patches_of(inputs, module):
    """What a convolution reads at each position, cut out one by one, shape `(images, positions, inputs)`."""
    if isinstance(module, nn.Linear):
        return inputs.flatten(1, -2)
    around, (height, width), (down, right) = padded(inputs, module), module.kernel_size, module.dilation
    rows = range(0, around.shape[2] - down * (height - 1), module.stride[0])
    columns = range(0, around.shape[3] - right * (width - 1), module.stride[1])
    patches = [
        around[:, :, row : row + down * (height - 1) + 1 : down, column : column + right * (width - 1) + 1 : right]
        for row in rows
        for column in columns
    ]
    return torch.stack([patch.flatten(1) for patch in patches], 1)


def tokens_of(features, module):
    """What a module gives, or its gradient, shape `(examples, positions, outputs)`."""
    return features.flatten(1, -2) if isinstance(module, nn.Linear) else features.flatten(2).mT
