"""Builds csrc/ into a plain shared library beside the package, and tags wheels by it.

Everything else about the build is in pyproject.toml. The library exports no Python symbols and links no
libpython, so one wheel `py3-none-PLATFORM` serves every Python; it is loaded by cffi (`ffi.dlopen`). Without
a working compiler the install still succeeds, as `py3-none-any`, and the engine then runs on numba or NumPy.
"""

import importlib.util
import shutil
import sys
import tomllib
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FLAGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["shoal"]["library"]
# Termux's Python calls its platform "linux" before 3.13. Android's C library has the threads in itself.
LIBRARIES = {"linux": ["pthread", "m"], "android": ["m"]}


def source_hash() -> str:
    """From the function that the engine compares with; loaded by its path, as nothing is installed yet."""
    path = ROOT / "src" / "shoal" / "engine" / "source_hash.py"
    spec = importlib.util.spec_from_file_location("_source_hash", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.source_hash(ROOT / "csrc") or ""


def extensions() -> list[Extension]:
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.c"))
    if not sources:
        return []
    headers = [path for pattern in ("*.h", "*.inc") for path in (ROOT / "csrc").glob(pattern)]
    return [
        Extension(
            "shoal.libshoal",
            sources=sources,
            depends=sorted(path.relative_to(ROOT).as_posix() for path in headers),
            define_macros=[("SHOAL_SOURCE_HASH", f'"{source_hash()}"')],
            extra_compile_args=FLAGS["compile"],
            extra_link_args=FLAGS["link"] if sys.platform in LIBRARIES else [],
            libraries=LIBRARIES.get(sys.platform, []),
            optional=True,
        )
    ]


class BuildLibrary(build_ext):
    """A shared library under one name on every platform, with no trace of the Python that built it."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("library=", None, "take this library, compiled for another machine, instead of compiling one"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.library: str | None = None

    def get_ext_filename(self, fullname: str) -> str:
        return "/".join(fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # there is no PyInit_ function to export

    def get_libraries(self, ext: Extension) -> list[str]:
        return list(
            ext.libraries
        )  # the default adds libpython on Android, which breaks at each upgrade there

    def build_extension(self, ext: Extension) -> None:
        if self.library is not None:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.library, target)
            return
        try:
            super().build_extension(ext)
        except Exception:
            # An older library left in the build folder must not be shipped as if it were this source's.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            raise


class TagWheel(bdist_wheel):
    """`py3-none-PLATFORM` with the library inside, `py3-none-any` without."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        build = self.get_finalized_command("build_ext")
        built = [ext for ext in build.extensions or [] if Path(build.get_ext_fullpath(ext.name)).exists()]
        self.root_is_pure = (
            not built
        )  # this is called when all is built, before the wheel's metadata is written
        return "py3", "none", platform if built else "any"


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel})
