"""What GPUs a machine is found to have, and what its workers are told of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from shoal.node.accelerators import Gpus, find_gpus
from shoal.runtime.devices import VARIABLES, names_of, settings_for


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def find(root: Path, environment: Mapping[str, str] | None = None, listed: str = "") -> Gpus:
    return find_gpus(environment or {}, root, lambda: listed)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("Tesla V100-SXM2-16GB", "V100"), ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A10G", "A10G"), ("NVIDIA GeForce RTX 3090", "3090"), ("Tesla T4", "T4"), ("NVIDIA L40S", "L40S"),
        ("something else", ""),
    ],
)  # fmt: skip
def test_the_drivers_list_says_how_many_and_which(tmp_path: Path, model: str, kind: str) -> None:
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        write(tmp_path / "proc/driver/nvidia/gpus" / bus / "information", f"Model: \t\t {model}\nIRQ: 7\n")
    assert find(tmp_path) == Gpus(2, kind)
    assert find(tmp_path, {"CUDA_VISIBLE_DEVICES": "1"}) == Gpus(1, kind)
    assert find(tmp_path, {"CUDA_VISIBLE_DEVICES": ""}) == Gpus(0, "")
    assert find(tmp_path, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}) == Gpus(0, "")


def test_a_container_with_devices_alone(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        write(tmp_path / "dev" / name)
    assert find(tmp_path) == Gpus(2, "")
    listed = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"
    assert find(tmp_path, listed=listed) == Gpus(2, "H200")


def test_amd_counts_what_has_simd_units(tmp_path: Path) -> None:
    for number, simds in enumerate((0, 208, 208)):
        write(tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}/properties", f"cpu_cores 0\nsimd_count {simds}\n")
    assert find(tmp_path) == Gpus(2, "")


def test_no_gpus_at_all(tmp_path: Path) -> None:
    assert find(tmp_path) == Gpus(0, "")


def test_a_worker_sees_its_devices_by_the_nodes_names() -> None:
    assert settings_for([1], {}) == dict.fromkeys(VARIABLES, "1")
    assert settings_for([0, 2], {"CUDA_VISIBLE_DEVICES": "4,5,6"})["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert settings_for([1], {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"})["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    assert names_of([0, 1], "3,GPU-b") == [3, "GPU-b"]
    assert names_of([5], "3") == [5]


def test_what_is_left_alone() -> None:
    assert settings_for([], {"CUDA_VISIBLE_DEVICES": "0"}) == {}
    assert settings_for(None, {}) == {}
    assert settings_for([], {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}) == dict.fromkeys(VARIABLES, "")
    for prefix in ("SHOAL", "RAY"):
        left = settings_for([0], {f"{prefix}_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"})
        assert set(left) == set(VARIABLES) - {"CUDA_VISIBLE_DEVICES"}
