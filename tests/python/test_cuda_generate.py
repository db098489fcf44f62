# SPDX-License-Identifier: MIT
"""`parallax generate` on a GPU from the outside: models trained there, on text that leaves no choice,
write the same on the CPU in float32."""

import json
import os
import subprocess

import pytest
import torch

BINARY = os.environ.get("PARALLAX_BINARY")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not BINARY, reason="the binary was not built"),
]

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 "  # the text, again and again
SETTINGS = [
    "model.hidden_size=64", "model.num_layers=2", "model.num_q_heads=4", "model.num_kv_heads=2",
    "model.head_dim=32", "model.ffn_size=128", "data.seq_len=256", "train.steps=80",
    "train.batch_size=8", "train.device=cuda", "train.eval_every=40", "train.log_every=40",
]  # fmt: skip


def parallax(*words, code=0):
    done = subprocess.run([BINARY, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module", params=["parallax", "softmax"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text((ALPHABET * 60)[i:])
    (folder / "config.toml").write_text("")
    parallax("tokenize", folder / "text", "--out", folder / "data", "--val-fraction", "0.1")
    mixer, _, dtype = request.param.partition(", ")
    settings = [*SETTINGS, f"data.path={folder / 'data'}", f"model.mixer={mixer}"]
    settings += [f"train.dtype={dtype}"] if dtype else []
    words = [word for setting in settings for word in ("--set", setting)]
    parallax("train", "--config", folder / "config.toml", "--out", folder / "run", *words)
    return folder / "run"


def prompts_of(tmp_path, *lengths):
    file = tmp_path / "prompts.txt"
    file.write_text("".join((ALPHABET * 20)[i : i + n] + "\n" for i, n in enumerate(lengths)))
    return ["--prompts", file]


def generate(run, *words):
    return json.loads(parallax("generate", run, "--json", "--max-new-tokens", 60, *words).stdout)


def texts(result):
    return [text["text"] for text in result["texts"]]


@pytest.mark.parametrize("run", ["parallax", "softmax", "softmax, float32"], indirect=True)
def test_writes_what_the_cpu_writes(run, tmp_path):
    lengths = (20, 190, 15, 64, 129, 30)  # with what is written no longer than a trained sequence
    words = [*prompts_of(tmp_path, *lengths), "--temperature", 0]
    on_cpu = generate(run, *words, "--device", "cpu")
    expected = [(ALPHABET * 20)[i + n : i + n + 60] for i, n in enumerate(lengths)]
    assert texts(on_cpu) == expected
    for more in ([], ["--batch", 2], ["--batch", 1], ["--prefill-chunk", 40], ["--samples", 3]):
        on_gpu = generate(run, *words, "--device", "cuda", *more)
        samples = 3 if "--samples" in more else 1
        assert texts(on_gpu) == [text for text in expected for _ in range(samples)], more
        assert on_gpu["tokens_per_s"] > 0


def test_a_seed_gives_the_same_texts_again(run, tmp_path):
    words = [*prompts_of(tmp_path, 1, 70, 200), "--samples", 4, "--batch", 5, "--device", "cuda",
             "--temperature", 1.5, "--seed", 7]  # fmt: skip
    first, again = generate(run, *words), generate(run, *words)
    assert first["texts"] == again["texts"]
    assert [text["seed"] for text in first["texts"]] == list(range(7, 19))
    assert len(set(texts(first))) > 6


def test_a_beginning_in_common_is_read_once(run, tmp_path):
    shared = (ALPHABET * 20)[:256]
    (tmp_path / "prompts.txt").write_text(f"{shared}def\n{shared}xyz\n{shared}\n")
    words = ["--prompts", tmp_path / "prompts.txt", "--temperature", 0]
    assert generate(run, *words, "--device", "cuda")["prefill_tokens"] == 259 + 3 + 1
    assert generate(run, *words, "--device", "cpu")["prefill_tokens"] == 259 + 259 + 256


def test_streams_a_single_text(run):
    prompt = ALPHABET[:20]
    done = parallax("generate", run, "--prompt", prompt, "--max-new-tokens", 30, "--temperature", 0)
    assert done.stdout == (ALPHABET * 2)[:50] + "\n"
    assert "tokens/s" in done.stderr


def test_says_what_is_wrong(run):
    there = torch.cuda.device_count()
    done = parallax("generate", run, "--device", f"cuda:{there}", code=1)
    assert f"device cuda:{there} is not there" in done.stderr and not done.stdout
    assert "unknown device 'gpu'" in parallax("generate", run, "--device", "gpu", code=1).stderr
