"""The shapes of large networks at a small size: GPT-2, ViT, Llama with LoRA, and ResNet-50."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width, num_heads, *, causal):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        heads = (x.shape[0], x.shape[1], self.num_heads, -1)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.project(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, width, num_heads, *, causal):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, causal=causal)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class GPT(nn.Module):
    """The logits behind the last token."""

    def __init__(self, num_tokens=23, width=8, num_blocks=2, length=6, *, tied=True):
        super().__init__()
        self.tokens, self.places = nn.Embedding(num_tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 2, causal=True) for _ in range(num_blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_tokens, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, -1]


class ViT(nn.Module):
    def __init__(self, width=8, num_blocks=2, size=8, patch=4, num_classes=3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.label = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, 2, causal=False) for _ in range(num_blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.label.expand(len(x), -1, -1), x], dim=1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class LoRA(nn.Module):
    def __init__(self, num_inputs, num_outputs, rank=2):
        super().__init__()
        self.base = nn.Linear(num_inputs, num_outputs, bias=False)
        self.down, self.up = nn.Parameter(torch.randn(rank, num_inputs)), nn.Parameter(torch.randn(num_outputs, rank))

    def forward(self, x):
        return self.base(x) + (x @ self.down.mT) @ self.up.mT


class LlamaBlock(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads, self.norm1, self.norm2 = num_heads, nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.value = LoRA(width, width), LoRA(width, width)
        self.key, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.gate, self.widen = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.narrow = nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        normed = self.norm1(x)
        heads = (x.shape[0], x.shape[1], self.num_heads, -1)
        query, key, value = (part(normed).view(heads).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        normed = self.norm2(x)
        return x + self.narrow(F.silu(self.gate(normed)) * self.widen(normed))


def rotated(x):
    """Rotate pairs of features by angles that grow with the place."""
    length, width = x.shape[-2:]
    places, half = torch.arange(length, dtype=x.dtype), torch.arange(width // 2, dtype=x.dtype)
    angles = places.unsqueeze(1) * 100.0 ** (-2 * half / width)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


class Llama(nn.Module):
    """The logits behind the last token; the LoRA adapters alone are trained."""

    def __init__(self, num_tokens=23, width=8, num_blocks=2):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(num_tokens, width), nn.RMSNorm(width)
        self.blocks = nn.ModuleList(LlamaBlock(width, 2) for _ in range(num_blocks))
        self.head = nn.Linear(width, num_tokens, bias=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.endswith(("down", "up")))

    def forward(self, tokens):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, -1]


class Bottleneck(nn.Module):
    def __init__(self, num_inputs, width, stride):
        super().__init__()
        num_outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(num_inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, num_outputs, 1, bias=False), nn.BatchNorm2d(num_outputs)
        self.shortcut = nn.Identity()
        if stride > 1 or num_inputs != num_outputs:
            shortcut = nn.Conv2d(num_inputs, num_outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(num_outputs))

    def forward(self, x):
        inside = F.relu(self.norm1(self.conv1(x)))
        inside = F.relu(self.norm2(self.conv2(inside)))
        return F.relu(self.norm3(self.conv3(inside)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, counts=(2, 1), width=2, num_classes=3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        blocks, num_inputs = [], width
        for stage, count in enumerate(counts):
            for place in range(count):
                blocks.append(Bottleneck(num_inputs, width * 2**stage, 2 if stage and not place else 1))
                num_inputs = 4 * width * 2**stage
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(num_inputs, num_classes)

    def forward(self, images):
        return self.head(self.blocks(F.relu(self.norm(self.conv(images)))).mean((2, 3)))
