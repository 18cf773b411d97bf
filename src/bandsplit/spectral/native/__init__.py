"""The DALI operator `fn.spectral_split`: its build, its cache, its loading.

`load()` registers the operator with DALI. The first process compiles it (about 10 s; with the CUDA kernel, about half a
minute), later ones load it from the cache. `python -m bandsplit.spectral.native` prebuilds it, for example on a login
node. The operator computes `bandsplit.spectral.transforms.split_images`; its sources are in this folder.

A plugin fits one version of DALI (whose symbols are versioned) and one kind of processor (-march=native), so these
are part of its file's name, and one cache serves nodes that differ.
"""

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
CPU_SOURCES = ("spectral_split.cc", "host_memory.cc")
CUDA_SOURCE = "spectral_split.cu"
SOURCES = ("spectral_split.h", "tiles.h", *CPU_SOURCES, CUDA_SOURCE)

CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-march=native", "-ffp-contract=fast", "-w"]
# Machine code for A100, A40 (and RTX 30) and H100; PTX for what comes after them.
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-w", "--threads", "4"] + [
    f"-gencode=arch=compute_{arch},code={code}"
    for arch, code in [(80, "sm_80"), (86, "sm_86"), (90, "sm_90"), (90, "compute_90")]
]


class BuildError(RuntimeError):
    """There is no operator here; the message says what is missing, or ends with what compiler or loader said."""


def load() -> None:
    """Make `nvidia.dali.fn.spectral_split` available in this process, building the plugin if the cache has none.

    From then on DALI takes its host memory from a pool (see host_memory.cc).

    Raises:
        BuildError: as `build`.
    """
    _loaded()


def has_gpu_kernel() -> bool:
    """Whether the plugin that `load` takes has the operator for the GPU: not so where there is a GPU but no nvcc.

    Raises:
        BuildError: as `build`.
    """
    return "-cuda-" in _loaded().name


@functools.cache
def _loaded() -> Path:
    """The plugin of this process. Cached: DALI takes an operator's name once."""
    from nvidia.dali import plugin_manager

    plugin = build()
    try:
        plugin_manager.load_library(str(plugin))
    except RuntimeError as error:  # such as a cache on a file system without the right to execute
        raise BuildError(f"cannot load {plugin}: {error}") from error
    return plugin


def build(cuda: bool | None = None) -> Path:
    """The plugin from the cache, compiled into it first if need be. Any number of processes may call this at once.

    The cache is $BANDSPLIT_CACHE, else $XDG_CACHE_HOME/bandsplit, else ~/.cache/bandsplit, else (without a home)
    bandsplit-UID in the folder for temporary files. The compiler is $CXX, else g++, else c++. Where none of them is, a
    plugin that another machine of the same kind put into the cache is taken.

    Args:
        cuda: whether to include the GPU kernel; None: where torch sees a GPU and there is an nvcc, or a plugin
            with the GPU kernel is in the cache already.

    Returns:
        the path of the shared library.

    Raises:
        BuildError: no compiler, no nvcc (for cuda=True), no CUDA headers, a cache that cannot be written or is
            another user's, or the compilation failed.
    """
    if cuda is None:
        cuda = _gpu_is_visible() and (_find_nvcc() is not None or _cached(_stem(cuda=True)) is not None)
    cxx, nvcc = _find_cxx(), _find_nvcc()
    if cxx is None or (cuda and nvcc is None):
        prebuilt = _cached(_stem(cuda))
        if prebuilt is None:
            missing = "a C++ compiler (g++, or set CXX)" if cxx is None else "nvcc (pip install bandsplit[nvcc])"
            raise BuildError(
                f"the build of spectral_split needs {missing}, which is not installed; nor has the cache "
                f"{_cache_folder()} a plugin for this machine: build one on a machine with compilers, with "
                "`python -m bandsplit.spectral.native`"
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
        raise BuildError(f"cannot write the cache {cache} ({error}): set BANDSPLIT_CACHE to a folder") from error


def _compile(name: str, cxx: list[str], nvcc: str | None) -> Path:
    """Compiles and links in a folder of its own, then renames the plugin into the cache, its digest in its name."""
    from nvidia.dali import sysconfig

    includes = [*sysconfig.get_compile_flags(), "-isystem", str(_cuda_headers(nvcc))]
    libraries = [*sysconfig.get_link_flags(), "-ldali_core"]
    with tempfile.TemporaryDirectory(dir=_cache_folder(), prefix="building-") as folder:
        linked = str(Path(folder) / "plugin.so")
        objects = [str(Path(folder) / f"{source}.o") for source in CPU_SOURCES]
        for source, target in zip(CPU_SOURCES, objects, strict=True):
            _run([*cxx, *CXX_FLAGS, *includes, "-c", str(HERE / source), "-o", target])
        # --no-undefined: a missing symbol shows here, with its name, and not when a rank loads the plugin
        if nvcc is None:
            _run([*cxx, "-shared", *objects, "-o", linked, *libraries, "-Wl,--no-undefined"])
        else:
            host = ["-ccbin", cxx[-1]]  # the last word: $CXX may be "ccache g++", and nvcc takes one name
            gpu, dali_flags = str(Path(folder) / "gpu.o"), sysconfig.get_compile_flags()
            _run([nvcc, *host, *NVCC_FLAGS, *dali_flags, "-c", str(HERE / CUDA_SOURCE), "-o", gpu])
            _run([nvcc, *host, "-shared", *objects, gpu, "-o", linked, *libraries, "-Xlinker", "--no-undefined"])
        return _into_cache(Path(linked), name)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise BuildError(
            f"the build of spectral_split failed (exit code {done.returncode}):\n{shlex.join(command)}\n{tail}"
        )


def _output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


# What is in the cache ------------------------------------------------------------------------------------------------


def _cache_folder() -> Path:
    if folder := os.environ.get("BANDSPLIT_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bandsplit"
    except RuntimeError:  # a container's user that the system does not know
        return _temporary_cache()


def _temporary_cache() -> Path:
    """A folder of this user alone among everybody's temporary files: who could write there could run code as us."""
    try:
        folder = Path(tempfile.gettempdir(), f"bandsplit-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise BuildError(f"no folder for a cache ({error}): set BANDSPLIT_CACHE to one") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BuildError(f"{folder} is not a folder that only this user can write to: set BANDSPLIT_CACHE to one")
    return folder


def _stem(cuda: bool) -> str:
    """The part of the file's name that a machine without a compiler can tell: all but the compilers' versions."""
    import nvidia.dali
    from nvidia.dali import sysconfig

    flags = [*CXX_FLAGS, *(NVCC_FLAGS if cuda else []), *sysconfig.get_compile_flags(), *sysconfig.get_link_flags()]
    sources = [(HERE / name).read_text() for name in SOURCES]
    key = _hash([nvidia.dali.__version__, *flags, *sources, platform.machine(), _cpu_features()])
    return f"spectral_split-{'cuda' if cuda else 'cpu'}-{key}"


def _into_cache(built: Path, name: str) -> Path:
    """Renames a plugin when all of it is on the disk, in place of damaged ones of this name."""
    plugin = _cache_folder() / f"{name}-{_digest(built)}.so"
    _sync(built)
    built.replace(plugin)
    _sync(plugin.parent)
    for damaged in set(_plugins(name)) - {plugin}:
        with contextlib.suppress(OSError):  # another user's
            damaged.unlink()
    return plugin


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cached(name: str) -> Path | None:
    """The newest plugin in the cache whose file name begins with `name` and that is as it was written.

    Loading one that was cut off since, by a failing disk, a quota or a copy, would end the process with a bus error.
    """
    whole = [plugin for plugin in _plugins(name) if plugin.stem.endswith(f"-{_digest(plugin)}")]
    return max(whole, key=lambda plugin: plugin.stat().st_mtime, default=None)


def _plugins(name: str) -> Iterator[Path]:
    return _cache_folder().glob(f"{name}-*.so")


def _digest(file: Path) -> str | None:
    """Of a file's content; None: it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> str:
    """The features that -march=native looks at."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, features = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, Arm
            return " ".join(sorted(features.split()))
    return ""


# What is on the machine ----------------------------------------------------------------------------------------------


def _gpu_is_visible() -> bool:
    import torch

    return torch.cuda.is_available()


def _find_cxx() -> list[str] | None:
    """The command of the C++ compiler: $CXX, which may have several words ("ccache g++"), g++ or c++."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"the build of spectral_split: CXX = {chosen[0]!r} is not installed")
        return chosen
    return next(([name] for name in ("g++", "c++") if shutil.which(name)), None)


def _find_nvcc() -> str | None:
    for folder in [*_chosen_toolkits(), None, *_toolkits_of_wheels(), Path("/usr/local/cuda")]:
        if nvcc := shutil.which("nvcc", path=None if folder is None else str(folder / "bin")):  # None: on the PATH
            return nvcc
    return None


def _cuda_headers(nvcc: str | None) -> Path:
    """The folder of cuda_runtime.h, which DALI's headers include even where no GPU code is compiled.

    torch's wheels bring it without the crt/ headers that it includes; the package nvidia-cuda-crt puts these beside it.
    """
    own = [] if nvcc is None else [Path(nvcc).resolve().parent.parent]
    toolkits = [*own, *_chosen_toolkits(), *_toolkits_of_wheels(), Path("/usr/local/cuda")]
    for toolkit in toolkits:
        headers = toolkit / "include"
        if all((headers / name).exists() for name in ("cuda_runtime.h", "cuda_fp16.h", "crt/host_config.h")):
            return headers
    raise BuildError(
        "the build of spectral_split needs CUDA's headers (cuda_runtime.h, crt/host_config.h), and none of "
        f"{', '.join(str(toolkit / 'include') for toolkit in toolkits)} has them: "
        "pip install nvidia-cuda-runtime nvidia-cuda-crt, or set CUDA_HOME to a CUDA toolkit"
    )


def _chosen_toolkits() -> list[Path]:
    return [Path(folder) for name in ("CUDA_HOME", "CUDA_PATH") if (folder := os.environ.get(name))]


def _toolkits_of_wheels() -> list[Path]:
    """What NVIDIA's Python packages unpack: nvidia/cu13 and the like."""
    import nvidia

    return [folder for root in nvidia.__path__ for folder in sorted(Path(root).glob("cu[0-9]*"), reverse=True)]
