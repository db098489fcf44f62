# SPDX-License-Identifier: MIT
"""kernels/cuda/ptxas_check.sh, which stands between cmake and nvcc: what ptxas says and what the build
makes of it."""

import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "kernels" / "cuda" / "ptxas_check.sh"
KERNEL = """ptxas info    : Compiling entry function 'forward' for 'sm_90a'
ptxas info    : Function properties for forward
    72 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 240 registers, used 1 barriers"""


def build(report, budget=0, status=0):
    """What a compiler that says `report` comes to."""
    compiler = ["bash", "-c", 'echo "$1" >&2; exit "$2"', "nvcc", report, str(status)]
    return subprocess.run(
        ["bash", SCRIPT, str(budget), *compiler], capture_output=True, text=True, check=False
    )


def test_a_clean_kernel_passes_and_says_nothing():
    done = build(KERNEL.format(stores=0, loads=0))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_spills_beyond_the_budget_fail():
    assert build(KERNEL.format(stores=92, loads=228), budget=228).returncode == 0
    done = build(KERNEL.format(stores=92, loads=228), budget=96)
    assert done.returncode == 1
    assert "228 bytes spill loads (budget 96)" in done.stderr and "'forward'" in done.stderr


@pytest.mark.parametrize(
    "warning",
    [
        "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored",
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to ...",
        "ptxas info : (C7514) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to ...",
    ],
)
def test_serialised_products_and_ignored_registers_fail(warning):
    done = build(KERNEL.format(stores=0, loads=0) + "\n" + warning)
    assert done.returncode == 1 and warning in done.stderr


def test_what_the_compiler_says_comes_through():
    done = build("kernel.cu(3): error: expected a ;", status=2)
    assert done.returncode == 2 and "expected a ;" in done.stderr
