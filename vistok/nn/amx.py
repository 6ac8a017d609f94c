"""Products of a few rows with large bfloat16 weights, on processors with AMX: a kernel of our own, in ``amx.cpp``.

A step of cached sampling is such products, and takes as long as the weights need to arrive from memory. PyTorch's
kernels wait for them: on two cores of a busy machine they read half as fast as this one, which asks ahead
(``benchmarks/few_rows.py``). Weights stay where they are and as they are.

The kernel is compiled on its first use, which takes a second or two, and kept in the user's cache folder.
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

from vistok.files import atomic_file, cache_folder

logger = logging.getLogger(__name__)

MOST_ROWS = 32
"""For more, time goes into arithmetic, and general kernels are as fast."""

SOURCE = Path(__file__).with_name("amx.cpp")
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
INSTRUCTIONS = ["-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512vl", "-mavx512bf16"]


def suits(weight: Tensor) -> bool:
    """Whether ``linear`` takes this weight (V, D), and the machine has what it needs. May compile the kernel."""
    fits = _is_bfloat16(weight) and weight.is_contiguous()
    return fits and weight.shape[0] % 16 == 0 and weight.shape[1] % 32 == 0 and _kernel() is not None


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
    _kernel()(*pointers, rows, columns, outputs, torch.get_num_threads())
    return y


def _is_bfloat16(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.bfloat16


@functools.cache
def _kernel() -> ctypes._CFuncPtr | None:
    """The compiled function, or None where there is no such processor, or no compiler."""
    if not {"amx_bf16", "avx512_bf16"} <= _processor_flags():
        return None
    try:
        library = _library()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1])
        logger.warning(
            "bfloat16 sampling will be slower: the kernel for AMX could not be compiled by $CXX (or g++) "
            "into $XDG_CACHE_HOME (or ~/.cache): %s",
            reason,
        )
        return None
    if library.vistok_amx_start():
        return None
    function = library.vistok_amx_linear
    function.argtypes, function.restype = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 4, None
    return function


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
