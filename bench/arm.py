"""The Arm kernels judged without an Arm machine: cycles of their innermost loops by LLVM's models of cores,
and exact counts of instructions under qemu.

    python -m bench.arm [--gcc]

Needs Debian's clang-19, lld-19, llvm-19, qemu-user, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross (`make
check-arm` installs them). A model knows nothing of caches and memory, and of packing only the instruction
counts tell: they are of whole products."""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.text_table import table

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
COUNT = Path(__file__).with_name("arm_count")
CLANG, MCA, QEMU = "clang-19", "llvm-mca-19", "qemu-aarch64"
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off")
ARM = (CLANG, "--target=aarch64-linux-gnu")
GCC = ("aarch64-linux-gnu-gcc",)

CEILINGS = {"neoverse-n1": 32, "neoverse-v1": 64, "neoverse-n2": 32, "neoverse-v2": 64, "cortex-a55": 16}
"""int8 MAC a cycle by SDOT, in the order of columns; SMMLA does twice as many. About Cortex-A76, X1, A710, X3
and, being itself, A55."""
NO_SMMLA = ("neoverse-n1", "cortex-a55")
TARGETS = {
    "neon": "arch=armv8-a",
    "neon_dot": "arch=armv8.2-a+dotprod",
    "neon_i8mm": "arch=armv8.2-a+dotprod+i8mm",
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loop to judge: `call` is C, over w, x and sums."""

    set: str
    work: str
    call: str

    @property
    def name(self) -> str:
        """Of the function that the loop is compiled in."""
        return "judged_" + re.sub(r"\W+", "_", self.work)


ALONE = "(shoal_ahead){.alone = 1}"


def _kernels() -> list[Kernel]:
    found = []
    for isa in ("neon", "neon_dot"):  # few rows of neon_i8mm are neon_dot's
        for bits, no_mins in ((8, ""), (4, "NULL, ")):
            found += [
                Kernel(
                    isa,
                    f"int{bits}, rows: {rows}",
                    f"q{bits}_dots(w, s, {no_mins}x, {rows}, 1, {ALONE}, sums)",
                )
                for rows in (1, 2, 4)
            ]
    for isa in ("neon_dot", "neon_i8mm"):
        for mins, weights in ((0, "int8, int4"), (1, "int4 with mins")):
            found.append(Kernel(isa, f"{weights}, many rows", f"packed_dots(w, x, 4, n, {mins}, sums)"))
    return found


KERNELS = _kernels()

MUSTS = {
    ("neon_dot", "int8, rows: 1", "neoverse-n1"): 15.0,
    ("neon_dot", "int8, rows: 1", "neoverse-v1"): 31.0,
    ("neon_dot", "int8, rows: 1", "cortex-a55"): 2.8,
    ("neon_dot", "int8, int4, many rows", "neoverse-n1"): 0.56 * 32,
    ("neon_dot", "int8, int4, many rows", "neoverse-v1"): 0.56 * 64,
    ("neon_i8mm", "int8, int4, many rows", "neoverse-n2"): 0.40 * 64,
}
"""MAC a cycle, group scales included."""

GGML = (
    ("q8_0, rows: 1 (SDOT)", "9.8 (31 %)", "27.7 (44 %)", "14.9 (47 %)", "20.9 (33 %)", "2.1 (13 %)"),
    ("q4_0, rows: 1 (SDOT)", "8.0 (25 %)", "19.3 (30 %)", "10.6 (33 %)", "18.0 (28 %)", "2.2 (14 %)"),
    ("q8_0, many rows (SDOT)", "16.5 (52 %)", "36.3 (57 %)", "19.6 (61 %)", "33.9 (53 %)", "5.6 (35 %)"),
    ("q8_0, many rows (SMMLA)", "-", "-", "24.3 (38 %)", "36.3 (29 %)", "-"),
)
"""ggml's repacked kernels, by LLVM 23's models of A76, X1, A710, X3 and A55 (2026-11)."""

PRODUCTS = [(isa, type_, rows) for isa in TARGETS for type_ in ("q8", "q4") for rows in (1, 4, 96)]
COLUMNS, PANELS = 512, 4
"""Of the products whose instructions are counted."""


def assembly(isa: str, compiler: Sequence[str] = ARM) -> str:
    """The set's file compiled with one function for each of its kernels."""
    text = [f'#include "{isa}.c"']
    text.append(
        "#ifdef __clang__\n#pragma clang attribute push(__attribute__((target("
        f'"{TARGETS[isa]}"))), apply_to = function)\n#endif'
    )
    for kernel in KERNELS:
        if kernel.set != isa:
            continue
        if "packed" in kernel.call:
            arguments = "const packed_panel *w, const packed_rows *x, int32_t n, v16 *sums"
        else:
            weights = "int8_t" if kernel.call.startswith("q8") else "uint8_t"
            arguments = f"const {weights} *w, const uint16_t *s, const shoal_q8_row *x, v16 *sums"
        text.append(f"void {kernel.name}({arguments});\nvoid {kernel.name}({arguments}) {{ {kernel.call}; }}")
    text.append("#ifdef __clang__\n#pragma clang attribute pop\n#endif\n")
    return subprocess.run(
        [*compiler, *FLAGS, f"-I{CSRC}", "-S", "-xc", "-", "-o", "-"],
        input="\n".join(text),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def innermost_loops(text: str, function: str) -> list[list[str]]:
    """The instructions of each loop of a function that multiplies and has no other loop within."""
    body = re.search(rf"^{function}:(.*?)^\s+\.size\s+{function}\b", text, re.M | re.S)
    if not body:
        raise LookupError(f"no function {function} in the assembly")
    lines = [line.split("//")[0].rstrip() for line in body[1].splitlines()]
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.startswith(".L") and line.endswith(":")}
    spans = []
    for at, line in enumerate(lines):
        jump = re.match(r"\s+(?:b\.?\w*|cbn?z|tbn?z)\s.*?(\.L\w+)$", line)
        if jump and labels.get(jump[1], at) < at:
            spans.append((labels[jump[1]], at))
    loops = []
    for first, last in spans:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            continue
        loop = [line.strip() for line in lines[first : last + 1] if re.match(r"\s+[a-z]", line)]
        if macs(loop):
            loops.append(loop)
    return loops


def macs(loop: Sequence[str]) -> int:
    """Multiply-accumulates of one turn."""
    each = {"sdot": 16, "smmla": 32, "smull": 8, "smlal": 8, "smull2": 8, "smlal2": 8}
    return sum(each.get(line.split()[0], 0) for line in loop)


def cycles(loop: Sequence[str], cpu: str) -> float:
    """Of one turn among many, by LLVM's model."""

    turns = 400
    done = subprocess.run(
        [MCA, "-mtriple=aarch64", f"-mcpu={cpu}", f"-iterations={turns}"],
        input=".Lhere:\n" + re.sub(r"\.L\w+", ".Lhere", "\n".join(loop)) + "\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"Total Cycles:\s+(\d+)", done)
    assert found, done
    return int(found[1]) / turns


def macs_per_cycle(loops: Sequence[Sequence[str]], cpu: str) -> float:
    """Over loops that do as many turns each, one after the other."""
    return sum(map(macs, loops)) / sum(cycles(loop, cpu) for loop in loops)


def ceiling(loops: Sequence[Sequence[str]], cpu: str) -> int | None:
    """MAC a cycle at most; None if the core lacks the instruction."""
    if not any(line.startswith("smmla") for loop in loops for line in loop):
        return CEILINGS[cpu]
    return None if cpu in NO_SMMLA else 2 * CEILINGS[cpu]


def count_instructions(folder: Path, products: Sequence[tuple[str, str, int]] = PRODUCTS) -> dict[str, int]:
    """Instructions of each product (set, type, rows), exactly; `folder` takes what is compiled."""
    plugin, product = folder / "plugin.so", folder / "product"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", COUNT / "plugin.c", "-o", plugin], check=True)
    sources = [COUNT / "product.c", *sorted(CSRC.glob("*.c"))]
    subprocess.run(
        [*ARM, *FLAGS, "-fuse-ld=lld", "-static", *sources, "-o", product, "-lpthread", "-lm"], check=True
    )
    counts = {}
    for isa, type_, rows in products:
        done = subprocess.run(
            [QEMU, "-cpu", "max,pauth-impdef=on", "-plugin", str(plugin), str(product), isa, type_]
            + [str(number) for number in (rows, COLUMNS, PANELS)],
            check=True,
            capture_output=True,
            text=True,
        )
        counts[f"{isa} {type_} {rows}"] = int(done.stderr)
    return counts


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.arm", description=__doc__)
    parser.add_argument("--gcc", action="store_true", help="cycles of what gcc makes of the kernels")
    compiler = GCC if parser.parse_args().gcc else ARM
    texts = {isa: assembly(isa, compiler) for isa in TARGETS}
    rows = []
    for kernel in KERNELS:
        loops = innermost_loops(texts[kernel.set], kernel.name)
        row = [kernel.set, kernel.work]
        for cpu in CEILINGS:
            most = ceiling(loops, cpu)
            if most is None:
                row.append("-")
                continue
            reached = macs_per_cycle(loops, cpu)
            must = MUSTS.get((kernel.set, kernel.work, cpu))
            row.append(f"{reached:.1f} ({100 * reached / most:.0f} %)" + (f" >= {must:.1f}" if must else ""))
        rows.append(row)
    print("MAC a cycle (of the ceiling) of the innermost loop, group scales included; >= is a must\n")
    rows += [["ggml", *cells] for cells in GGML]
    print(table(["set", "loop", *CEILINGS], rows))
    with tempfile.TemporaryDirectory() as folder:
        counts = count_instructions(Path(folder))
    print(f"\nInstructions of a whole product of {COLUMNS} inputs with {16 * PANELS} outputs\n")
    rows = []
    for (isa, type_, n), count in zip(PRODUCTS, counts.values(), strict=True):
        rows.append([isa, type_, str(n), str(count), f"{n * COLUMNS * 16 * PANELS / count:.1f}"])
    print(table(["set", "weights", "rows", "instructions", "MAC an instruction"], rows))


if __name__ == "__main__":
    main()
