"""The device that tensors are on, its memory and arithmetic, and the number of CPU threads. Imports torch on first use."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cm3.common.errors import UserError
from cm3.common.gpus import allotted_gpus, driver_version, nvidia_gpu_here

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def select_device(name: str, key: str = "training.device") -> torch.device:
    """Return the device of a setting; auto selects CUDA, then MPS, then the CPU.

    Args:
        name: auto, cuda, mps or cpu.
        key: path of the setting in the configuration, for the error message.

    Raises:
        UserError: the machine has no such device; the message names the key and the devices that it has. Or the job was
            allotted a GPU that torch cannot use, for which auto does not fall back on the CPU; the message names the
            versions of the driver and of torch.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:
        # torch warns once about an old driver; the reason below contains it.
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()
    available = {"cuda": cuda, "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [kind for kind, present in available.items() if present]
    unusable = "" if cuda or name not in ("auto", "cuda") else _unusable_gpu([str(w.message) for w in caught])
    if name == "auto":
        if unusable and allotted_gpus():
            raise UserError(f"{key} = 'auto': {unusable}; or set {key} to cpu")
        if unusable:
            log.warning("%s = 'auto': %s. Continuing on %s", key, unusable, usable[0])
        return torch.device(usable[0])
    if name not in usable:
        reason = unusable or f"not available on this machine; use auto, {' or '.join(usable)}"
        raise UserError(f"{key} = {name!r}: {reason}")
    return torch.device(name)


def _unusable_gpu(reasons: list[str]) -> str:
    """Return why torch cannot use the GPU of this machine, and what to do; empty where no NVIDIA GPU is seen."""
    import torch

    if not nvidia_gpu_here():
        return ""
    built, driver = torch.version.cuda, driver_version()
    found = f"a GPU with driver {driver or 'of unknown version'}"
    if built is None:
        return (
            f"this machine has {found}, but torch {torch.__version__} is built without CUDA; install a build with CUDA "
            "(docs/gpu.md)"
        )
    said = next((reason.split(" (Triggered")[0].strip() for reason in reasons if "driver" in reason.lower()), "")
    return (
        f"this machine has {found}, but torch {torch.__version__}, built for CUDA {built}, cannot use it"
        + (f" ({said})" if said else "")
        + f"; install a driver for CUDA {built} or a build of torch for an older CUDA (docs/gpu.md)"
    )


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads of torch; None keeps its default, one per core."""
    import torch

    if threads:
        torch.set_num_threads(threads)


_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "device_allocation_failed",  # cuDNN 9
    "host_allocation_failed",
    "cusparse_status_alloc_failed",
    "cusparse_status_insufficient_resources",
    "cusolver_status_alloc_failed",
    "cufft_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of a GPU or of the host ran out.

    CUDA's libraries (cuBLAS, cuDNN, cuSPARSE, NCCL) report it with codes of their own in a plain RuntimeError.
    """
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(part in message for part in _OUT_OF_MEMORY)


@contextlib.contextmanager
def memory_advice(doing: str, advice: str) -> Iterator[None]:
    """Turn running out of memory in the body into a UserError.

    Args:
        doing: what runs out of memory, as in "training".
        advice: the next step, as in "lower training.batch_size".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or ["out of memory"])[0]
        raise UserError(f"{doing} ran out of memory ({reason}); {advice}") from error


@contextlib.contextmanager
def float32_arithmetic(tf32: bool) -> Iterator[None]:
    """Compute float32 matrix products and convolutions on a GPU in TF32 in the body, or strictly in float32.

    TF32 has a mantissa of ten bits. By default torch uses it for the convolutions of cuDNN and not for products. The
    setting is that of the process and also holds in autograd's threads; before and after it is what it was.
    """
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def has_tf32(device: torch.device) -> bool:
    """Return whether a device has TF32 products: NVIDIA GPUs from compute capability 8.0 (Ampere) on."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a CPU has instructions for products of bfloat16; without them these are no faster than of float32."""
    import torch

    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))
