"""Which GPUs this machine has, without any vendor's library: what the environment allows, what drivers list, devices.

The type ("H100") is a word of the name that NVIDIA's driver gives the first one: a node has one type.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

SMI_S: Final = 10.0
_MODEL: Final = re.compile(r"(?:NVIDIA|Tesla) (?:(?:Tesla|GeForce|Quadro|RTX|GTX) )*([A-Z]*\d+[A-Z]*)")


class Gpus(NamedTuple):
    """`kind`: "" when it is not known."""

    number: int
    kind: str


def find_gpus(environment: Mapping[str, str], root: Path, list_gpus: Callable[[], str]) -> Gpus:
    """Those that this process may use.

    Args:
        root: where proc, dev and sys are. list_gpus: gives the output of `nvidia-smi -L`, "" where there is none.
    """
    names = _nvidia(root, list_gpus)
    kind = _kind_of(names[0]) if names else ""
    count = len(names) or _amd(root)
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        visible = environment.get(variable)
        if visible is not None:
            named = [device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")]
            return Gpus(len(named), kind if named else "")
    return Gpus(count, kind)


def _nvidia(root: Path, list_gpus: Callable[[], str]) -> list[str]:
    """The names of NVIDIA's GPUs; "" for one whose name is not known."""
    found = []
    for information in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        try:
            model = re.search(r"^Model:\s*(.+?)\s*$", information.read_text(), re.MULTILINE)
        except OSError:
            model = None
        found.append(model[1] if model else "")
    if found:
        return found
    devices = [path for path in root.glob("dev/nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    listed = re.findall(r"^GPU \d+: (.+?)(?: \(UUID|$)", list_gpus() if devices else "", re.MULTILINE)
    return listed or [""] * len(devices)


def _smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program, "-L"], capture_output=True, text=True, timeout=SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _amd(root: Path) -> int:
    """The nodes of AMD's driver that have SIMD units; the others are CPUs."""
    count = 0
    for properties in root.glob("sys/class/kfd/kfd/topology/nodes/*/properties"):
        try:
            count += bool(re.search(r"^simd_count [1-9]", properties.read_text(), re.MULTILINE))
        except OSError:
            continue
    return count


def _kind_of(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" and "Tesla V100-SXM2-16GB" -> H100, V100."""
    word = _MODEL.search(name)
    return word[1] if word else ""


def here() -> Gpus:
    return find_gpus(os.environ, Path("/"), _smi)
