"""What must hold of LMDeploy's environment: each CUDA library once, from one release, found inside."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import lmdeploy_proof

NCCL = "nvidia/nccl/lib/libnccl.so.2"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Return an environment with one CUDA 12 set."""
    package(tmp_path, "nvidia_nccl_cu12-2.27.5", NCCL)
    package(tmp_path, "nvidia_cublas_cu12-12.8.4.1", "nvidia/cublas/lib/libcublas.so.12")
    return tmp_path


def package(prefix: Path, name: str, *files: str) -> None:
    """Add a package with its files."""
    site_packages = prefix / "lib/python3.11/site-packages"
    (site_packages / f"{name}.dist-info").mkdir(parents=True)
    (site_packages / f"{name}.dist-info/RECORD").write_text("".join(f"{file},sha256=x,1\n" for file in files))
    for file in files:
        (site_packages / file).parent.mkdir(parents=True, exist_ok=True)
        (site_packages / file).touch()


def faults(prefix: Path, *lines: str) -> str:
    """Return the faults of an environment whose TurboMind is linked so."""
    site_packages = prefix / "lib/python3.11/site-packages"
    usual = [f"\tlibnccl.so.2 => {site_packages / NCCL} (0x1)", "\tlibcuda.so.1 => not found", "\tld.so (0x2)"]
    return "; ".join(lmdeploy_proof.library_faults(prefix, site_packages, "\n".join([*usual, *lines])))


def test_one_set_is_right_even_without_a_driver(prefix: Path) -> None:
    assert faults(prefix) == ""


def test_what_nvidia_makes_beside_cuda_is_no_second_set(prefix: Path) -> None:
    package(prefix, "nvidia_ml_py-13.580.82")
    assert faults(prefix) == ""


def test_the_mix_of_a_plain_installation_is_refused(prefix: Path) -> None:
    package(prefix, "nvidia_nccl_cu13-2.29.7", NCCL)
    package(prefix, "nvidia_cublas-13.1.1.3")
    said = faults(prefix)
    assert "cu12: nvidia-cublas-cu12, nvidia-nccl-cu12; cu13: nvidia-cublas, nvidia-nccl-cu13" in said
    assert "belongs to nvidia_nccl_cu12-2.27.5, nvidia_nccl_cu13-2.29.7" in said


def test_a_second_copy_is_refused(prefix: Path) -> None:
    package(prefix, "other-1", "other.libs/libnccl.so.2")
    assert "other.libs/libnccl.so.2" in faults(prefix)


def test_a_lost_library_is_named(prefix: Path) -> None:
    assert faults(prefix, "\tlibcudart.so.12 => not found").endswith("does not find libcudart.so.12")


def test_a_library_from_elsewhere_is_named(prefix: Path) -> None:
    said = faults(
        prefix, "\tlibcublas.so.12 => /usr/local/cuda/lib64/libcublas.so.12 (0x1)", "\tlibc.so.6 => /lib/libc.so.6"
    )
    assert said.startswith("TurboMind would load libcublas.so.12 from /usr/local/cuda/lib64/libcublas.so.12, which is")
    assert "libc.so.6" not in said
