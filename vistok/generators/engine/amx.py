"""Products of a few rows with large bfloat16 weights, and norms of them, on processors with AMX: kernels of our own, in
``amx.cpp``.

A step of cached sampling is such products, and takes as long as the weights need to arrive from memory. PyTorch's
kernels wait for them: on two cores of a busy machine they read half as fast as this one, which asks ahead
(``benchmarks/few_rows.py``). Weights stay where they are and as they are. The norm between products is nine small
operations in PyTorch, and finds the processor's caches full of weights in each.

The kernels are compiled on their first use, which takes a second or two, and kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.utils.files import atomic_file, cache_folder

logger = logging.getLogger(__name__)

MOST_ROWS = 32
"""For more, time goes into arithmetic, and general kernels are as fast."""

SOURCE = Path(__file__).with_name("amx.cpp")
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
INSTRUCTIONS = ["-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512vl", "-mavx512bf16"]


def suits(weight: Tensor) -> bool:
    """Whether the machine has what it needs, and ``linear`` takes this weight (V, D), or ``rms_norm`` this one (D,).
    May compile the kernels."""
    *outputs, columns = weight.shape
    sizes = columns % 32 == 0 and all(count % 16 == 0 for count in outputs)
    return sizes and _is_bfloat16(weight) and weight.is_contiguous() and _kernels() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for inputs (..., D), a weight (V, D) and a bias (V,). What the kernel cannot do, or not faster,
    PyTorch does: gradients, more than 32 rows, weights that do not suit, what does not fit together."""
    rows, (outputs, columns) = x.numel() // max(x.shape[-1], 1), weight.shape
    fit = _is_bfloat16(x) and x.shape[-1] == columns
    fit = fit and (bias is None or (_is_bfloat16(bias) and bias.shape == (outputs,)))
    if torch.is_grad_enabled() or not (fit and 0 < rows <= MOST_ROWS and suits(weight)):
        return F.linear(x, weight, bias)
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], outputs)
    bias = None if bias is None else bias.contiguous()
    pointers = (x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr())
    _kernels().vistok_amx_linear(*pointers, rows, columns, outputs, torch.get_num_threads())
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``F.rms_norm(x, (D,), eps=eps) * weight`` for inputs (..., D) and a weight (D,). What the kernel cannot do,
    PyTorch does."""
    rows = x.numel() // max(x.shape[-1], 1)
    fit = _is_bfloat16(x) and x.shape[-1:] == weight.shape
    if torch.is_grad_enabled() or not (fit and 0 < rows <= MOST_ROWS and suits(weight)):
        return F.rms_norm(x, weight.shape, eps=eps) * weight
    x = x.contiguous()
    y = torch.empty_like(x)
    _kernels().vistok_rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, x.shape[-1], eps)
    return y


def _is_bfloat16(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.bfloat16


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    """The compiled functions, or None where there is no such processor, or no compiler."""
    if not {"amx_bf16", "avx512_bf16"} <= _processor_flags():
        return None
    try:
        library = _library()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1])
        logger.warning(
            "bfloat16 sampling will be slower: the kernels for AMX could not be compiled by $CXX (or g++) "
            "into $XDG_CACHE_HOME (or ~/.cache): %s",
            reason,
        )
        return None
    if library.vistok_amx_start():
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.vistok_amx_linear.argtypes = [pointer] * 4 + [size] * 4
    library.vistok_rms_norm.argtypes = [pointer] * 3 + [size] * 2 + [ctypes.c_float]
    library.vistok_amx_linear.restype = library.vistok_rms_norm.restype = None
    return library


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux, and AMX has to be asked for in Linux's way
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _library() -> ctypes.CDLL:
    """The shared library, compiled if this version of it is not there yet."""
    path = _library_path()
    with suppress(OSError):  # not there, or damaged, or of another system that shares the folder
        return ctypes.CDLL(str(path))
    with atomic_file(path) as unfinished:  # whole or not at all, also when several processes compile it
        subprocess.run([*_compiler(), "-o", str(unfinished)], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(path))


def _library_path() -> Path:
    version = hashlib.sha256(SOURCE.read_bytes() + shlex.join(_compiler()).encode()).hexdigest()[:16]
    return cache_folder("kernels") / f"amx-{version}.so"


def _compiler() -> list[str]:
    return [*shlex.split(os.environ.get("CXX") or "g++"), *FLAGS, *INSTRUCTIONS, str(SOURCE)]
