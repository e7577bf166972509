"""Checks of what the wrappers are given, and conversions of it. Errors name the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from packinfer_sgl.kernels.tiles import FP8_CAPABILITY, TILES, most_group_size
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.prefix_tree import Int32

Dtype = str | torch.dtype
Scale = float | torch.Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KV_DTYPES = (*DTYPES, torch.float8_e4m3fn)


def pages_needed(indptr: Int32, indices: Int32, pages: Int32) -> int:
    """The highest of the first ``pages[i]`` pages of the tables, plus 1 ([n_requests])."""
    first = indptr[:-1][pages > 0]
    # reduceat needs indices below the length
    bounds = np.stack([first, first + pages[pages > 0]], 1).ravel()
    return int(np.maximum.reduceat(np.append(indices, 0), bounds)[::2].max(initial=-1)) + 1


def refuse(**arguments: Any) -> None:
    """Raise for the first argument that is not None or False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is not supported by packinfer-sgl: leave it at its default")


def check_device(x: torch.Tensor, device: torch.device, name: str) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the wrapper on {device}")


def check_tensor(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {shape} as planned, is {x.dtype} {tuple(x.shape)}")


def check_indptr(indptr: Int32, n: int, name: str) -> None:
    if len(indptr) != n + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(f"{name} must be {n + 1} numbers for {n} requests, ascending from 0")


def check_equal(given: torch.Tensor | None, derived: Int32, name: str) -> None:
    """Lengths that FlashInfer takes besides the page tables must say the same."""
    if given is not None and not np.array_equal(given.cpu().numpy().ravel(), derived):
        raise ValueError(f"{name} contradicts the indptr and last_page_len: {given.tolist()} is not {derived.tolist()}")


def check_at_most(bound: int | None, lens: Int32, name: str) -> None:
    if bound is not None and bound < lens.max(initial=0):
        raise ValueError(f"{name}={bound} is less than the longest request has: {lens.max()}")


def as_int32(x: torch.Tensor, name: str) -> Int32:
    """A copy, so that the caller may overwrite its tensor."""
    if x.dim() != 1 or x.dtype != torch.int32:
        raise ValueError(f"{name} must be int32 with one dimension, is {x.dtype} {tuple(x.shape)}")
    return x.cpu().numpy().copy()


def as_dtype(dtype: Dtype, name: str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    known = KV_DTYPES if name == "kv_data_type" else DTYPES
    if found not in known:
        names = [str(each).removeprefix("torch.") for each in known]
        raise NotImplementedError(f"{name}={dtype} is not supported: use {', '.join(names[:-1])} or {names[-1]}")
    return found


def as_number(scale: Scale | None, name: str) -> float:
    if isinstance(scale, torch.Tensor) and scale.device.type != "cpu":
        raise NotImplementedError(f"{name} on {scale.device} is not supported: reading it would wait for the GPU")
    if isinstance(scale, torch.Tensor) and scale.numel() != 1:
        raise NotImplementedError(f"{name} with {scale.numel()} elements is not supported: give one number")
    return 1.0 if scale is None else float(scale)


def as_flags(
    mask: torch.Tensor | None, packed: torch.Tensor | None, n: int, device: torch.device
) -> torch.Tensor | None:
    """A copy of FlashInfer's custom mask, [n] bool, from whichever of its two forms is given."""
    if packed is not None:
        check_device(packed, device, "packed_custom_mask")
        check_tensor(packed, (-(-n // 8),), torch.uint8, "packed_custom_mask")
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)
        return (bits & 1).bool().view(-1)[:n]
    if mask is None:
        return None
    mask = mask.reshape(-1)
    check_device(mask, device, "custom_mask")
    check_tensor(mask, (n,), torch.bool, "custom_mask")
    return mask.clone()


def check_cuda_layer(
    shape: AttentionShape, q_dtype: torch.dtype, kv_dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    """Raise NotImplementedError for a layer that the GPU kernels cannot do."""
    if q_dtype == torch.float32:
        raise NotImplementedError("q_data_type=float32 is not supported on CUDA: use float16 or bfloat16")
    if kv_dtype == torch.float8_e4m3fn and capability < FP8_CAPABILITY:
        raise NotImplementedError(
            f"kv_data_type={kv_dtype} is not supported on GPUs before compute capability 8.9: this one has "
            f"{capability[0]}.{capability[1]}"
        )
    if kv_dtype not in (q_dtype, torch.float8_e4m3fn):
        raise NotImplementedError(f"kv_data_type={kv_dtype} is not supported on CUDA with q_data_type={q_dtype}")
    if shape.head_dim not in TILES:
        raise NotImplementedError(f"head_dim={shape.head_dim} is not supported on CUDA: use one of {sorted(TILES)}")
    if shape.group_size > (most := most_group_size(shape.head_dim)):
        raise NotImplementedError(
            f"num_qo_heads={shape.qo_heads} for num_kv_heads={shape.kv_heads} is not supported on CUDA: "
            f"at head_dim={shape.head_dim} at most {most} query heads may share a KV head"
        )


def check_cuda_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sm_scale: float) -> None:
    """Raise NotImplementedError for tensors that the GPU kernels cannot read, or a factor that they cannot take."""
    if not sm_scale > 0:
        raise NotImplementedError(f"sm_scale * q_scale * k_scale = {sm_scale} is not supported on CUDA")
    for x, name in ((q, "q"), (k, "k cache"), (v, "v cache"), (out, "out")):
        check_strides(x, name)
    if strides(k) != strides(v):
        raise NotImplementedError(
            f"paged_kv_cache with different strides of K {k.stride()} and V {v.stride()} is not supported on CUDA"
        )


def strides(x: torch.Tensor) -> list[int]:
    """The strides that matter: a dimension of size 1 may have any."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride())]


def check_strides(x: torch.Tensor, name: str) -> None:
    if x.stride(-1) != 1:
        raise NotImplementedError(
            f"{name} with strides {x.stride()} is not supported on CUDA: the last dimension must be contiguous"
        )
