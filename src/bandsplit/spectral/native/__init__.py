"""Builds, caches and loads the DALI operator `fn.spectral_split`.

`load()` registers the operator with DALI. The first process compiles the plugin (about 10 s, or 40 s with the GPU
kernel) and later ones load it from the cache. `python -m bandsplit.spectral.native` prebuilds it, for example on a
login node. The operator computes `bandsplit.spectral.transforms.split_images`; its sources are in this folder.

A plugin works with one DALI version only (DALI's symbols are versioned), and with one set of CPU features
(-march=native). Both are hashed into its file name, so different machines can share a cache.
"""

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from bandsplit import paths
from bandsplit.progress import followed

HERE = Path(__file__).parent
CPU_SOURCES = ("spectral_split.cc", "host_memory.cc")
CUDA_SOURCE = "spectral_split.cu"
SOURCES = ("spectral_split.h", "tiles.h", *CPU_SOURCES, CUDA_SOURCE)

CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-march=native", "-ffp-contract=fast", "-w"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-w", "--threads", "4"]
NVCC_FLAGS += ["-gencode=arch=compute_90,code=compute_90"]  # PTX, for GPUs that are newer than the machine code
CAPABILITIES = (75, 80, 86, 90, 100, 120)
"""Compute capabilities of the GPUs that get machine code, times ten: those of torch's packages."""


class BuildError(RuntimeError):
    """The operator cannot be built or loaded; the message names what is missing or ends with the tool's output."""


def load() -> None:
    """Registers `nvidia.dali.fn.spectral_split` in this process; builds the plugin if it is not in the cache.

    Loading the plugin also makes DALI allocate host memory from a pool (see host_memory.cc).

    Raises:
        BuildError: as raised by `build`, or the plugin cannot be loaded.
    """
    _loaded()


def has_gpu_kernel() -> bool:
    """Whether the plugin has the GPU operator. It does not if there is a GPU but no nvcc. Loads the plugin.

    Raises:
        BuildError: as raised by `load`.
    """
    return "-cuda-" in _loaded().name


@functools.cache
def _loaded() -> Path:
    """Loads the plugin and returns its path. Cached, because DALI registers an operator's name only once."""
    from nvidia.dali import plugin_manager

    plugin = build()
    try:
        plugin_manager.load_library(str(plugin))
    except RuntimeError as error:  # such as a cache on a file system mounted noexec
        raise BuildError(f"cannot load {plugin}: {error}") from error
    return plugin


def build(cuda: bool | None = None) -> Path:
    """Returns the cached plugin, compiling it first if it is not in the cache. Safe to call from several processes.

    The cache folder is the first available of $BANDSPLIT_CACHE, $XDG_CACHE_HOME/bandsplit, ~/.cache/bandsplit and, if
    the user has no home folder, bandsplit-UID in the folder for temporary files. The compiler is $CXX, g++ or c++. If
    there is no compiler, a plugin that another machine with the same CPU features put in the cache is used.

    Args:
        cuda: whether to include the GPU kernel; None includes it if torch sees a GPU and either nvcc is found or a
            plugin with the GPU kernel is in the cache.

    Returns:
        the path of the shared library.

    Raises:
        BuildError: the compiler, nvcc (for `cuda=True`) or the CUDA headers are missing, the cache folder is not
            writable or not safe to use, or compilation failed.
    """
    if cuda is None:
        cuda = _gpu_is_visible() and (_find_nvcc() is not None or _cached(_stem(cuda=True)) is not None)
    cxx, nvcc = _find_cxx(), _find_nvcc()
    if cxx is None or (cuda and nvcc is None):
        prebuilt = _cached(_stem(cuda))
        if prebuilt is None:
            missing = "a C++ compiler (g++, or set CXX)" if cxx is None else "nvcc (pip install -e .[nvcc])"
            raise BuildError(
                f"building spectral_split needs {missing}, which is not installed, and the cache {_cache_folder()} "
                "has no plugin for this machine: install it, or prebuild the plugin with "
                "`python -m bandsplit.spectral.native` on a machine with a compiler and the same CPU features"
            )
        return prebuilt

    compilers = [cxx, [nvcc]] if cuda and nvcc else [cxx]
    versions = [word for compiler in compilers for word in (*compiler, _output([*compiler, "--version"]))]
    name = f"{_stem(cuda)}-{_hash(versions)}"
    if plugin := _cached(name):
        return plugin
    cache = _cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            return _cached(name) or _compile(name, cxx, nvcc if cuda else None)
    except OSError as error:
        raise BuildError(
            f"cannot write to the cache {cache} ({error}): set BANDSPLIT_CACHE to a writable folder"
        ) from error


def _compile(name: str, cxx: list[str], nvcc: str | None) -> Path:
    """Compiles and links in a temporary folder in the cache, then moves the plugin into the cache."""
    from nvidia.dali import sysconfig

    includes = [*sysconfig.get_compile_flags(), "-isystem", str(_cuda_headers(nvcc))]
    libraries = [*sysconfig.get_link_flags(), "-ldali_core"]
    with tempfile.TemporaryDirectory(dir=_cache_folder(), prefix="building-") as folder:
        linked, gpu = str(Path(folder) / "plugin.so"), str(Path(folder) / "gpu.o")
        objects = [str(Path(folder) / f"{source}.o") for source in CPU_SOURCES]
        commands = [
            [*cxx, *CXX_FLAGS, *includes, "-c", str(HERE / source), "-o", target]
            for source, target in zip(CPU_SOURCES, objects, strict=True)
        ]
        # --no-undefined reports a missing symbol at link time, not when a rank loads the plugin
        if nvcc is None:
            commands.append([*cxx, "-shared", *objects, "-o", linked, *libraries, "-Wl,--no-undefined"])
        else:
            host = ["-ccbin", cxx[-1]]  # $CXX may be "ccache g++", but -ccbin takes one program
            dali_flags, link = sysconfig.get_compile_flags(), ["-Xlinker", "--no-undefined"]
            commands += [
                [nvcc, *host, *NVCC_FLAGS, *_machine_code(nvcc), *dali_flags, "-c", str(HERE / CUDA_SOURCE), "-o", gpu],
                [nvcc, *host, "-shared", *objects, gpu, "-o", linked, *libraries, *link],
            ]
        for command in followed(commands, "building the DALI operator", len(commands), "commands"):
            _run(command)
        return _into_cache(Path(linked), name)


def _machine_code(nvcc: str) -> list[str]:
    """Options for machine code of CAPABILITIES, without those that this nvcc does not know."""
    known = _output([nvcc, "--list-gpu-code"]).split()
    return [f"-gencode=arch=compute_{n},code=sm_{n}" for n in CAPABILITIES if f"sm_{n}" in known]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise BuildError(
            f"building spectral_split failed (exit code {done.returncode}):\n{shlex.join(command)}\n{tail}"
        )


def _output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


# Cache ---------------------------------------------------------------------------------------------------------------


def _cache_folder() -> Path:
    try:
        return paths.cache_folder()
    except OSError as error:
        raise BuildError(str(error)) from error


def _stem(cuda: bool) -> str:
    """The file name up to the hash of the compilers' versions, which a machine without a compiler does not know."""
    import nvidia.dali
    from nvidia.dali import sysconfig

    gpu = [*NVCC_FLAGS, *map(str, CAPABILITIES)] if cuda else []
    flags = [*CXX_FLAGS, *gpu, *sysconfig.get_compile_flags(), *sysconfig.get_link_flags()]
    sources = [(HERE / name).read_text() for name in SOURCES]
    key = _hash([nvidia.dali.__version__, *flags, *sources, platform.machine(), _cpu_features()])
    return f"spectral_split-{'cuda' if cuda else 'cpu'}-{key}"


def _into_cache(built: Path, name: str) -> Path:
    """Moves a plugin into the cache, with its digest in its name, and removes damaged ones of the same name.

    The file is synced to disk first, so that a crash leaves no truncated plugin under the final name.
    """
    plugin = _cache_folder() / f"{name}-{_digest(built)}.so"
    _sync(built)
    built.replace(plugin)
    _sync(plugin.parent)
    for damaged in set(_plugins(name)) - {plugin}:
        with contextlib.suppress(OSError):  # owned by another user
            damaged.unlink()
    return plugin


def _sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cached(name: str) -> Path | None:
    """The newest plugin in the cache whose file name starts with `name` and whose content matches its digest.

    The digest is checked because loading a truncated plugin (bad disk, quota, partial copy) crashes with a bus error.
    """
    whole = [plugin for plugin in _plugins(name) if plugin.stem.endswith(f"-{_digest(plugin)}")]
    return max(whole, key=lambda plugin: plugin.stat().st_mtime, default=None)


def _plugins(name: str) -> Iterator[Path]:
    return _cache_folder().glob(f"{name}-*.so")


def _digest(file: Path) -> str | None:
    """First 16 hex digits of the SHA-256 of a file; None if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> str:
    """The CPU features that -march=native depends on."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, features = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, Arm
            return " ".join(sorted(features.split()))
    return ""


# Compilers and headers -----------------------------------------------------------------------------------------------


def _gpu_is_visible() -> bool:
    import torch

    return torch.cuda.is_available()


def _find_cxx() -> list[str] | None:
    """The C++ compiler's command as a list of words ($CXX may be "ccache g++"); None if there is none.

    Raises BuildError if $CXX is not installed.
    """
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"building spectral_split: CXX = {chosen[0]!r} is not installed")
        return chosen
    return next(([name] for name in ("g++", "c++") if shutil.which(name)), None)


def _find_nvcc() -> str | None:
    for folder in [*_chosen_toolkits(), None, *_toolkits_of_wheels(), Path("/usr/local/cuda")]:
        if nvcc := shutil.which("nvcc", path=None if folder is None else str(folder / "bin")):  # None searches PATH
            return nvcc
    return None


def _cuda_headers(nvcc: str | None) -> Path:
    """The folder of cuda_runtime.h, which DALI's headers include even in a CPU build.

    The CUDA wheels that torch installs lack the crt/ headers it includes; the package nvidia-cuda-crt adds them.

    Raises BuildError if no folder has all the headers.
    """
    own = [] if nvcc is None else [Path(nvcc).resolve().parent.parent]
    toolkits = [*own, *_chosen_toolkits(), *_toolkits_of_wheels(), Path("/usr/local/cuda")]
    for toolkit in toolkits:
        headers = toolkit / "include"
        if all((headers / name).exists() for name in ("cuda_runtime.h", "cuda_fp16.h", "crt/host_config.h")):
            return headers
    raise BuildError(
        "building spectral_split needs the CUDA headers cuda_runtime.h, cuda_fp16.h and crt/host_config.h; searched "
        f"{', '.join(str(toolkit / 'include') for toolkit in toolkits)}: "
        "pip install nvidia-cuda-runtime nvidia-cuda-crt, or set CUDA_HOME to a CUDA toolkit"
    )


def _chosen_toolkits() -> list[Path]:
    return [Path(folder) for name in ("CUDA_HOME", "CUDA_PATH") if (folder := os.environ.get(name))]


def _toolkits_of_wheels() -> list[Path]:
    """Toolkit folders of NVIDIA's Python packages, such as site-packages/nvidia/cu13; the newest first."""
    import nvidia

    return [folder for root in nvidia.__path__ for folder in sorted(Path(root).glob("cu[0-9]*"), reverse=True)]
