"""`parallax tokenize`: the shards it writes, and parity with Hugging Face's tokenizers."""
import json
import os
import random
import struct
import subprocess

import pytest

BINARY = os.environ.get("PARALLAX_BINARY")
pytestmark = pytest.mark.skipif(not BINARY, reason="the binary was not built")
tokenizers = pytest.importorskip("tokenizers")

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"


def tokenize(*arguments, code=0):
    done = subprocess.run([BINARY, "tokenize", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def read_shard(path):
    """The tokens of a shard, from the format's description alone (lm/shard.h)."""
    data = path.read_bytes()
    magic, version, width, count, block, _ = struct.unpack_from("<8sIIQII", data)
    assert (magic, version, block) == (b"PLXTOKEN", 1, 1 << 20)
    blocks = -(-count * width // block)
    assert len(data) == 32 + count * width + 4 * blocks
    return list(struct.unpack_from(f"<{count}{'H' if width == 2 else 'I'}", data, 32))


def random_text(rng):
    """Words of many scripts, digits, emoji, combining marks, contractions, every kind of space."""
    parts = [
        "don't", "WE'LL", "it'S", "naïve", "cafe\u0301", "Привет", "日本語", "한국어", "عربى", "हिन्दी",
        "\u1100\u1161\u11a8", "e\u0323\u0301", "😀", "👨\u200d👩\u200d👧", "3.14159", "1234567890", "x=y+1;",
        "#include <x>", "\r\n", "\n\n", "\t", "   ", "\u00a0", "\u3000", "\u2028", "a_b", "--", "…", "ﬁ", "Å",
        "\x00", "\x7f", "ǅ", "ſ", "½", "Ⅷ",
    ]  # fmt: skip
    return "".join(
        rng.choice(parts) + rng.choice(["", " ", " ", "\n"]) for _ in range(rng.randrange(1, 60))
    )


def make_tokenizer(kind, texts):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=600, special_tokens=[END, "<|im_start|>", "<|im_start|>x"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_tokens(["added_word"])
    return tokenizer


@pytest.mark.parametrize("kind", ["gpt2", "qwen"])
def test_bpe_equals_hugging_face(kind, tmp_path):
    rng = random.Random(4)
    tokenizer = make_tokenizer(kind, [random_text(rng) for _ in range(300)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [random_text(rng) for _ in range(400)]
    texts += [f"a{END}b<|im_start|>xy<|im_start|> added_word {END}", "plain", " ", "\n", "e\u0301" * 50]
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate(texts):
        # A line first: a zero byte early in a file marks it as binary.
        (folder / f"{i:04}.txt").write_bytes(text.replace("\x00", "\x01").encode())
    tokenize(folder, "--out", tmp_path / "data", "--tokenizer", tmp_path / "tokenizer.json",
             "--val-fraction", 0)  # fmt: skip
    ours = read_shard(tmp_path / "data" / "train-00000.tokens")
    end = tokenizer.token_to_id(END)
    expected = []
    for i in range(len(texts)):
        text = (folder / f"{i:04}.txt").read_bytes().decode()
        expected += tokenizer.encode(text, add_special_tokens=False).ids + [end]
    assert ours == expected
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_bytes_any_bytes(tmp_path):
    content = bytes(range(1, 256)) * 3
    (tmp_path / "text.bin").write_bytes(content)
    done = tokenize(tmp_path / "text.bin", "--out", tmp_path / "data", "--val-fraction", 0, "--json")
    assert read_shard(tmp_path / "data" / "train-00000.tokens") == [*content, 256]
    result = json.loads(done.stdout)
    assert result["train"] == {"tokens": len(content) + 1, "documents": 1, "bytes": len(content)}
    assert result["vocab_size"] == 257


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "text").mkdir()
    cases = [
        (["/nowhere", "--out", tmp_path / "d"], 1, "no file or folder '/nowhere'"),
        ([tmp_path / "text", "--out", tmp_path / "d"], 1, "no text in"),
        ([tmp_path, "--out", tmp_path / "d", "--tokenizer", "/nowhere.json"], 1, "/nowhere.json"),
        ([tmp_path], 2, "--out"),
        ([tmp_path, "--out", tmp_path / "d", "--val-fraction", "2"], 2, "--val-fraction"),
        ([tmp_path, "--out", "/proc/d"], 1, "no text in"),
    ]
    for arguments, code, says in cases:
        done = tokenize(*arguments, code=code)
        assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "d").exists()
    (tmp_path / "text" / "a.txt").write_text("some text")
    done = tokenize(tmp_path / "text", "--out", "/proc/d", code=1)
    assert done.stderr.startswith("parallax: cannot create") and "/proc" in done.stderr
