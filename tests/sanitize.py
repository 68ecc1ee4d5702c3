"""Tests of the C code and of the engine, with the library under ASan and UBSan: python -m tests.sanitize.

Any access beyond an allocation, use after free or undefined behaviour ends the tests with a report. Leaks are
not looked for: the interpreter leaves memory behind. What compiles C of its own stays out."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.kernels.harness import CSRC, source_hash

SANITISERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
FLAGS = ("-std=c11", "-O1", "-g", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", *SANITISERS)
WITHOUT_C = ("host", "power", "scheduler", "strict")
TESTS = (
    "tests/kernels",
    "tests/engine",
    "--deselect=tests/kernels/test_avxvnni.py",
    *(f"--ignore=tests/engine/test_{name}.py" for name in WITHOUT_C),
)
PROCESSES = ("-n", "logical", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder")
WITHOUT = " and ".join(
    f"not {name}"
    for name in (
        "numba",
        "flush_to_zero",
        "memory_of_a_file_is_freed",
        "resident_memory",
        "bus_error_elsewhere",
        "forked_process_adopts",
    )
)
"""Tests of the process itself, which the sanitiser changes: its rounding mode, its resident memory, its
handlers of signals, and its allocator, whose locks a fork leaves locked in the child while another thread
allocates. And those of code that numba compiles."""


def build(folder: Path) -> Path:
    """The sanitised library, one compiler a CPU."""

    def compile_one(source: Path) -> str:
        output = str(folder / f"{source.stem}.o")
        define = f'-DSHOAL_SOURCE_HASH="{source_hash()}"'
        subprocess.run(["gcc", *FLAGS, define, "-c", str(source), "-o", output], check=True)
        return output

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sorted(CSRC.glob("*.c"))))
    library = folder / "libshoal.so"
    subprocess.run(["gcc", *FLAGS, "-shared", *objects, "-o", str(library), "-lpthread", "-lm"], check=True)
    return library


def main() -> int:
    runtime = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="shoal-sanitize-") as name:
        folder = Path(name)
        library = build(folder)
        log = f"log_path={folder / 'report'}"  # pytest would keep standard error, and die with it
        environment = {
            **os.environ,
            "LD_PRELOAD": runtime,
            "ASAN_OPTIONS": f"detect_leaks=0:{log}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
        }
        command = [sys.executable, "-m", "pytest", "-q", "--durations=10", *PROCESSES, *TESTS, "-k", WITHOUT]
        done = subprocess.run([*command, "--library", str(library), *sys.argv[1:]], env=environment)
        reports = sorted(folder.glob("report*"))
        for report in reports:
            print(report.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
    return done.returncode or int(bool(reports))


if __name__ == "__main__":
    sys.exit(main())
