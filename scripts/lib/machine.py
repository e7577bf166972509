"""What a report says of the machine and the software it was measured with."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import packinfer_sgl

GPU_FIELDS = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"


def nvidia_smi(fields: str) -> str:
    """One line, or nothing where there is no such tool."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0].strip()


def machine(model: str) -> dict[str, Any]:
    """``model`` is the model's folder or name; of a folder only the last part is told."""
    on_gpu = torch.cuda.is_available()
    return {
        "model": Path(model).name,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        **({"gpu": nvidia_smi(GPU_FIELDS)} if on_gpu else {}),
        "sglang": version("sglang"),
        "torch": torch.__version__,
        "packinfer-sgl": packinfer_sgl.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
