# SPDX-License-Identifier: MIT
"""docs/guide.md says what is true: its commands and options exist, its code runs."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.S | re.M)


def commands():
    lines = "".join(blocks("sh")).splitlines()
    return sorted({line for line in lines if line.startswith("build/parallax ")})


def test_there_is_something_to_check():
    assert len(commands()) >= 10
    assert blocks("cpp") and blocks("python")


@pytest.mark.skipif("PARALLAX_BINARY" not in os.environ, reason="needs the binary")
def test_every_command_and_option_exists():
    helps = {}
    for line in commands():
        words = shlex.split(line)
        command = words[1]
        if command not in helps:
            helps[command] = subprocess.run(
                [os.environ["PARALLAX_BINARY"], command, "--help"],
                check=True, capture_output=True, text=True).stdout
        for word in words[2:]:
            if word.startswith("--"):
                assert re.search(rf"{word}\b", helps[command]), line


def test_configs_and_links_exist():
    for name in re.findall(r"configs/[\w.-]+\.toml", GUIDE):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([^):]+)\)", GUIDE):
        assert (ROOT / "docs" / name).is_file(), name
    for name in re.findall(r"`((?:kernels|ops|lm|examples)/[\w/.]+)`", GUIDE):
        assert (ROOT / name).exists(), name


def test_python_runs():
    code = next(block for block in blocks("python") if "parallax_cpp" in block)
    subprocess.run([str(ROOT / ".venv" / "bin" / "python"), "-c", code], cwd=ROOT, check=True)


def test_cpp_excerpts_are_the_example():
    """What the guide shows of examples/decode stands there, line by line in this order."""
    def lines(text):
        return "\n".join(line.strip() for line in text.splitlines())

    example = lines((ROOT / "examples" / "decode" / "decode.cc").read_text())
    excerpts = blocks("cpp")[1:]
    assert len(excerpts) >= 3
    for excerpt in excerpts:
        assert lines(excerpt).strip() in example, excerpt


def test_cpp_compiles(tmp_path):
    source = tmp_path / "guide.cc"
    source.write_text(blocks("cpp")[0])
    subprocess.run(["g++", "-std=c++20", "-Wall", "-Werror", "-fsyntax-only",
                    f"-I{ROOT / 'kernels' / 'include'}", str(source)], check=True)
