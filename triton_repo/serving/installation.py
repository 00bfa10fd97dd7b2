"""Finds a tritonserver and what it needs around it: libraries, a Python backend, an import path.

A tritonserver on PATH comes first (a container, a system install). Without one, that of the nvidia-pytriton wheel is
run in place. The wheel has a Python backend stub for each Python version in a separate folder, so a backend folder is
made of links.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from export.errors import MissingPackageError
from triton_repo.errors import ServerError

_STUB = "triton_python_backend_stub"
_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A tritonserver."""

    program: Path
    backends: Path | None  # folder of its backends; None: the server's default
    library_folders: tuple[Path, ...]  # folders of shared libraries that it needs

    def environment(self) -> dict[str, str]:
        """This process's environment with the folders that the server and its Python stubs need."""
        environment = dict(os.environ)
        # The stub uses the site-packages of the first python3 on PATH.
        _put_first(environment, "PATH", [Path(sys.executable).parent])
        _put_first(environment, "LD_LIBRARY_PATH", list(self.library_folders))
        return environment


def find_installation(workspace: Path) -> Installation:
    """The tritonserver to run. May write to `workspace`. Raises MissingPackageError or ServerError."""
    on_path = shutil.which("tritonserver")
    if on_path:
        program = Path(on_path).resolve()
        backends = program.parent.parent / "backends"
        return Installation(program=program, backends=backends if backends.is_dir() else None, library_folders=())
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("nvidia-pytriton", "serving without a tritonserver on PATH", "server")
    return _installation_of_wheel(Path(spec.submodule_search_locations[0]), workspace)


def _installation_of_wheel(package: Path, workspace: Path) -> Installation:
    server = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / _STUB
    if not stub.is_file():
        found = sorted(path.name for path in (server / "python_backend_stubs").glob("*"))
        raise ServerError(
            f"finding a tritonserver: {package} has no Python backend for Python {version}, only for "
            f"{', '.join(found)}; use one of these, or put a tritonserver on PATH"
        )
    backend = workspace / "backends" / "python"
    backend.mkdir(parents=True)
    for source in [*(server / "backends" / "python" / name for name in _BACKEND_FILES), stub]:
        (backend / source.name).symlink_to(source)
    libraries = (package.parent / "nvidia_pytriton.libs", *_libpython_folders(version))
    return Installation(
        program=server / "bin" / "tritonserver", backends=workspace / "backends", library_folders=libraries
    )


def _libpython_folders(version: str) -> list[Path]:
    """The folder of the libpython that the stub needs; none if the system's loader finds it. Raises ServerError if it
    is not installed."""
    library = f"libpython{version}.so.1.0"
    folder = Path(sysconfig.get_config_var("LIBDIR") or sys.base_prefix)
    if (folder / library).is_file():
        return [folder]
    if ctypes.util.find_library(f"python{version}") is None:
        raise ServerError(
            f"finding a tritonserver: its Python backend needs {library}, which is neither in {folder} nor in the "
            f"system's folders; install libpython{version}, or use a Python built with --enable-shared"
        )
    return []


def packages_folder() -> Path:
    """The folder that holds moeship's packages. It is the working directory of the server, since Triton's Python stub
    ignores PYTHONPATH and looks for modules in its working directory first. So models import the same moeship as this
    process, and no module in the caller's working directory is imported in place of a library."""
    return Path(__file__).resolve().parents[2]


def _put_first(environment: dict[str, str], variable: str, folders: list[Path]) -> None:
    before = [environment[variable]] if environment.get(variable) else []
    if folders or before:
        environment[variable] = os.pathsep.join([*map(str, folders), *before])
