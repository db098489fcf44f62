# SPDX-License-Identifier: MIT
"""tools/demo.sh refuses before it touches anything. (The demo itself trains for minutes.)"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "demo.sh", tmp_path / "tools")
    return tmp_path


@pytest.fixture
def built_tree(tree):
    if "PARALLAX_BINARY" not in os.environ:
        pytest.skip("needs the binary")
    (tree / "build").mkdir()
    (tree / "build" / "parallax").symlink_to(os.environ["PARALLAX_BINARY"])
    return tree


def expect_refusal(tree, *data, says):
    done = subprocess.run([str(tree / "tools" / "demo.sh"), *data], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("demo: ")
    assert says in done.stderr


def test_without_a_build(tree):
    expect_refusal(tree, says="make build")
    assert not (tree / "runs").exists()


def test_a_folder_that_no_demo_made_stays(built_tree):
    precious = built_tree / "runs" / "demo" / "parallax" / "notes.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    expect_refusal(built_tree, says="move it away")
    assert precious.read_text() == "mine"


def test_a_missing_text_leaves_the_last_demo(built_tree):
    last = built_tree / "runs" / "demo" / "report.html"
    last.parent.mkdir(parents=True)
    last.write_text("last")
    (last.parent / ".made-by-demo").touch()
    expect_refusal(built_tree, "no/such.txt", says="no/such.txt")
    assert last.read_text() == "last"


@pytest.mark.parametrize("data, arguments", [
    ("", []), ("a.txt b.txt", ["a.txt", "b.txt"]), ("my texts/a b.txt", ["my texts/a b.txt"]),
    ("'my texts/a b.txt' c.txt", ["my texts/a b.txt", "c.txt"])])  # fmt: skip
def test_make_passes_paths_with_spaces(tree, data, arguments):
    shutil.copy(ROOT / "Makefile", tree)
    demo = tree / "tools" / "demo.sh"
    demo.write_text("#!/bin/sh\nfor path; do echo \"$path\"; done\n")
    (tree / "my texts").mkdir()
    (tree / "my texts" / "a b.txt").touch()
    done = subprocess.run(["make", "-s", "-o", "build", "demo", f"DATA={data}"], cwd=tree,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == arguments
