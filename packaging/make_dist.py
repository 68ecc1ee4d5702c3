"""Makes everything that can be installed, in dist/ (`make dist`): an sdist, and wheels made from it."""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from compilers import ROOT, Android, Compiler, Glibc


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel to make: the platform in its name, who compiles its library, and the folder within dist/."""

    platform: str
    compiler: Compiler
    folder: str = "."


ANDROID = Android("aarch64-linux-android24")
WHEELS = (
    Wheel("manylinux_2_17_x86_64", Glibc("x86_64-linux-gnu.2.17")),
    Wheel("manylinux_2_17_aarch64", Glibc("aarch64-linux-gnu.2.17")),
    Wheel("android_24_arm64_v8a", ANDROID),
    # Before Python 3.13 pip in Termux takes this tag, and so would a glibc, which cannot load the library:
    # hence a folder of its own, in which no other machine looks.
    Wheel("linux_aarch64", ANDROID, "termux-old"),
)


def build(*arguments: str) -> None:
    """Calls the build backend as others do; what it says is of interest only when it fails."""
    command = [sys.executable, "-m", "build", "--no-isolation", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout)


def make_sdist(out: Path, tree: Path) -> None:
    """The sdist, in `out`, and its contents, in `tree`: every wheel is made from what it holds."""
    build("--sdist", f"--outdir={out}", str(ROOT))
    (sdist,) = out.glob("*.tar.gz")
    with tempfile.TemporaryDirectory(dir=tree.parent) as folder:
        shutil.unpack_archive(sdist, folder)  # just made; Python 3.11 before 3.11.4 knows no filter
        next(Path(folder).iterdir()).rename(tree)


def make_wheel(tree: Path, out: Path, *options: str) -> None:
    shutil.rmtree(tree / "build", ignore_errors=True)
    build("--wheel", f"--outdir={out}", *options, str(tree))


def source_hash(tree: Path) -> str:
    spec = spec_from_file_location("_source_hash", tree / "src" / "shoal" / "engine" / "source_hash.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.source_hash(tree / "csrc"))


def main() -> None:
    out = ROOT / "dist"
    missing = {reason for wheel in WHEELS if (reason := wheel.compiler.missing())}
    if missing:
        sys.exit("make dist needs\n" + "".join(f"    {reason}\n" for reason in sorted(missing)))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = folder / "tree"
        make_sdist(out, tree)
        libraries = {wheel.compiler: folder / f"{i}.so" for i, wheel in enumerate(WHEELS)}
        digest = source_hash(tree)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(c.build, tree / "csrc", digest, path) for c, path in libraries.items()]
        try:
            for job in jobs:
                job.result()
        except subprocess.CalledProcessError:
            sys.exit("make dist: csrc/ did not compile; the compiler's words stand above")
        for wheel in WHEELS:
            take = f"-C--global-option=build_ext --library={libraries[wheel.compiler]}"
            make_wheel(tree, out / wheel.folder, take, f"-C--build-option=--plat-name={wheel.platform}")
        shutil.rmtree(tree / "csrc")  # with nothing to compile, the wheel is for any machine
        make_wheel(tree, out)
    for path in sorted(out.rglob("*.*")):
        print(path.relative_to(out), f"{path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
