"""Compiles csrc/ into the shared libraries of other machines, on any x86-64 Linux.

zig (PyPI: ziglang) is a clang that brings the symbols of every glibc, so that a library can ask for an old
one. Android needs clang and lld alone: the few functions that csrc/ takes from its C library stand in
bionic.h.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent
BIONIC = Path(__file__).with_name("bionic.h")
# The kernels' names for extensions are those of LLVM 19; Debian has it as clang-19 and lld-19.
CLANG, LLD = "clang-19", "ld.lld-19"


class Compiler(Protocol):
    """Makes a shared library for one kind of machine."""

    def missing(self) -> str | None:
        """None when it can be called, else what to install."""

    def build(self, csrc: Path, source_hash: str, library: Path) -> None:
        """Compiles csrc/*.c into `library`. CalledProcessError: the compiler said no, on stderr."""


@dataclass(frozen=True, slots=True)
class Glibc:
    """zig's clang; `target` is architecture, system and glibc, as in x86_64-linux-gnu.2.17."""

    target: str

    def missing(self) -> str | None:
        return None if find_spec("ziglang") else f"zig: {sys.executable} -m pip install '.[dist]'"

    def build(self, csrc: Path, source_hash: str, library: Path) -> None:
        compiler = [sys.executable, "-m", "ziglang", "cc", "-target", self.target]
        _build([*compiler, "-Wl,-z,noexecstack"], csrc, source_hash, library, ["-lpthread", "-lm"])


@dataclass(frozen=True, slots=True)
class Android:
    """Debian's clang, without a C library; `target` is architecture, system and API level."""

    target: str

    def missing(self) -> str | None:
        there = shutil.which(CLANG) and shutil.which(LLD)
        return None if there else f"{CLANG} and {LLD}: apt-get install clang-19 lld-19"

    def build(self, csrc: Path, source_hash: str, library: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            headers, stubs = Path(folder, "include"), Path(folder, "lib")
            for name in self._system_headers(csrc):
                (headers / name).parent.mkdir(parents=True, exist_ok=True)
                (headers / name).write_text(f'#include "{BIONIC}"\n')
            link = [f"--ld-path={shutil.which(LLD)}", "-nostdlib", "-shared"]
            compiler = [CLANG, f"--target={self.target}", *link]
            stubs.mkdir()
            self._write_stub(stubs, compiler)
            # Without outlined atomics and stack protectors, nothing of the compiler's own library is needed.
            freestanding = ["-nostdlibinc", f"-I{headers}", "-mno-outline-atomics", "-fno-stack-protector"]
            names = ["-Wl,-soname,libshoal.so", "-Wl,--hash-style=gnu"]
            _build([*compiler, *freestanding, *names], csrc, source_hash, library, [f"-L{stubs}", "-lc"])

    def _system_headers(self, csrc: Path) -> set[str]:
        """The headers that csrc/ includes and clang does not bring."""
        texts = [path.read_text(encoding="utf-8") for path in csrc.iterdir()]
        included = {name for text in texts for name in re.findall(r"#include <(.*)>", text)}
        asked = subprocess.run([CLANG, "-print-resource-dir"], check=True, capture_output=True, text=True)
        return {name for name in included if not Path(asked.stdout.strip(), "include", name).exists()}

    def _write_stub(self, folder: Path, compiler: list[str]) -> None:
        """A libc.so that holds the names and the version of bionic's, and no code."""
        names = re.findall(r"^[a-z][\w ]*?\**(\w+)\(.*\);$", BIONIC.read_text(encoding="utf-8"), re.MULTILINE)
        lines = [f".globl {name}\n.type {name}, %function\n{name}:\n" for name in names]
        (folder / "stub.s").write_text("".join(lines))
        (folder / "stub.map").write_text("LIBC { global: *; };\n")
        version = ["-Wl,-soname,libc.so", f"-Wl,--version-script={folder / 'stub.map'}"]
        subprocess.run(
            [*compiler, *version, str(folder / "stub.s"), "-o", str(folder / "libc.so")], check=True
        )


def _build(compiler: list[str], csrc: Path, source_hash: str, library: Path, libraries: list[str]) -> None:
    flags = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["shoal"]["library"]
    compile_flags = [*flags["compile"], "-Werror", "-fPIC", f'-DSHOAL_SOURCE_HASH="{source_hash}"']
    link_flags = [*flags["link"], "-shared", "-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,defs", "-Wl,-s"]
    sources = sorted(map(str, csrc.glob("*.c")))
    subprocess.run(
        [*compiler, *compile_flags, *link_flags, *sources, "-o", str(library), *libraries], check=True
    )
