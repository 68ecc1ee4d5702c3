"""What can be known of the Arm kernels' speed without an Arm machine: cycles by LLVM's models, instructions
under qemu. Both repeat exactly, so they are held to.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import arm

INSTRUCTIONS = Path(__file__).with_name("instructions.json")
"""The most that each product may take: 1 % above what `python -m bench.arm` printed with clang 19.1.7."""

TWO_LOOPS = """
other:
\tsdot v0.4s, v1.16b, v2.16b
\t.size other, .-other
judged:                                 // @judged
.LBB0_1:                                // an outer loop
\tmov x1, x2
.LBB0_2:                                // Parent Loop
\tsdot v0.4s, v1.16b, v2.4b[0]
\tsmmla v3.4s, v1.16b, v2.16b
\tsubs w8, w8, #1
\tb.ne .LBB0_2
\tcbnz x1, .LBB0_1
.LBB0_3:
\tldr q0, [x0], #16
\ttbz w3, #0, .LBB0_3
\tret
\t.size judged, .-judged
"""


def test_loops_that_multiply_are_found():
    assert arm.innermost_loops(TWO_LOOPS, "judged") == [
        ["sdot v0.4s, v1.16b, v2.4b[0]", "smmla v3.4s, v1.16b, v2.16b", "subs w8, w8, #1", "b.ne .LBB0_2"]
    ]
    assert arm.macs(arm.innermost_loops(TWO_LOOPS, "judged")[0]) == 48
    with pytest.raises(LookupError, match="absent"):
        arm.innermost_loops(TWO_LOOPS, "absent")


@pytest.mark.arm
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["neon_dot", "neon_i8mm"])
def test_musts(isa):
    text = arm.assembly(isa)
    names = {kernel.work: kernel.name for kernel in arm.KERNELS if kernel.set == isa}
    musts = {(work, cpu): must for (of, work, cpu), must in arm.MUSTS.items() if of == isa}
    assert musts
    for (work, cpu), must in musts.items():
        assert arm.macs_per_cycle(arm.innermost_loops(text, names[work]), cpu) >= must, (work, cpu)


@pytest.mark.arm
@pytest.mark.slow
def test_no_product_takes_more_instructions_than_it_did(tmp_path):
    most = json.loads(INSTRUCTIONS.read_text(encoding="utf-8"))
    counts = arm.count_instructions(tmp_path)
    assert counts.keys() == most.keys()
    assert {name: count for name, count in counts.items() if count > most[name]} == {}


@pytest.mark.arm
@pytest.mark.slow
def test_more_rows_cost_more_and_a_row_costs_less(tmp_path):
    """From 1 row to 32, without a cliff: above all not where another way to multiply begins."""
    rows = range(1, 33)
    products = [(isa, type_, n) for isa in arm.TARGETS for type_ in ("q8", "q4") for n in rows]
    counts = arm.count_instructions(tmp_path, products)
    for isa, type_ in {product[:2] for product in products}:
        cost = {n: counts[f"{isa} {type_} {n}"] for n in rows}
        what = f"{isa} {type_}: {cost}"
        assert all(cost[n] < cost[n + 1] for n in rows[:-1]), what
        assert cost[9] <= 1.25 * cost[8], what
        assert cost[16] <= 2 * cost[8], what
        assert all(cost[n + 4] / (n + 4) <= 1.03 * cost[n] / n for n in rows[:-4]), what
