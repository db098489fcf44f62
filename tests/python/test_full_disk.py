# SPDX-License-Identifier: MIT
"""A file system that is really full: a tmpfs of a few hundred KiB in a mount namespace of its own."""

import os
import subprocess

import pytest

BINARY = os.environ.get("PARALLAX_BINARY")
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2"; shift 2; '
TINY = ["model.hidden_size=16", "model.num_layers=1", "model.num_q_heads=2", "model.num_kv_heads=1",
        "model.head_dim=8", "model.ffn_size=32", "data.seq_len=32", "train.batch_size=2", "train.device=cpu",
        "train.eval_batches=1", "train.steps=100", "train.checkpoint_every=1", "train.keep_last=100"]  # fmt: skip


def on_small_disk(size, folder, script, *arguments):
    folder.mkdir()
    return subprocess.run([*NAMESPACE, MOUNT + script, "sh", size, str(folder), *map(str, arguments)],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def needs_namespaces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("try") / "disk"
    if not BINARY or on_small_disk("64k", folder, "true").returncode != 0:
        pytest.skip("needs the binary and the right to mount a tmpfs")


def test_tokenize_leaves_nothing(tmp_path):
    (tmp_path / "text.txt").write_text("more text than fits. " * 50_000)
    disk = tmp_path / "disk"
    done = on_small_disk("256k", disk, 'code=0; "$1" tokenize "$2" --out "$3/data" || code=$?; ls -A "$3"; exit $code',
                         BINARY, tmp_path / "text.txt", disk)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr
    assert "train-00000.tokens" in done.stderr and "free some space" in done.stderr
    assert done.stdout == ""


def test_train_keeps_the_older_checkpoints(tmp_path):
    (tmp_path / "text.txt").write_text("some words to train on. " * 400)
    (tmp_path / "config.toml").write_text("")
    subprocess.run([BINARY, "tokenize", tmp_path / "text.txt", "--out", tmp_path / "data"], check=True,
                   capture_output=True)  # fmt: skip
    settings = [x for s in [f"data.path={tmp_path / 'data'}", *TINY] for x in ("--set", s)]
    disk = tmp_path / "disk"
    script = ('binary=$1; run=$2; shift 2; code=0; "$binary" train --out "$run" "$@" || code=$?; echo "$code"; '
              'ls -A "$run/checkpoints"; "$binary" generate "$run" --prompt some --max-new-tokens 3 >&2')  # fmt: skip
    done = on_small_disk("600k", disk, script, BINARY, disk / "run", "--config", tmp_path / "config.toml", *settings)
    assert done.returncode == 0, done.stderr
    code, *checkpoints = done.stdout.split()
    assert code == "1"
    assert checkpoints and all(name.startswith("step-") for name in checkpoints)
    errors = [line for line in done.stderr.splitlines() if line.startswith("parallax: ")]
    assert len(errors) == 1 and "No space left on device" in errors[0]
