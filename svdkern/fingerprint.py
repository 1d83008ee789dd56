"""The SHA-256 of a tensor's bytes: how an adapter recognises the weight that it belongs to."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_PIECE_BYTES = 1 << 26  # copied to the host at a time


@torch.no_grad()
def sha256(tensor: Tensor) -> bytes:
    """SHA-256 of the elements' bytes in row-major order, little endian: 32 bytes. Shape, strides and device do not
    enter.

    The dtype enters only through the bytes; whoever compares fingerprints compares dtypes beside them.
    """
    digest = hashlib.sha256()
    flat = tensor.detach()
    flat = flat.reshape(-1) if flat.is_contiguous() else flat.contiguous().view(-1)
    step = _PIECE_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].cpu()
        digest.update((ctypes.c_char * (piece.numel() * piece.element_size())).from_address(piece.data_ptr()))
    return digest.digest()


def sha256_together(tensors: Iterable[Tensor | None]) -> bytes:
    """SHA-256 of the digests of several tensors, one after the other."""
    return hashlib.sha256(b"".join(sha256(tensor) for tensor in tensors if tensor is not None)).digest()


def digest_tensor(digest: bytes) -> Tensor:
    """A digest as a uint8 tensor on the CPU."""
    return torch.tensor(list(digest), dtype=torch.uint8, device="cpu")
