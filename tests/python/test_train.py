"""`parallax train` from the outside: formats that others read, Ctrl-C, kill -9, refusals."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

BINARY = os.environ.get("PARALLAX_BINARY")
pytestmark = pytest.mark.skipif(not BINARY, reason="the binary was not built")
# Models this small gain nothing from threads, and those of a killed process cost the next one.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

MODEL = ["model.hidden_size=16", "model.num_layers=2", "model.num_q_heads=2", "model.num_kv_heads=1",
         "model.head_dim=8", "model.ffn_size=32", "data.seq_len=32", "train.batch_size=2",
         "train.device=cpu", "train.eval_every=7", "train.eval_batches=2", "train.log_every=5"]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    rng = random.Random(0)
    (folder / "text").mkdir()
    for i in range(20):
        words = (f"word{rng.randrange(40)}" for _ in range(150))
        (folder / "text" / f"{i}.txt").write_text(" ".join(words))
    subprocess.run([BINARY, "tokenize", folder / "text", "--out", folder / "data", "--val-fraction", "0.1"],
                   check=True, capture_output=True)  # fmt: skip
    (folder / "config.toml").write_text("")
    return folder


def command(dataset, run, *settings, resume=False, config=None):
    settings = [f"data.path={dataset / 'data'}", *MODEL, *settings]
    return [BINARY, "train", "--config", config or dataset / "config.toml", "--out", run, "--json",
            *(["--resume"] if resume else []), *(x for s in settings for x in ("--set", s))]  # fmt: skip


def train(dataset, run, *settings, resume=False, code=0):
    done = subprocess.run(command(dataset, run, *settings, resume=resume), capture_output=True, text=True,
                          env=ENVIRONMENT)  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def metrics(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_s")} for line in lines]


def weights(run):
    from safetensors.numpy import load_file

    newest = max((Path(run) / "checkpoints").glob("step-*"))
    return {name: load_file(newest / name) for name in ("model.safetensors", "optimizer.safetensors")}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[f].keys() == b[f].keys() and all(a[f][k].tobytes() == b[f][k].tobytes() for k in a[f]) for f in a
    )


def sample(run):
    """Text that the model of a run writes."""
    done = subprocess.run([BINARY, "generate", run, "--prompt", "word1", "--max-new-tokens", "60", "--seed", "5"],
                          capture_output=True, env=ENVIRONMENT)  # fmt: skip
    assert done.returncode == 0 and done.stdout, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def straight(dataset):
    run = dataset / "straight"
    train(dataset, run, "train.steps=40", "train.checkpoint_every=3")
    return run


def test_safetensors_opens_with_its_own_library(straight):
    tensors = weights(straight)["model.safetensors"]
    names = set(tensors)
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    for layer in range(2):
        for name in ["input_layernorm", "self_attn.q_proj", "self_attn.r_proj", "self_attn.r_norm",
                     "post_attention_layernorm", "mlp.gate_proj"]:  # fmt: skip
            assert f"model.layers.{layer}.{name}.weight" in names
    assert tensors["model.embed_tokens.weight"].shape == (257, 16)
    assert tensors["model.embed_tokens.weight"].dtype == "float32"
    assert all(math.isfinite(float(t.sum())) for t in tensors.values())


def test_tensorboard_reads_the_events(straight):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight))
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert set(scalars) == {"train/loss", "train/bits_per_byte", "train/lr", "train/grad_norm",
                            "train/tokens_per_s", "eval/loss", "eval/bits_per_byte"}  # fmt: skip
    for kind in ("train", "eval"):
        lines = [line for line in metrics(straight) if line["kind"] == kind]
        assert [e.step for e in scalars[f"{kind}/loss"]] == [line["step"] for line in lines]
        assert [e.value for e in scalars[f"{kind}/loss"]] == pytest.approx([line["loss"] for line in lines])


def test_metrics_and_result(dataset, straight):
    lines = metrics(straight)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [*range(5, 41, 5)]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [7, 14, 21, 28, 35, 40]
    assert lines[-1]["loss"] < lines[0]["loss"]
    result = json.loads(train(dataset, straight, "train.steps=40", "train.checkpoint_every=3", resume=True).stdout)
    assert result["finished"] and result["step"] == 40 and result["val_loss"] == lines[-1]["loss"]
    assignments = json.loads((straight / "assignments.json").read_text())
    groups = {a["name"]: a["group"] for a in assignments}
    assert groups["model.embed_tokens.weight"] == "adamw"
    assert groups["model.layers.0.self_attn.r_proj.weight"] == "muon"


def test_ctrl_c_saves_and_exits_cleanly(dataset, straight):
    run = dataset / "interrupted"
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "OMP_WAIT_POLICY"}
    process = subprocess.Popen(
        command(dataset, run, "train.steps=100000", "train.log_every=1", "train.eval_every=0"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)  # fmt: skip
    for line in process.stderr:
        if line.startswith("step 3/"):
            break
    # Its threads do not spin, though nobody has asked for that.
    assert b"OMP_WAIT_POLICY=passive" in Path(f"/proc/{process.pid}/environ").read_bytes()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    result = json.loads(out)
    assert not result["finished"] and result["step"] >= 3
    assert Path(result["checkpoint"]).name == f"step-{result['step']:08}"


def kill_and_resume(dataset, run, kills, rng, settings):
    """Kills at random moments, often while a checkpoint is written, until the run is through."""
    for _ in range(kills):
        process = subprocess.Popen(command(dataset, run, *settings, resume=True),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)  # fmt: skip
        first_sign = next(iter(process.stderr), "")  # training, or the notes of its start
        time.sleep(rng.random() * 0.5)
        process.kill()
        rest = process.stderr.read()
        process.wait()
        errors = [line for line in [first_sign, *rest.splitlines()] if line.startswith("parallax: ")]
        assert errors == []
        for checkpoint in (run / "checkpoints").glob("step-*"):
            assert {f.name for f in checkpoint.iterdir()} == {
                "model.safetensors", "optimizer.safetensors", "state.json"}  # fmt: skip
    done = subprocess.run(command(dataset, run, *settings, resume=True), capture_output=True, text=True,
                          env=ENVIRONMENT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "passed over" not in done.stderr
    assert not list(run.glob("**/.staged-*"))


KILL_SETTINGS = ["train.steps=300", "train.checkpoint_every=1", "train.eval_every=50"]


@pytest.fixture(scope="module")
def never_killed(dataset):
    run = dataset / "never-killed"
    train(dataset, run, *KILL_SETTINGS)
    return run


def check_kills(dataset, never_killed, run, kills):
    kill_and_resume(dataset, run, kills, random.Random(kills), KILL_SETTINGS)
    assert metrics(run) == metrics(never_killed)
    assert same(weights(run), weights(never_killed))
    assert sample(run) == sample(never_killed)


def test_killed_at_8_moments(dataset, never_killed):
    check_kills(dataset, never_killed, dataset / "killed-8", 8)


@pytest.mark.long
def test_killed_at_50_moments(dataset, never_killed):
    check_kills(dataset, never_killed, dataset / "killed-50", 50)


def test_two_trainers_on_one_folder(dataset):
    run = dataset / "shared"
    first = subprocess.Popen(command(dataset, run, "train.steps=100000", "train.log_every=1"),
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)  # fmt: skip
    try:
        next(line for line in first.stderr if line.startswith("step 1/"))
        done = train(dataset, run, resume=True, code=1)
        assert f"{run} is in use by process {first.pid}" in done.stderr
        assert done.stderr.count("\n") == 1
    finally:
        first.kill()
        first.stderr.close()
        first.wait()


def test_read_only_folder(dataset):
    # Root writes anywhere; without these capabilities it is bound by permissions as anybody is.
    ordinary = ["setpriv", "--bounding-set=-dac_override,-dac_read_search",
                "--inh-caps=-dac_override,-dac_read_search"]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        runs = Path(name) / "runs"
        runs.mkdir(mode=0o555)
        line = command(dataset, runs / "run")
        done = subprocess.run((ordinary if os.geteuid() == 0 else []) + line, capture_output=True,
                              text=True, env=ENVIRONMENT)  # fmt: skip
        assert done.returncode == 1
        assert "cannot create folder" in done.stderr and "choose a folder" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not list(runs.iterdir())


def test_bad_input_is_one_line(dataset, straight):
    run = dataset / "refused"
    cases = [
        (["data.path=/nowhere"], 1, "no dataset in '/nowhere'"),
        (["model.vocab_size=100"], 1, "model.vocab_size"),
        (["train.stepz=3"], 1, "steps"),
        (["train.steps=many"], 1, "train.steps"),
        (["model.num_q_heads=3", "model.num_kv_heads=2"], 1, "num_kv_heads"),
        (["data.seq_len=1000000"], 1, "data.seq_len"),
        (["train.device=cuda"], 1, "cuda"),
        (["model.init_std=1e30"], 1, "is not finite; no checkpoint was saved yet"),
    ]
    for settings, code, says in cases:
        done = train(dataset, run, *settings, code=code)
        line = done.stderr.splitlines()[-1]
        assert line.startswith("parallax: ") and says in line, done.stderr
        shutil.rmtree(run, ignore_errors=True)
    done = train(dataset, straight, code=1)
    assert "add --resume" in done.stderr
    done = subprocess.run([BINARY, "train", "--out", run], capture_output=True, text=True)
    assert done.returncode == 2 and "--config" in done.stderr
    assert not run.exists()
