"""What must hold of LMDeploy's environment: each CUDA library once, from one release, found inside."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import lmdeploy_proof

NCCL = "nvidia/nccl/lib/libnccl.so.2"
CUBLAS, CUBLAS_LT = "nvidia/cublas/lib/libcublas.so.12", "nvidia/cublas/lib/libcublasLt.so.12"
CUDART = "nvidia/cuda_runtime/lib/libcudart.so.12"
ALL = (NCCL, CUBLAS, CUBLAS_LT, CUDART)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Return an environment with one CUDA 12 set."""
    package(tmp_path, "nvidia_nccl_cu12-2.27.5", NCCL)
    package(tmp_path, "nvidia_cublas_cu12-12.8.4.1", CUBLAS, CUBLAS_LT)
    package(tmp_path, "nvidia_cuda_runtime_cu12-12.8.90", CUDART)
    (tmp_path / "include/python3.11").mkdir(parents=True)
    (tmp_path / "include/python3.11/Python.h").touch()
    return tmp_path


def package(prefix: Path, name: str, *files: str) -> None:
    """Add a package with its files."""
    site_packages = prefix / "lib/python3.11/site-packages"
    (site_packages / f"{name}.dist-info").mkdir(parents=True)
    (site_packages / f"{name}.dist-info/RECORD").write_text("".join(f"{file},sha256=x,1\n" for file in files))
    for file in files:
        (site_packages / file).parent.mkdir(parents=True, exist_ok=True)
        (site_packages / file).touch()


def ldd(prefix: Path, *lines: str, without: str = "-") -> str:
    """Return what ldd prints of a TurboMind that is linked so."""
    site_packages = prefix / "lib/python3.11/site-packages"
    found = [f"\t{Path(file).name} => {site_packages / file} (0x1)" for file in ALL if without not in file]
    return "\n".join([*found, "\tlibcuda.so.1 => not found", "\tld.so (0x2)", *lines])


def faults(prefix: Path, *lines: str, without: str = "-") -> str:
    """Return the faults of an environment whose TurboMind is linked so."""
    site_packages = prefix / "lib/python3.11/site-packages"
    return "; ".join(lmdeploy_proof.library_faults(prefix, site_packages, ldd(prefix, *lines, without=without)))


def test_one_set_is_right_even_without_a_driver(prefix: Path) -> None:
    assert faults(prefix) == ""


def test_a_python_without_headers_is_refused(prefix: Path) -> None:
    """Found on a GPU: Triton compiles a module at the start of the PyTorch backend, which dies without Python.h."""
    (prefix / "include/python3.11/Python.h").unlink()
    assert "has no Python.h" in faults(prefix)


def test_what_nvidia_makes_beside_cuda_is_no_second_set(prefix: Path) -> None:
    package(prefix, "nvidia_ml_py-13.580.82")
    assert faults(prefix) == ""


def test_the_mix_of_a_plain_installation_is_refused(prefix: Path) -> None:
    package(prefix, "nvidia_nccl_cu13-2.29.7", NCCL)
    package(prefix, "nvidia_cublas-13.1.1.3")
    said = faults(prefix)
    assert (
        "cu12: nvidia-cublas-cu12, nvidia-cuda-runtime-cu12, nvidia-nccl-cu12; cu13: nvidia-cublas, nvidia-nccl-cu13"
        in said
    )
    assert "belongs to nvidia_nccl_cu12-2.27.5, nvidia_nccl_cu13-2.29.7" in said


def test_a_second_copy_is_refused(prefix: Path) -> None:
    package(prefix, "other-1", "other.libs/libnccl.so.2")
    assert "other.libs/libnccl.so.2" in faults(prefix)


@pytest.mark.parametrize("file", ALL)
def test_each_library_must_be_found_once_and_inside(prefix: Path, file: str) -> None:
    name = Path(file).name
    assert f"does not find {name}" in faults(prefix, f"\t{name} => not found", without=file)
    outside = faults(prefix, f"\t{name} => /usr/local/cuda/lib64/{name} (0x1)", without=file)
    assert f"TurboMind would load {name} from /usr/local/cuda/lib64/{name}, which is outside" in outside
    package(prefix, "torch-2.10.0", f"torch/lib/{name}")
    assert f"torch/lib/{name} belongs to" in faults(prefix)


def test_what_ldd_does_not_mention_is_no_proof(prefix: Path) -> None:
    assert "does not find libcudart.so*" in faults(prefix, without=CUDART)
    site_packages = prefix / "lib/python3.11/site-packages"
    said = lmdeploy_proof.library_faults(prefix, site_packages, "\tnot a dynamic executable\n")
    assert said == ["TurboMind's library does not find libcublas.so*, libcublasLt.so*, libcudart.so*, libnccl.so*"]


def test_a_library_that_a_wheel_carries_under_a_name_of_its_own_is_no_second_copy(prefix: Path) -> None:
    package(prefix, "torchvision-0.25.0", "torchvision.libs/libcudart.e8e8b82a.so.12")
    assert faults(prefix, "\tlibc.so.6 => /lib/libc.so.6") == ""


def test_who_brings_each_library_is_kept(prefix: Path) -> None:
    assert lmdeploy_proof.providers(prefix / "lib/python3.11/site-packages", ldd(prefix)) == {
        "libcublas.so.12": "nvidia-cublas-cu12 12.8.4.1",
        "libcublasLt.so.12": "nvidia-cublas-cu12 12.8.4.1",
        "libcudart.so.12": "nvidia-cuda-runtime-cu12 12.8.90",
        "libnccl.so.2": "nvidia-nccl-cu12 2.27.5",
    }
