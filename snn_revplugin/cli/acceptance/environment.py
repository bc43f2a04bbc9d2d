"""Part 1: what everything else depends on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from ...kernels.backend import why_not
from ..comparison import versions
from .case import MEASURED, Case, Cases, Findings, Sizes


def cases(sizes: Sizes, device: str) -> Cases:
    yield Case("environment", "versions", "", device)


def examine(case: Case) -> Findings:
    """Versions, the device and its driver, and what decides how cuDNN and cuBLAS round."""
    installed = {name: version or "not installed" for name, version in versions().items()}
    yield case.found(MEASURED, **installed, platform=platform.platform())
    cores: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    yield case.found(MEASURED, "cpu", **cores)
    if case.on_cuda:
        yield case.found(MEASURED, "device", **_of_device(case.device))
    yield case.found(
        MEASURED,
        "rounding",
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        cudnn_deterministic=torch.backends.cudnn.deterministic,
        tf32_of_cudnn=torch.backends.cudnn.allow_tf32,
        tf32_of_matmul=torch.backends.cuda.matmul.allow_tf32,
    )
    reason = why_not(torch.empty(0, device=case.device))
    yield case.found(MEASURED, "kernels", state=reason or "available")


def _of_device(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str:
    """The version of the driver, as its own tool tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: there is no nvidia-smi"
    command = tool, "--query-gpu=driver_version", "--format=csv,noheader"
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    return (done.stdout.strip().splitlines() or ["unknown"])[0]
