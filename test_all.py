"""
What the four scripts promise, each promise tried: python -m pytest -q test_all.py

A script is run as a user runs it: `run` takes its command line, in a folder where bpe.py and train.py have run already.
What is fast is held against the plain definition, which stands here or in the script.
"""
import csv
import doctest
import heapq
import io
import json
import math
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

# Before torch loads: its OpenMP threads spin while they wait, and so slow down what else runs on the same cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import bpe
import model as m
import train
from bpe import Tokenizer, plain_encode, plain_train, train_bpe
from model import TransformerLM, causal_attention, cross_entropy
from sample import candidates, generate, print_streamed, surprise
from train import SGD, AdamW, Muon, get_batch, load_checkpoint, load_tokens, read_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent
END = "<|end|>"
BPE = f"bpe.py --data=text.txt --vocab_size=300 --special_tokens={END},<|user|> --num_processes=1"
TRAIN = ("train.py --context_length=16 --num_layers=1 --d_model=16 --num_heads=2 --rope_theta=500 --batch_size=4 "
         "--steps=12 --eval_interval=4 --eval_batches=2 --log_interval=2 --warmup_steps=2 --device=cpu --dtype=float32 "
         "--compile=False")
TABLES = {"vocab.json", "merges.txt", "train.bin", "val.bin"}
ABLATIONS = [dict(), dict(post_norm=True), dict(rms_norm=False), dict(rope=False), dict(swiglu=False),
             dict(tie_embeddings=True)]
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, or needs file names of any bytes")
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, or sends POSIX signals")


def start(command, **how):
    """Start a command line as a process of its own."""
    script, *flags = shlex.split(command)
    return subprocess.Popen([sys.executable, str(ROOT / script), *flags], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **how)


def finish(command, **how):
    """Run a command line as a process of its own: exit status, standard output, standard error."""
    process = start(command, **how)
    told = process.communicate(timeout=100)
    return process.returncode, *told


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder in which bpe.py and train.py have run once: text.txt, data and out."""
    folder = tmp_path_factory.mktemp("made")
    write(folder / "text.txt", "".join(f"the {i} of {i * i} is {i % 7}. {END * (i % 9 == 0)}" for i in range(2000)))
    for command in (BPE, TRAIN):
        assert finish(command, cwd=folder)[0] == 0
    return folder


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Every test begins in an empty folder, with the same random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def run(made, monkeypatch, capsys):
    """Run a command line in this process, in a copy of `made`; return its standard output.

    wanted: the exit status. Where that is not 0, the one line on standard error returns. The notes on standard error
    are in run.notes. As soon as the script prints the words `when`, do() is called.
    """
    shutil.copytree(made, ".", dirs_exist_ok=True)

    def run(command, wanted=0, when=None, do=None):
        def write(text, plain=sys.stdout.write):
            plain(text)
            if when and when in text:
                do()
        script, *flags = shlex.split(command)
        numbers, status = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}, 0
        handlers = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *flags])
            patch.setattr(sys.stdout, "write", write)
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as end:
                status = end.code
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        out, run.notes = capsys.readouterr()
        assert status == wanted, run.notes
        if status in (1, 2):
            assert run.notes.count("\n") == 1 + run.notes.startswith("usage:")
        return run.notes if status else out
    return run


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def listing(folder="."):
    return set(os.listdir(folder))


def contents(folder="."):
    """The content of every file in a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def read_json(*path):
    return json.loads(Path(*path).read_bytes())


def same(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------ what is refused

def loaded(vocab, merges):
    """The tokenizer of files with these contents; None: the vocabulary of the bytes."""
    Tokenizer(dict(enumerate(bpe.BYTES)), []).save(".")
    if vocab:
        write("vocab.json", vocab)
    write("merges.txt", merges)
    return Tokenizer.from_folder(".")


def tokenizer(merges=(), specials=(), more=()):
    """A tokenizer whose vocabulary is the bytes, the tokens that are given, and what is special."""
    return Tokenizer(dict(enumerate([*bpe.BYTES, *more])), merges, specials)


def tokens_in(content, vocab_size, context_length=10):
    """Load and check a file of tokens."""
    tokens = load_tokens(write("t.bin", content), vocab_size, context_length)
    return train.read_through(tokens, np.ones(vocab_size, int))


def first_token(prompt_ids=(1,), max_new_tokens=4, **more):
    return next(generate(small_model(), prompt_ids, max_new_tokens, **more))


def parameters():
    return [torch.nn.Parameter(torch.zeros(1))]


@pytest.mark.parametrize("call, message", [
    (lambda: tokenizer().decode([999]), "none with id 999"),
    (lambda: tokenizer(specials=[""]), "empty text"),
    (lambda: train_bpe(__file__, 256, [END]), "no room for 256 bytes and 1 special tokens"),
    (lambda: train_bpe(os.devnull, 300, []), "is empty"),
    (lambda: Tokenizer({0: b"a", 1: b"a"}, []), "all differ: 0 is missing"),
    (lambda: Tokenizer({1: b"a"}, []), "ids 0 to 0"),
    (lambda: Tokenizer({0: b"a"}, []), r"lacks b'\\x00'"),
    (lambda: tokenizer([(b"a", b"b")]), "lacks b'ab'"),
    (lambda: tokenizer([(b"a", b"bc")]), "b'a' and b'bc' is out of order"),
    (lambda: tokenizer([(b"a", b"b")] * 2, more=[b"ab"]), "out of order"),
    # abcabc: does ab c come first, or abc ab?
    (lambda: tokenizer([(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"abc", b"ab"), (b"ab", b"c")]),
     "b'ab' and b'c' is out of order"),
    (lambda: tokenizer([(b" ", b"t")], ["\u0120t"], [b" t"]).save("."), "choose another"),
    (lambda: loaded("{", ""), "vocab.json is no JSON object"),
    (lambda: loaded('{"a": 1.5}', ""), "vocab.json is no JSON object"),
    (lambda: loaded('{"a": 0, "a": 1}', ""), "vocab.json with .*all differ"),
    (lambda: loaded(None, b"\xff"), "merges.txt no text"),
    (lambda: loaded(json.dumps({**bpe.BYTE, "\u0120a": 256}), ""), "merges.txt has no merge for '\u0120a'"),
    (lambda: loaded(None, "a b c\n"), "merges.txt: 'a b c' is not two tokens"),
    (lambda: loaded(None, "a \u3000\n"), "merges.txt: .* is not two tokens"),
    (lambda: small_model(num_heads=5), "d_model=32 cannot be split into num_heads=5"),
    (lambda: small_model(num_heads=32), "must be even"),
    (lambda: small_model(vocab_size=0), "vocab_size=0"),
    (lambda: small_model(d_ff=-64), "d_ff=-64"),
    (lambda: tokens_in(b"\0" * 41, 300), "t.bin .*41 bytes"),
    (lambda: tokens_in(b"\0" * 42, 70_000), "t.bin .*42 bytes"),
    (lambda: tokens_in(b"\0" * 20, 300), "t.bin .*10 tokens"),
    (lambda: tokens_in(b"\0" * 40 + b"\1\1", 257), "t.bin .*token 257"),
    (lambda: get_batch(np.arange(10), 1, 10, "cpu"), "10 tokens are too few"),
    (lambda: AdamW(parameters(), lr=-1), "lr -1"),
    (lambda: AdamW(parameters(), betas=(1.5, 0.9)), r"1\.5"),
    (lambda: AdamW(parameters(), eps=-1), "eps -1"),
    (lambda: AdamW(parameters(), weight_decay=-1), "weight_decay -1"),
    (lambda: SGD(parameters(), lr=-1), "-1 is negative"),
    (lambda: first_token(max_new_tokens=0), "max_new_tokens is 0"),
    (lambda: first_token(temperature=math.nan), "temperature is nan"),
    (lambda: first_token(top_k=-1), "top_k is -1"),
    (lambda: first_token(top_p=1.1), r"top_p is 1\.1"),
    (lambda: first_token(num_samples=0), "num_samples 0"),
    (lambda: first_token([]), "empty prompt"),
    (lambda: first_token([50]), "0 to 49"),
    (lambda: first_token([-1]), "0 to 49")])
def test_a_call_that_cannot_be_right_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# a command line, its exit status, what it says in one line
REFUSED = """
bpe.py --help                                           0  worker processes; 0: one for each core
bpe.py --vocab_size=300 --vocab_size=256                2  --vocab_size=256: choose 257
bpe.py --vocab_size=1e3                                 2  a whole number
bpe.py --vocab_size=                                    2  a whole number
bpe.py --vocab_size=9223372036854775808                 2  a whole number
bpe.py --num_processes -1                               2  --num_processes=-1
bpe.py --data_dir=                                      2  --data_dir
bpe.py --vocab=300                                      2  --vocab
bpe.py --data                                           2  expected one argument
bpe.py stray                                            2  stray
bpe.py --data=nowhere.txt                               1  no file has this name
bpe.py --data=.                                         1  no file has this name
bpe.py --data=*.none                                    1  '*.none'
bpe.py --data=text.txt --val_data=nowhere.txt           1  --val_data
bpe.py --data=/dev/null --val_data=text.txt             1  no file has this name
bpe.py --data=empty                                     1  is empty
bpe.py --data=text.txt --tokenizer_dir=nowhere          1  nowhere
bpe.py --data=*.txt --data_dir=mine                     2  mine/corpus.txt is not from this program
bpe.py --data=data/train.bin                            2  would replace
bpe.py --data=link                                      2  would replace
bpe.py --data=text.txt --special_tokens=|               2  reads like
bpe.py --data=text.txt --special_tokens=\u0120the       2  reads like
train.py --d_model=0                                    2  --d_model=0
train.py --num_heads=3                                  2  --num_heads=3
train.py --num_heads=16 --d_model=16                    2  --num_heads=16
train.py --lr=-1                                        2  --lr=-1
train.py --lr=nan                                       2  --lr
train.py --eps=0                                        2  --eps=0
train.py --min_lr=1                                     2  --min_lr=1
train.py --beta2=1.0                                    2  --beta2=1.0
train.py --optimizer=sgd                                2  --optimizer=sgd
train.py --dtype=int8                                   2  --dtype=int8
train.py --device=tpu                                   2  --device=tpu
train.py --device=cuda:99                               2  --device=cuda:99
train.py --batch_size=3 --grad_accum=2                  2  --batch_size=3
train.py --shard=True                                   2  --shard=True
train.py --out_dir=                                     2  --out_dir
train.py --out_dir=data                                 2  --data_dir too
train.py --steps=1e3                                    2  --steps
train.py --post_norm=yes                                2  True or False
train.py --eval_batches=1000000000000                   2  --eval_batches=1000000000000
train.py --data_dir=nowhere                             1  nowhere
train.py --init_from=nowhere                            1  nowhere
train.py --init_from=out --num_layers=2                 2  num_layers is 1 there and 2 here
train.py --resume=True --lr=0.002                       2  lr is 0.003 there and 0.002 here
train.py --compare=out,nowhere*                         2  'nowhere*' is no run
model.py --num_heads=5                                  2  num_heads=5
model.py --num_layers=0                                 2  num_layers=0
model.py --d_ff=-64                                     2  d_ff=-64
model.py --vocab_size=-5                                2  vocab_size=-5
model.py --mfu=0                                        2  --mfu=0
sample.py --prompt=the --top_p=0                        2  top_p
sample.py --prompt=@none                                1  none
sample.py --device=cuda:99                              2  cuda:99
sample.py --device=cpu:x                                2  cpu:x
sample.py --out_dir=data                                1  ckpt.pt
sample.py --export=out                                  2  --export=out
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_a_wrong_command_line_ends_with_one_line_before_anything_is_made(run, line):
    command, wanted, message = re.split("  +", line)
    write("empty", "")
    write("mine/corpus.txt", "mine")
    Path("link").symlink_to("data/train.bin")
    before = contents()
    assert message in run(command, int(wanted))
    assert contents() == before


# --------------------------------------------------------------------------------------------------------------- bpe.py

PATTERN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")   # GPT-2's
SPACES = [chr(point) for point in range(0x3001) if regex.match(r"\s", chr(point))] + [
    "\x1c", "\x1f", "\u180e", "\u200b", "\ufeff"]
BITS = SPACES + [" "] * 20 + ["\n"] * 6 + ["\r\n", "\t", "  ", "    ", " \n"] + list("aaabbstdmlvre'''0123_-.,!") + [
    "a" * 9, "ab" * 65, "é中" * 40, "thesing" * 20, "\0", "\x7f", "\ufffd", "\U0003ffff", "\U00040000", "\U0010ffff",
    *"""'s 'll 've 're 'm don't they'll é 中 文字 😀 👩\u200d🔬 ½ ٣ Ⅷ ß \u0301 the ing <| |> <|end|> aab zq
        longer-than-fifteen 0123456789abcdef-0123456789abcdef""".split()]
MALFORMED = [b"\xff", b"\xc3", b"\xa9", b"\xe4\xb8", b"\xf0\x9f\x98", b"\x80", b"\xed\xa0\x80"]
SPECIALS = [END, "<|", "<|end", "aab", "a b", " z", "zq ", "q\nz", "b", "'s", "x<|", "…"]


def random_text(rng, bits=60):
    return "".join(rng.choices(BITS, k=rng.randrange(bits)))


def in_bytes(words):
    return [word.encode() for word in words]


def plain_words(text, specials):
    """The pre-tokens of a text and the special tokens between them, list[bytes], by GPT-2's pattern."""
    special = "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)"
    pieces = enumerate(re.split(f"({special})", text))
    return in_bytes(word for i, piece in pieces for word in ([piece] if i % 2 else PATTERN.findall(piece)))


def by_definition(text, specials, num_merges):
    """The vocabulary and the merges that a text gives, and its ids, all by the plain definitions."""
    words, special = plain_words(text, specials), in_bytes(specials)
    merges = plain_train(Counter(word for word in words if word not in special), num_merges)
    vocab = [*bpe.BYTES, *(left + right for left, right in merges), *(token for token in special if len(token) > 1)]
    ids = {token: number for number, token in enumerate(vocab)}
    tokens = [token for word in words for token in ([word] if word in special else plain_encode(word, merges))]
    return dict(enumerate(vocab)), merges, [ids[token] for token in tokens]


def test_the_examples_in_the_docstrings_of_bpe_py_are_true():
    assert doctest.testmod(bpe).failed == 0 < doctest.testmod(bpe).attempted


def test_the_handouts_examples_and_what_special_tokens_mean():
    words = {b"low": 5, b" lower": 2, b" widest": 3, b" newest": 6}
    assert [left + right for left, right in plain_train(words, 6)] == [b"st", b"est", b"ow", b"low", b"west", b"ne"]
    many = {word: count << 32 for word, count in words.items()}   # counts beyond 32 bits
    assert bpe.learn_merges(many, 12) == plain_train(words, 12)
    merges = [(b"t", b"h"), (b" ", b"c"), (b" ", b"a"), (b"th", b"e"), (b" a", b"t")]
    handout = tokenizer(merges, more=[left + right for left, right in merges])
    assert handout.encode("the cat ate") == [259, 257, ord("a"), ord("t"), 260, ord("e")]
    # the leftmost match wins, and then the longest
    assert tokenizer(specials=["<|", "<|end", "x<|", "d|"]).encode("<|end|x<|e") == [257, 124, 258, 101]
    # a special token keeps the id that the vocabulary gives it; special is what the caller names, nothing else
    assert tokenizer(specials=["<y>", "<x>"], more=[b"<x>"]).encode("a<x><y>") == [97, 256, 257]
    assert tokenizer(more=[b"<x>"]).encode("<x>") == [*b"<x>"]


def test_every_character_is_of_the_kind_that_the_pattern_gives_it():
    points = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 61), 0x10FFFF]
    text = "".join(f"a{chr(point)}1{chr(point)}!" for point in points)
    distinct, index = bpe.distinct_words(text.encode(), bpe.special_pattern([]))
    assert [distinct[i] for i in index] == plain_words(text, [])


def test_fast_pretokens_are_the_plain_ones_and_no_cut_changes_one():
    rng = random.Random(0)
    for _ in range(5000):
        text, specials = random_text(rng), rng.sample(SPECIALS, rng.randrange(5))
        words, raw = plain_words(text, specials), text.encode()
        distinct, index = bpe.distinct_words(raw, bpe.special_pattern(in_bytes(specials)))
        assert [distinct[i] for i in index] == words, (text, specials)
        for place in bpe.cut_pattern(in_bytes(specials)).finditer(raw):
            parts = raw[:place.start()].decode(), raw[place.start():].decode()
            assert [word for part in parts for word in plain_words(part, specials)] == words, (parts, specials)


@pytest.mark.parametrize("processes, sizes", [(1, {}), (1, dict(LONG=0)), (2, dict(TOGETHER=3, LONG=5)),
                                              (3, dict(CACHE=20)), (7, {})])
def test_a_file_trains_and_encodes_as_the_definition_says_for_any_number_of_processes(monkeypatch, processes, sizes):
    for name, size in {**sizes, "BLOCK": 300, "SLICE": 40}.items():   # edges of blocks and slices fall into everything
        monkeypatch.setattr(bpe, name, size)
    rng, pieces = random.Random(processes), [*in_bytes(BITS), *MALFORMED]
    for _ in range(50 if processes == 1 else 4):
        raw, specials = b"".join(rng.choices(pieces, k=rng.randrange(400))), rng.sample(SPECIALS, rng.randrange(5))
        raw += b"a"   # an empty file is refused
        text = raw.decode(errors="replace")
        vocab, merges, ids = by_definition(text, specials, rng.choice([0, 5, 50, 400]))
        assert train_bpe(write("text", raw), len(vocab), specials, processes) == (vocab, merges), (raw, specials)
        tokenizer = Tokenizer(vocab, merges, specials)
        tokenizer.encode_file("text", "ids", processes)
        assert np.fromfile("ids", "<u2").tolist() == ids == tokenizer.encode(text), (raw, specials)
        assert tokenizer.decode(ids) == text and tokenizer.encode("a") == [97]
        assert "CACHE" not in sizes or len(tokenizer.cache) < 9
    assert listing() == {"text", "ids"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer trained on random text with special tokens."""
    path, specials = tmp_path_factory.mktemp("trained") / "text", [END, "<|", "a b"]
    return Tokenizer(*train_bpe(write(path, random_text(random.Random(5), 9000)), 700, specials), specials)


def test_any_unicode_survives_encoding_and_decoding_and_what_is_malformed_is_replaced(trained):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert trained.decode(trained.encode(text)) == text
    assert trained.encode("a\ud800b\udfff") == trained.encode("a\ufffdb\ufffd")   # lone surrogates
    assert trained.decode([0xE4, 0xBD, 97]) == "\ufffda"


def test_encode_iterable_is_lazy_and_gives_the_ids_of_the_joined_text(trained):
    text, taken = random_text(random.Random(9), 50_000), []
    for size in (1, 7, 10_000):
        assert [*trained.encode_iterable(text[i:i + size] for i in range(0, len(text), size))] == trained.encode(text)
    for item in ("once upon a time\n" * 3000, "\n" + "x" * 20_000):   # in the second, the only cut is far from the end
        ids = trained.encode_iterable(taken.append(item) or item for _ in range(20))
        assert next(ids) == trained.encode(item)[0] and len(taken) < 3
        assert trained.decode(ids) == (item * 20)[len(trained.decode(trained.encode(item)[:1])):] and len(taken) == 20
        taken.clear()


def test_ids_are_uint16_up_to_65536_tokens_and_uint32_beyond():
    for size, dtype in ((65536, "<u2"), (65537, "<u4")):
        numbered = tokenizer(more=[b"<%d>" % i for i in range(256, size)], specials=[f"<{size - 1}>"])
        numbered.encode_file(write("text", f"a<{size - 1}>"), "ids")
        assert np.fromfile("ids", dtype).tolist() == [97, size - 1] == load_tokens("ids", size, 1).tolist()


def test_saved_files_have_gpt2s_layout_and_load_again(trained):
    trained.save(".")
    table, lines = read_json("vocab.json"), Path("merges.txt").read_bytes().decode().split("\n")
    assert lines[0] == "#version: 0.2" and len(lines) == len(trained.merges) + 2
    assert [table[token] for token in ("\u0120", "\u010a", "!", END)] == [32, 10, 33, 256 + len(trained.merges)]
    write("merges.txt", "\r\n".join(lines[1:]))   # the version line may be absent
    for again in Tokenizer.from_folder("."), Tokenizer.from_files("vocab.json", "merges.txt", [END, "<|", "a b"]):
        assert ((again.vocab, again.merges, again.special_tokens)
                == (trained.vocab, trained.merges, trained.special_tokens))


def texts_of(folder):
    """The training and the validation text that the ids in a folder stand for."""
    tokenizer = Tokenizer.from_folder(folder)
    return [tokenizer.decode(np.fromfile(Path(folder, name), "<u2").tolist()) for name in ("train.bin", "val.bin")]


def test_a_pattern_makes_a_document_of_each_file_in_an_order_that_is_shuffled_but_fixed(run):
    documents = [f"Note {i} is here.\n" for i in range(1000)]
    for i, text in enumerate(documents):
        write(f"notes/{i // 100}/{i:03}.md", text)
    Path("notes/folder.md").mkdir()
    Path("notes/again.md").symlink_to("0/000.md")   # counts once
    command = "bpe.py --data_dir=notes --vocab_size=300 --num_processes=1"
    run(f"{command} --data=notes/**/*.md --special_tokens=</s>,<a>")
    corpus = Path("notes/corpus.txt").read_text()
    *shuffled, rest = corpus.split("</s>")
    assert not rest and sorted(shuffled) == sorted(documents) and shuffled != documents
    training, validation = texts_of("notes")
    assert training + validation == corpus and training.endswith("</s>") and validation.startswith("Note")
    run(f"{command} --data=notes/** --special_tokens=")
    assert "corpus.txt" in run.notes and "corpus.txt.tmp" not in listing("notes")
    assert Path("notes/corpus.txt").read_text().count("\n\n") == 1000   # joined by a newline


def test_files_that_vanish_are_left_out_and_what_cannot_be_read_is_said(run, monkeypatch):
    for name in "abc":
        write(f"{name}.md", f"the text of {name} ".encode() * 3000 + b"\xff")
    error, command = FileNotFoundError, f"{BPE} --data=*.md"

    def failing(path, *how, **more):
        if str(path).endswith("b.md"):
            raise error(2, "gone", path)
        return io.open(path, *how, **more)
    monkeypatch.setattr("builtins.open", failing)
    assert "2 malformed places" in run(command) and run.notes.count("\n") == 1 and "b.md was removed" in run.notes
    corpus, error = Path("data/corpus.txt").read_bytes(), PermissionError
    assert "b.md" in run(command, 1) and Path("data/corpus.txt").read_bytes() == corpus


def test_the_default_corpus_is_the_standard_library_and_its_order_is_fixed(run):
    run("bpe.py --vocab_size=257 --num_processes=1")
    modules = Path("data/corpus.txt").read_bytes().split(b"<|endoftext|>")
    assert Path(heapq.__file__).read_bytes() in modules and modules != sorted(modules)
    assert not any(b"test_all" in module for module in modules)


def test_the_held_out_text_begins_after_a_document_and_never_inside_a_special_token(run):
    text = "x" * 930 + "a b" * 20 + " a b<e>" + "y " * 20 + "<e>"
    write("text.txt", text)
    run(f"{BPE} --special_tokens=<e>,a\\ b")
    assert "name a longer text with --val_data" in run.notes   # it has 41 ids
    training, validation = texts_of("data")
    assert training.endswith("<e>") and training + validation == text and validation[0] == "y"
    for mark in range(3):   # no document ends near the mark, which falls into a special token
        write("text.txt", "x" * (925 + mark) + "a b" * 30 + " y" * 9)
        run(f"{BPE} --special_tokens=a\\ b")
        assert sum(text.count("a b") for text in texts_of("data")) == 30


def test_encoding_with_a_folders_own_tokenizer_keeps_its_files_and_only_temporary_files_go(run):
    table = os.stat("data/vocab.json").st_ino
    for name in ("train.bin.tmp_backup.txt", "vocab.json.tmpl", "merges.txt.tmp"):
        write(Path("data", name), "mine")
    write("text.txt", f"two three{END}" * 900)
    run("bpe.py --data=text.txt --tokenizer_dir=data --num_processes=1")
    assert os.stat("data/vocab.json").st_ino == table and "three" in texts_of("data")[1]
    assert listing("data") == TABLES | {".lock", "train.bin.tmp_backup.txt", "vocab.json.tmpl"}


@posix
def test_a_kill_before_any_rename_or_removal_never_leaves_ids_beside_another_vocabulary(run):
    texts = [Path("text.txt").read_text(), "".join(f"new {7 * i}, {i % 13}! " for i in range(2000))]
    write("new.txt", texts[1])
    shutil.copytree("data", "old")

    def killing(real):
        def call(*words, **more):
            nonlocal calls
            calls -= 1
            return os.kill(os.getpid(), signal.SIGKILL) if calls < 0 else real(*words, **more)
        return call
    states = []
    for calls in range(30):
        shutil.rmtree("data")
        shutil.copytree("old", "data")
        pid = os.fork()
        if not pid:
            os.replace, Path.unlink = killing(os.replace), killing(Path.unlink)
            run(f"{BPE} --data=new.txt")
            os._exit(0)
        alive = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        whole = Path("data/vocab.json").exists()
        if whole:
            training, validation = texts_of("data")
            assert any(training in text and validation in text for text in texts)
        states.append((whole, alive))
        if alive:
            break
    assert {*states} == {(True, False), (False, False), (True, True)} and training in texts[1]
    assert listing("data") == TABLES | {".lock"}   # the last run has cleared up


# ------------------------------------------------------------------------------------------------------------- model.py

def small_model(**changes):
    torch.manual_seed(0)
    return TransformerLM(**{**dict(vocab_size=50, context_length=16, num_layers=2, d_model=32, num_heads=4, d_ff=64),
                            **changes})


IDS = torch.tensor([[1, 1, 8], [0, 1, 3]])
MASK = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]]) == 1


def with_weights(layer):
    """The layer as a function of its input and then its weights."""
    return lambda x, *weights: torch.func.functional_call(layer, dict(zip(dict(layer.named_parameters()), weights)), x)


def turned(x, theta=100.0, halves=False):
    """RoPE at the positions 0, 1, 2, ... with the pairs (2k, 2k + 1) taken apart; or, as in Llama, (k, k + d_k / 2)."""
    a, b = x.chunk(2, -1) if halves else (x[..., 0::2], x[..., 1::2])
    angles = torch.arange(x.size(-2))[:, None] * theta ** (-torch.arange(0, 1, 2 / x.size(-1)))
    cos, sin = angles.cos(), angles.sin()
    pairs = a * cos - b * sin, b * cos + a * sin
    return torch.cat(pairs, -1) if halves else torch.stack(pairs, -1).flatten(-2)


def triangle(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# name: ours, the definition or torch's own, shapes of the inputs
BLOCKS = {
    "Linear": (with_weights(m.Linear(5, 7)), F.linear, (2, 3, 5), (7, 5)),
    "Embedding": (lambda w: with_weights(m.Embedding(9, 4))(IDS, w), lambda w: w[IDS], (9, 4)),
    "RMSNorm": (with_weights(m.RMSNorm(6, 0.1)), lambda x, w: F.rms_norm(x, (6,), w, 0.1), (2, 3, 6), (6,)),
    "SwiGLU": (with_weights(m.SwiGLU(8, 20)), lambda x, w1, w2, w3: (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T,
               (3, 8), (20, 8), (8, 20), (20, 8)),
    "ungated": (with_weights(m.SwiGLU(8, 20, gated=False)), lambda x, w1, w2: F.silu(x @ w1.T) @ w2.T,
                (3, 8), (20, 8), (8, 20)),
    "RoPE": (lambda x: m.RotaryPositionalEmbedding(100.0, 8, 5)(x, torch.arange(3)), turned, (2, 3, 8)),
    "softmax": (lambda x: m.softmax(x, 0), lambda x: x.softmax(0), (3, 4)),
    "attention": (m.scaled_dot_product_attention, F.scaled_dot_product_attention, (2, 4, 6), (2, 3, 6), (2, 3, 7)),
    "attention under a mask": (lambda *qkv: m.scaled_dot_product_attention(*qkv, MASK),
                               lambda *qkv: F.scaled_dot_product_attention(*qkv, MASK), (4, 6), (3, 6), (3, 7)),
    **{f"attention in blocks, {T}": (m.causal_attention_in_blocks, triangle, *[(2, 3, T, 4)] * 3)
       for T in (1, 2, 3, 4, 5, 7, 64, 129)},
    "cross-entropy": (lambda x: cross_entropy(x, IDS), lambda x: F.cross_entropy(x.mT, IDS), (2, 3, 9))}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_definition_and_so_are_its_gradients(name):
    ours, theirs, *shapes = BLOCKS[name]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ours, theirs = ours(*inputs), theirs(*inputs)
    same(ours, theirs)
    direction = torch.randn_like(theirs)
    same(torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction))


def test_blocks_survive_extremes():
    huge = torch.full((1, 6), 300.0, dtype=torch.float16)   # its square overflows float16
    same(m.RMSNorm(6)(huge), torch.ones_like(huge))
    assert m.softmax(torch.tensor([1e30, -1e30, 1e30, -math.inf]), 0).tolist() == [0.5, 0, 0.5, 0]
    assert cross_entropy(torch.tensor([[1e4, -1e30], [1e4, 0]]), torch.tensor([0, 1])).item() == 5000
    coarse = torch.full((50,), 3.0, dtype=torch.bfloat16)
    assert cross_entropy(coarse, torch.tensor(1)).item() == pytest.approx(math.log(50))


def test_attention_with_rope_takes_positions_that_only_matter_relatively_and_without_it_none():
    x, first = torch.randn(2, 7, 32), torch.arange(7)
    for rope in None, m.RotaryPositionalEmbedding(10000.0, 8, 64):
        attention = m.MultiHeadSelfAttention(32, 4, rope)
        same(attention(x), attention(x, torch.stack([first + 20, first + 57])), 1e-5)
        assert ((attention(x) - attention(x, first.flip(0))).abs().max() > 1e-3) == bool(rope)


def test_a_model_is_its_blocks_before_or_after_norms_under_the_handouts_names():
    parts = "attn.q_proj attn.k_proj attn.v_proj attn.output_proj ln1 ln2 ffn.w1 ffn.w2 ffn.w3".split()
    names = {"token_embeddings.weight", "ln_final.weight", "lm_head.weight",
             *(f"layers.{i}.{part}.weight" for i in range(2) for part in parts)}
    nothing, norm = lambda x: x, lambda x: F.rms_norm(x, (32,), eps=1e-5)
    for changes, missing, before, after, last in [
            (dict(), "none", norm, nothing, norm), (dict(post_norm=True), "none", nothing, norm, norm),
            (dict(rms_norm=False), "ln", nothing, nothing, nothing), (dict(rope=False), "none", norm, nothing, norm)]:
        model = small_model(**changes)
        assert {*model.state_dict()} == {name for name in names if missing not in name}
        x = model.token_embeddings(IDS)
        for layer in model.layers:
            assert bool(layer.attn.rope) == ("rope" not in changes)
            x = after(x + layer.attn(before(x)))
            x = after(x + layer.ffn(before(x)))
        same(model(IDS), logits := last(x) @ model.lm_head.weight.T, 1e-5)
        same(model.loss(IDS, IDS), F.cross_entropy(logits.mT, IDS), 1e-5)


def test_initialisation_is_the_contracts():
    for name, parameter in TransformerLM(1000, 16, 1, 256, 4, 1024).named_parameters():
        if "ln" in name:
            assert (parameter == 1).all()
            continue
        std = 1 if "embeddings" in name else (2 / sum(parameter.shape)) ** 0.5
        assert 2.9 * std < parameter.abs().max() <= 3 * std, name
        # the cut at 3 sigma takes 1.3 % of the deviation
        assert parameter.std().item() == pytest.approx(0.9866 * std, rel=0.01), name
        assert abs(parameter.mean().item()) < 0.01 * std, name


def test_default_d_ff_is_a_multiple_of_64_near_8_3_d_model_or_4_d_model_without_the_gate():
    assert [m.default_d_ff(d) for d in (512, 768, 1600, 8)] == [1344, 2048, 4288, 64]
    assert len(small_model(d_ff=0, swiglu=False).layers[0].ffn.w1.weight) == 128


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_a_future_token_changes_no_earlier_logit(changes):
    model, ids = small_model(**changes), torch.randint(50, (4, 16))
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % 50
    difference = (model(changed) - model(ids)).abs().amax((0, 2))
    assert difference[:9].max() < 1e-5 and difference[9:].min() > 1e-4   # while every later one hears of it


@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_context():
    model, ids = small_model(), torch.randint(50, (3, 16))
    whole, cache, seen = model(ids), model.new_cache(3), 0
    for step in (5, 1, 1, 3, 6):   # a prompt, single tokens, and several at once
        seen += step
        same(model(ids[:, seen - step:seen], cache), whole[:, seen - 1:seen], 1e-5)
    with pytest.raises(ValueError, match="17 tokens do not fit into the context of 16"):
        model(ids[:, :1], cache)


def test_compiled_gradients_are_the_eager_ones_at_a_real_shape():
    """torch 2.13 compiled the gradient of the maximum in a masked softmax into NaN on the CPU,
    at shapes of this size only, with a good loss.
    """
    model, ids = TransformerLM(2000, 256, 2, 256, 8), torch.randint(0, 2000, (4, 257))
    gradients = []
    for prepare in (lambda: None, model.compile_parts):
        prepare()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), eager, compiled in zip(model.named_parameters(), *gradients):
        assert (compiled - eager).norm() < 0.02 * eager.norm(), name
    # equal to the last bit would mean that nothing was compiled
    assert any(not torch.equal(*pair) for pair in zip(*gradients))


@pytest.mark.parametrize("switches", [{}, dict(swiglu=False), dict(tie_embeddings=True)], ids=str)
def test_the_accounting_counts_what_a_real_model_has_and_does(switches, monkeypatch):
    # The handout counts attention over all T x T scores: the plain definition, not the form that leaves out most of
    # those above the diagonal.
    monkeypatch.setattr(m, "causal_attention_in_blocks", causal_attention)
    shape = 61, 32, 3, 48, 4, 80   # without RoPE, which turns pairs: no matrix product by its definition
    model, gated, tied = TransformerLM(*shape, rope=False, **switches), "swiglu" not in switches, "tie" in str(switches)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(61, (1, 32)))
    assert m.training_flops(*shape, swiglu=gated) == 3 * counter.get_total_flops() / 32
    parts = {"token embeddings": "embeddings", "projections": "_proj", "FFN": "ffn", "RMSNorm": "ln",
             "LM head": "lm_head"}
    assert m.parameters(*shape, gated, tied) == {
        part: sum(p.numel() for name, p in model.named_parameters() if mark in name) for part, mark in parts.items()}


def test_model_py_prints_the_handouts_answers_on_100_columns_and_accounts_for_any_shape_at_once(run):
    out = run("model.py")
    assert max(map(len, out.splitlines())) < 100
    # the handout's list of activations for the ungated XL, added up by hand
    T, V, N, D, H = 1024, 50257, 48, 1600, 25
    activations = 4 * (T * ((16 * N + 1) * D + 2 * V) + 2 * N * H * T ** 2)
    for words in ("total                     2,127,057,600    100.0%      8.51 GB",
                  "total                                                                         4,513.34   100.0%",
                  "small  gated    1,024     190,460,160    151,862,784  0.3496   16.6%      11.1%  49.8%   22.6%",
                  "medium gated    1,024     505,629,696    454,166,528   1.033   20.0%      10.0%  59.9%   10.2%",
                  "large  gated    1,024   1,072,469,760  1,008,140,800   2.258   21.4%       8.6%  64.2%    5.8%",
                  "XL     gated    1,024   2,127,057,600  2,046,646,400   4.513   22.3%       7.1%  66.9%    3.6%",
                  "XL     gated   16,384   2,127,057,600  2,046,646,400   149.5   10.8%      55.2%  32.3%    1.8%",
                  "sixteen times the context:  33.1 x",
                  "XL     ungated  1,024   1,635,537,600  1,555,126,400   3.507   28.7%       9.2%  57.4%    4.7%",
                  "XL     ungated 16,384   1,635,537,600  1,555,126,400   133.4   12.1%      61.8%  24.1%    2.0%",
                  "two moments 8               26.17 GB", f"{activations / 1e9:.2f} GB for B = 1", "in 80 GB: 3\n",
                  "400,000 steps at 9.75 TFLOP/s: 5,115 days"):
        assert words in out, words
    # every layer of the default shape has 4 D^2 + 3 D F + 2 D parameters
    assert f" {2 * 10000 * 512 + 512 + 10**8 * 3_113_984:,} " in run("model.py --num_layers=100000000")


# ------------------------------------------------------------------------------------------------------------- train.py

def rows(out="out"):
    with open(Path(out, "log.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights(out="out", name="ckpt.pt"):
    return read_checkpoint(Path(out, name))["model"]


def same_runs(one, other):
    """Two runs logged the same figures, times aside, and ended with the same weights, last and best."""
    timeless = [[{**row, "seconds": "", "tokens_per_second": ""} for row in rows(out)] for out in (one, other)]
    assert timeless[0] == timeless[1]
    for name in ("ckpt.pt", "best.pt"):
        same(weights(one, name), weights(other, name), 0)


def small_trainee(name="adamw"):
    """A model and its optimiser: AdamW, or Muon for the matrices of the blocks."""
    model = small_model(d_model=16, d_ff=0)
    inside = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not other for other in inside)]
    groups = [dict(params=inside, weight_decay=0.3), dict(params=rest)]
    if name == "muon":
        groups[0]["momentum"] = 0.95
    return model, {"adamw": AdamW, "muon": Muon}[name](groups, 1e-2, (0.8, 0.95), 1e-6, 0.1)


def step_once(model, rule, seed=1):
    """One step on a random batch; its loss."""
    batch = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(seed))
    rule.zero_grad()
    loss = model.loss(batch[:, :-1], batch[:, 1:])
    loss.backward()
    rule.step()
    return loss.item()


def test_a_batch_holds_contexts_from_every_place_and_the_same_shifted_by_one_by_seed_and_step_alone():
    def draw(part=slice(None), seed=7, step=11):
        return get_batch(np.arange(20, dtype=np.uint16), 2000, 10, "cpu", train.generator_of_step(seed, step), part)[0]
    inputs, targets = get_batch(np.arange(20, dtype=np.uint16), 2000, 10, "cpu")
    assert {*inputs[:, 0].tolist()} == {*range(10)} and inputs.dtype == torch.int64
    assert torch.equal(inputs + 1, targets) and torch.equal(inputs, inputs[:, :1] + torch.arange(10))
    assert torch.equal(torch.cat([draw(slice(0, 300)), draw(slice(300, 2000))]), draw())
    assert not torch.equal(draw(step=12), draw()) and not torch.equal(draw(seed=8), draw())


def test_large_token_files_are_read_through_in_parts():
    content = np.array([1, 3] * (2 ** 21 + 5), "<u2")
    content.tofile("t.bin")
    assert train.read_through(load_tokens("t.bin", 4, 10), np.arange(4)) == (zlib.crc32(content), 2)


def test_the_schedule_warms_up_linearly_and_falls_along_a_cosine():
    rates = [train.get_lr_cosine_schedule(it, 1.0, 0.1, 7, 21) for it in range(25)]
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 14)) for i in range(14)]
    assert rates == pytest.approx([*(i / 7 for i in range(7)), *cosine, *[0.1] * 4])
    assert train.get_lr_cosine_schedule(0, 1.0, 0.1, 0, 10) == 1


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_clipping_is_torchs_and_returns_the_norm_before(limit):
    results = []
    for clip in (train.gradient_clipping, torch.nn.utils.clip_grad_norm_):
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (12, 5, 2)]
        for p in parameters[:2]:   # the third has no gradient
            p.grad = torch.linspace(-1, 2, len(p))
        results.append([clip(parameters, limit), *(p.grad for p in parameters[:2])])
    same(*results)


@pytest.mark.parametrize("lr, least, most", [(1e1, 0.5, 24.0), (1e2, 0.0, 1e-9), (1e3, 1e3, math.inf)])
def test_sgd_decays_slowly_at_10_fast_at_100_and_diverges_at_1000(lr, least, most):
    w, losses = torch.nn.Parameter(5 * torch.randn(10, 10)), []
    rule = SGD([w], lr=lr)
    for step in range(10):
        losses.append((w ** 2).mean())
        w.grad, = torch.autograd.grad(losses[-1], w)
        expected = w - lr / math.sqrt(step + 1) * w.grad
        rule.step()
        same(w, expected)
    print(f"\nlr {lr:g}:", *(f"{loss:.3g}" for loss in losses))   # for README.md: python -m pytest -q -s -k sgd
    assert least <= losses[-1] <= most


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_is_torchs_adamw(fused):
    (mine, rule), (peer, template) = small_trainee(), small_trainee()
    groups = [dict(params=group["params"], weight_decay=group["weight_decay"]) for group in template.param_groups]
    torchs, rule.fused = torch.optim.AdamW(groups, 1e-2, (0.8, 0.95), 1e-6), fused
    for step in range(20):
        for model, one in (mine, rule), (peer, torchs):
            one.param_groups[0]["lr"] = 1e-2 / (step + 1)
            step_once(model, one, step)
    same([*mine.parameters()], [*peer.parameters()], 1e-4)


def test_orthogonalise_brings_every_singular_value_near_one_and_keeps_the_directions():
    for shape in ((3, 32, 32), (2, 20, 48), (48, 20)):
        u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        matrices = u * torch.logspace(-1, 1, min(shape[-2:])) @ v
        for dtype, aside in (torch.float64, 1e-9), (torch.bfloat16, 0.1):
            along = u.mT @ train.orthogonalise(matrices, dtype).double() @ v.mT
            values = along.diagonal(dim1=-2, dim2=-1)
            assert (values - 1).abs().max() < 0.25 and (along - torch.diag_embed(values)).abs().max() < aside


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_model_learns_by_heart_and_a_checkpoint_brings_it_and_its_optimiser_back(name):
    model, rule = small_trainee(name)
    losses, memory = [step_once(model, rule) for _ in range(60)], io.BytesIO()
    assert losses[-1] < 0.1 < losses[0]
    for place in (Path("a.pt"), "b.pt", memory):
        save_checkpoint(model, rule, 17, place)
        memory.seek(0)
        other, other_rule = small_trainee(name)
        assert load_checkpoint(place, other, other_rule) == 17
        same([other.state_dict(), other_rule.state_dict()], [model.state_dict(), rule.state_dict()], 0)
    assert listing() == {"a.pt", "b.pt"}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_that_is_damaged_is_refused_or_gives_the_same_tensors(run):
    good, rng, refused, saved = Path("out/ckpt.pt").read_bytes(), random.Random(0), 0, weights()
    for place in rng.choices(range(len(good)), k=400):
        flipped = bytes([good[place] ^ 1 << rng.randrange(8)])
        write("bad.pt", good[:place] + rng.choice([b"", flipped + good[place + 1:], flipped + good[place + 1:]]))
        try:
            same(read_checkpoint("bad.pt")["model"], saved, 0)
        except ValueError as refusal:
            assert "bad.pt is damaged" in str(refusal)
            refused += 1
    assert refused > 300


def test_a_checkpoint_that_is_foreign_or_evil_is_refused_and_runs_nothing():
    def saved(value):
        memory = io.BytesIO()
        torch.save(value, memory)
        return memory.getvalue()
    for content in (saved({"weights": torch.zeros(3)}), saved(torch.zeros(3)), saved({"model": Evil()}),
                    pickle.dumps(Evil(), protocol=2)):
        with pytest.raises(ValueError, match="bad.pt .* no checkpoint of train.py"):
            read_checkpoint(write("bad.pt", content))
    assert listing() == {"bad.pt"}
    with pytest.raises(ValueError, match="no optimiser state"):
        load_checkpoint(write("bad.pt", saved({"model": {}})), None, None)


def test_a_failed_write_leaves_the_older_checkpoint(run, monkeypatch):
    def full(saved, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    before = contents("out")
    monkeypatch.setattr(torch, "save", full)
    assert re.search("out/.* was not written.*No space left", run("train.py --resume=True --steps=16", 1))
    after = contents("out")
    assert after.keys() == before.keys() and all(after[name] == before[name] for name in ("ckpt.pt", "best.pt"))


def test_a_run_leaves_a_folder_that_stands_alone_and_never_overwrites_one(run):
    before = Path("out/ckpt.pt").read_bytes()
    out = run(TRAIN)
    assert "it is in out.1" in out and Path("out.1/ckpt.pt").read_bytes() == before
    same_runs("out", "out.1")
    assert listing("out") == {".lock", *train.RESULTS} and b"\r" not in Path("out/log.csv").read_bytes()
    table, config = rows(), read_json("out/config.json")
    assert [row["step"] for row in table] == ["1", "2", "4", "6", "8", "10", "12"]
    assert [row["step"] for row in table if row["val_loss"]] == ["4", "8", "12"]
    assert all(int(row["tokens"]) == int(row["step"]) * 4 * 16 for row in table)
    tokens, tokenizer = np.fromfile("data/val.bin", "<u2"), Tokenizer.from_folder("out")
    assert float(table[0]["train_loss"]) == pytest.approx(math.log(len(tokenizer.vocab)), abs=0.3)
    size = len(tokenizer.decode(tokens.tolist())) / len(tokens)
    assert config["val_bytes_per_token"] == pytest.approx(size) and config["warmup_steps"] == 2
    groups = read_checkpoint("out/ckpt.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0, 0]   # not of gains and embeddings
    assert f"{float(table[-1]['val_loss']) / math.log(2) / size:.4f} bits per byte" in out


def test_compare_shows_last_and_best_losses_and_draws_the_runs_that_a_pattern_names(run):
    import xml.etree.ElementTree as xml
    run(f"{TRAIN} --seed=1 --lr=0.3 '--out_dir=out&<b>' --log_interval=1 --steps=20")
    before = Path("out/curves.svg").read_bytes()
    head, *lines = run("train.py --compare=out*").splitlines()
    assert "seed" in head and "d_model" not in head
    for line, name in zip(lines, ("out", "out&<b>")):
        size = read_json(name, "config.json")["val_bytes_per_token"]
        losses = [float(row["val_loss"]) for row in rows(name) if row["val_loss"]]
        for loss in (losses[-1], min(losses)):
            assert {name, f"{loss:.4f}", f"{loss / math.log(2) / size:.4f}"} <= {*line.split()}
    svg = xml.parse("out/compare.svg").getroot()
    words = {node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"out", "out&<b>", "optimiser steps", "wall-clock seconds", "0", "5", "10", "20"} <= words
    points = [node.get("points").split() for node in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in points] == [7, 3, 20, 5] * 2 and "nan" not in str(points)
    assert Path("out/curves.svg").read_bytes() == before


@pytest.mark.parametrize("row, status, told", [
    ("1,2,3.0,1,5.5,,1,2\n2,2", 0, "5.5000"), *((row, 1, "out/log.csv") for row in (
        "1,2", "1,2,3,1,1e400,,1,2", "1,2,3,1,5,nan,1,2", "1,2,3,,5,,1,2", "1,2,x,1,5,,1,2"))])
def test_a_log_is_read_whole_but_for_a_row_that_was_cut_or_refused_by_name(run, row, status, told):
    write("out/log.csv", ",".join(train.COLUMNS) + "\n" + row)
    assert told in run("train.py --compare=out --out_dir=new", status)


def test_a_run_resumes_with_its_own_constants_and_what_it_has_lost_is_restored(run):
    command, resume = f"{TRAIN} --lr=0.01 --optimizer=muon --out_dir", "train.py --resume=True --out_dir=new"
    for folder in ("straight", "new"):
        run(f"{command}={folder}")
    assert "all of its 12 steps" in run(resume)
    with open("new/log.csv", "a") as log:   # a killed run may have got beyond its last checkpoint
        log.write("14,896,1.0,0.001,5.0,,1.0,900.0\n16,10")
    out = run(f"{resume} --steps=16 --lr=0.01")
    assert "new schedule" in out and "step 16 of 16" in out and read_json("new/config.json")["steps"] == 16
    run(f"{command}=straight --resume=True --steps=16")
    same_runs("straight", "new")
    for name in ("log.csv", "config.json", "vocab.json", "best.pt"):
        Path("new", name).unlink()
    assert "has no best.pt, log.csv, config.json, vocab.json" in run(f"{resume} --steps=20")
    assert listing("new") == {".lock", *train.RESULTS} and rows("new")[0]["step"] == "18"
    train.load_run("new")
    shutil.copytree("data", "other")
    shutil.copyfile("data/train.bin", "other/val.bin")
    assert "val.bin is another file" in run(f"{resume} --data_dir=other", 2)
    Path("new/ckpt.pt").unlink()   # nothing is left to resume, but best.pt is not overwritten
    assert "it is in new.1" in run(f"{resume} --steps=4")


FORKING = """
import os, random, runpy, shlex, signal, socket, sys, time
import train
def start(command, **environment):
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment)
    sys.argv, status = shlex.split(command), 0
    try:
        runpy.run_path("train.py", run_name="__main__")
    except SystemExit as end:
        status = end.code
    os._exit(status)
def two(*commands):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    return [start(command, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                  MASTER_PORT=str(port)) for rank, command in enumerate(commands)]
def join(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def forking(code):
    """Run Python code with `start` (train.py in a process of its own, without the seconds of importing torch), `two`
    (two such processes, as torchrun starts them) and `join`; return the finished process.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", f"{FORKING}\n{code}"], cwd=ROOT, text=True, capture_output=True,
                          timeout=120, env=environment)


@pytest.fixture
def absolute(run):
    """TRAIN for other processes, whose working directory is the scripts' own; its --out_dir follows."""
    return f"{TRAIN} --data_dir={Path('data').resolve()} --out_dir={Path().resolve()}"


@posix
def test_a_run_killed_ten_times_ends_as_one_that_was_never_stopped(absolute):
    more = "--steps=100 --eval_interval=10 --log_interval=3 --optimizer=muon"
    done = forking(f"""
begin = time.perf_counter()
assert join(start("{absolute}/straight {more}")) == 0
length, kills = time.perf_counter() - begin, 0
while kills < 10:
    pid = start("{absolute}/broken --resume=True {more}")
    time.sleep(random.Random(kills).uniform(0.1, 0.5) * length)
    os.kill(pid, signal.SIGKILL)
    kills += join(pid) == -signal.SIGKILL
assert join(start("{absolute}/broken --resume=True {more}")) == 0
""")
    assert done.returncode == 0, done.stderr
    same_runs("broken", "straight")
    assert len(rows("straight")) == 41 and not Path("broken.1").exists()


@posix
@pytest.mark.parametrize("end, status", [("SIGTERM", 143), ("SIGHUP", 129), ("a full disk", 1)])
def test_a_run_that_is_ended_early_saves_a_checkpoint_from_which_it_goes_on_exactly(run, end, status):
    def interrupt():
        if end == "a full disk":
            raise OSError(28, "No space left on device")
        os.kill(os.getpid(), getattr(signal, end))
    command = f"{TRAIN} --steps=40 --eval_interval=100 --log_interval=7 --out_dir"
    run(f"{command}=straight")
    run(f"{command}=broken", status, when="step 14 of", do=interrupt)
    assert read_checkpoint("broken/ckpt.pt")["iteration"] < 40
    assert ("curves.svg" in listing("broken")) == (status > 1)
    run("train.py --resume=True --out_dir=broken")
    same_runs("broken", "straight")


def test_a_run_whose_output_goes_to_a_closed_pipe_saves_a_checkpoint_and_ends_silently(run):
    process = start(f"{TRAIN} --steps=1000000 --eval_interval=1000000 --out_dir=new")
    assert "parameters" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1 and not process.stderr.read() and weights("new")


@posix
def test_two_processes_do_what_one_does_and_so_do_two_that_share_the_model(run, absolute):
    run(f"{TRAIN} --optimizer=muon --steps=6 --out_dir=one")
    more = "--optimizer=muon --steps=6 --grad_accum=2"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                           *shlex.split(f"{absolute}/two {more}")],
                          cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("validation loss") == 1, done.stderr
    done = forking(f'assert [*map(join, two(*["{absolute}/shared --shard=True {more}"] * 2))] == [0, 0]')
    assert done.returncode == 0, done.stderr
    for other in ("two", "shared"):
        for name in ("ckpt.pt", "best.pt"):
            torch.testing.assert_close(weights(other, name), weights("one"), rtol=1e-3, atol=1e-5)
        for a, b in zip(rows("one"), rows(other), strict=True):
            for name in ("train_loss", "grad_norm"):
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)
    run("train.py --resume=True --out_dir=shared --shard=False --steps=8")


@posix
def test_an_error_in_several_processes_is_one_line(absolute):
    done = forking(f"""
print(*map(join, two(*["{absolute}/new --lr=-1"] * 2)))
first, second = two("{absolute}/new", "{absolute}/new --data_dir=nowhere")
print(join(second))
os.kill(first, signal.SIGKILL)
""")
    assert done.stdout == "2 1\n1\n" and [line[:16] for line in done.stderr.splitlines()] == [
        "train.py: --lr=-", "train.py: nowher"], done.stderr


def test_divergence_is_said_and_keeps_the_last_good_checkpoint(run):
    assert "diverged" in run(f"{TRAIN} --steps=100 --lr=1e3 --eval_interval=1 --log_interval=4 --warmup_steps=50", 1)
    assert all(tensor.isfinite().all() for tensor in weights().values())
    assert all(math.isfinite(float(row["train_loss"])) for row in rows())


def test_a_timed_run_ends_within_its_time_at_the_smallest_rate_and_tells_what_is_left_by_the_pace_of_its_steps(
        run, monkeypatch):
    seconds = 0.0

    def clock():   # ticks whenever the script looks at it
        nonlocal seconds
        seconds += 0.01
        return seconds

    def slow_start():   # as compilation is
        nonlocal seconds
        seconds += 1
    monkeypatch.setattr(time, "perf_counter", clock)
    command = f"{TRAIN} --max_minutes=0.1 --eval_interval=1000000 --log_interval=5 --warmup_steps=1000000"
    out = run(command, when="parameters", do=slow_start)
    assert 4 < seconds < 6
    table = rows()
    rates = {row["step"]: float(row["lr"]) for row in table}
    assert float(table[-1]["lr"]) < 1e-4 and table[-1]["val_loss"]
    shown = [int(total.replace(",", "")) for total in re.findall(r"step [\d,]+ of about ([\d,]+):", out)]
    assert len(shown) > 2 and shown[1] == pytest.approx(shown[-1], rel=0.2)
    assert int(re.search(r"warming up over (\d+)", out)[1]) == pytest.approx(shown[-1] / 10, rel=0.2)
    assert rates["10"] > 100 * rates["5"]   # decided after step 5


def test_a_short_run_warms_up_over_its_first_tenth(run):
    assert "warming up over 2" in run(f"{TRAIN} --steps=20 --warmup_steps=11 --log_interval=1")
    assert [float(row["lr"]) for row in rows()[:2]] == [0.0015, 0.003]


def test_a_run_that_over_fits_keeps_its_best_weights_and_says_so(run):
    write("data/train.bin", Path("data/train.bin").read_bytes()[:200])
    out = run(f"{TRAIN} --steps=60 --eval_interval=10 --lr=0.03")
    losses = {int(row["step"]): float(row["val_loss"]) for row in rows() if row["val_loss"]}
    step = min(losses, key=losses.get)
    assert losses[step] < losses[60] - 0.1
    assert f"validation loss {losses[60]:.4f} (best {losses[step]:.4f} at step {step}" in out
    for name, loss in ("best.pt", losses[step]), ("ckpt.pt", losses[60]):   # without a best.pt, ckpt.pt counts
        run(f"{TRAIN} --init_from=out --out_dir={name} --steps=1 --lr=1e-9 --min_lr=0")
        assert float(rows(name)[0]["val_loss"]) == pytest.approx(loss, abs=1e-4)
        Path("out/best.pt").unlink(missing_ok=True)


def test_fine_tuning_begins_with_weights_shape_and_tokenizer_of_another_run(run):
    run(f"{TRAIN} --steps=40 --d_ff=48 --post_norm=True --out_dir=parent")
    command = ("train.py --device=cpu --dtype=float32 --compile=False --steps=4 --eval_interval=2 --eval_batches=2 "
               "--log_interval=1 --lr=1e-9 --min_lr=0 --init_from=parent")
    run(f"{command} --out_dir=child --context_length=8")
    config = train.load_run("child")[2]
    assert (config["d_ff"], config["post_norm"], config["context_length"]) == (48, True, 8)
    assert float(rows("child")[0]["train_loss"]) < float(rows("parent")[4]["train_loss"])
    same(weights("child"), weights("parent", "best.pt"))
    run("train.py --out_dir=child --init_from=parent --resume=True --steps=6")
    run("train.py --out_dir=child --init_from=nowhere --resume=True", 2)
    shutil.copytree("data", "other")
    tokenizer([(b"a", b"b")], [END], [b"ab"]).save("other")
    assert "bpe.py --tokenizer_dir=parent" in run(f"{command} --data_dir=other --out_dir=child", 2)
    run(f"{command} --out_dir=parent")   # which is moved aside
    assert Path(read_json("parent/config.json")["init_from"]).name == "parent.1"


def test_broken_data_a_full_disk_and_a_model_beyond_the_memory_are_refused_at_the_beginning(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("", (), dict(free=100)))
        assert "make room" in run(TRAIN, 1)
    assert "smaller model" in run(f"{TRAIN} --d_model=100000000 --num_heads=10000000", 1)
    os.truncate("data/val.bin", 101)
    assert "val.bin" in run(TRAIN, 1)
    Path("data/vocab.json").unlink()
    assert "not to its end" in run(TRAIN, 1)


@linux
def test_a_run_folder_whose_name_is_no_text_is_as_good_as_any(run):
    out = os.fsdecode(b"\xff out")
    run(f"{TRAIN} '--out_dir={out}'")
    run(f"train.py --resume=True '--out_dir={out}' --steps=16")
    assert "? out" in Path(out, "curves.svg").read_text() and len(rows(out)) == 9


# ------------------------------------------------------------------------------------------------------------ sample.py

@torch.no_grad()
def greedy_without_cache(model, ids, count):
    """The rule that generate follows, with the whole window computed for every token."""
    window, chosen = ids[-model.context_length:], []
    for _ in range(count):
        if len(window) > model.context_length:
            window = window[(model.context_length + 1) // 2:]   # the older half goes
        chosen.append(model(torch.tensor([window]))[0, -1].argmax().item())
        window = window + chosen[-1:]
    return chosen


@pytest.mark.parametrize("switches", [*ABLATIONS, *(dict(context_length=length) for length in (1, 2, 3, 8))], ids=str)
def test_greedy_text_is_the_same_with_and_without_cache_within_and_beyond_the_context(switches):
    model = small_model(vocab_size=61, d_ff=48, **switches)   # 61: a head that cannot be cut into blocks
    before = str(model)
    for length in (1, 3, 17):
        ids = torch.randint(61, (length,)).tolist()
        expected = greedy_without_cache(model, ids, 20)
        assert [*generate(model, ids, 20, temperature=0)] == expected
        assert [*generate(model, ids, 20, temperature=0, num_samples=2)] == [[one, one] for one in expected]
    model(torch.tensor([[1]])).sum().backward()   # still trainable: no tensor of inference mode has stayed in it
    assert str(model) == before


def test_top_k_and_top_p_on_a_distribution_made_by_hand():
    for limits, kept in [
            (dict(top_k=9), {0: 0.2, 1: 0.5, 2: 0.05, 3: 0.25}), (dict(top_k=2), {1: 0.6667, 3: 0.3333}),
            (dict(top_p=0.4), {1: 1}), (dict(top_p=0.6), {1: 0.6667, 3: 0.3333}),   # 0.5 falls short, 0.75 reaches it
            (dict(top_k=2, top_p=0.6), {1: 1}),                                     # top-k first: 0.5 / 0.75 reaches it
            (dict(temperature=0.5), {0: 0.1127, 1: 0.7042, 2: 0.007, 3: 0.1761}),
            (dict(temperature=0), {1: 1}), (dict(temperature=1e-300), {1: 1})]:
        probabilities, ids = candidates(torch.tensor([0.2, 0.5, 0.05, 0.25]).log(), **limits)
        assert {i: round(p, 4) for i, p in zip(ids.tolist(), probabilities.tolist()) if p} == kept, limits


def test_tokens_are_drawn_with_the_probabilities_of_the_model():
    model = small_model(vocab_size=5)
    drawn = torch.tensor(next(generate(model, [2], 1, num_samples=20_000, temperature=1.3)))
    expected = (model(torch.tensor([[2]]))[0, -1] / 1.3).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=5) / 20_000, expected, atol=0.012, rtol=0)


def test_the_end_token_ends_a_text_and_fills_up_those_that_wait_and_begins_an_empty_one():
    model, texts = small_model(vocab_size=4), []
    for ids in ([], [3]):
        torch.manual_seed(0)
        texts.append([*zip(*generate(model, ids, 200, end_id=3, num_samples=8))])
    assert texts[0] == texts[1] and len({(*text, 3).index(3) for text in texts[0]}) > 2
    assert all({*text[(*text, 3).index(3):]} <= {3} for text in texts[0])
    assert not all(text[-1] == 3 for text in texts[0])   # the row in which the last one ends is not yielded
    assert 3 not in [*generate(model, [0], 200, end_id=3)]


@pytest.mark.parametrize("context_length", [1, 4, 7, 64])
def test_the_score_of_a_text_is_what_generate_would_have_given_each_token(context_length):
    model, ids = small_model(context_length=context_length), torch.randint(50, (30,))
    expected, window = [], ids[:0]
    for i in range(29):
        if len(window) == context_length:
            window = window[(context_length + 1) // 2:]
        window = torch.cat((window, ids[i:i + 1]))
        expected.append(cross_entropy(model(window[None])[0, -1], ids[i + 1]).item())
    assert [*surprise(model, ids.tolist())] == pytest.approx(expected, abs=1e-5)


def test_streaming_never_prints_half_a_character_and_replaces_malformed_bytes(monkeypatch):
    raw, written = "naïve 🙂 漢字".encode() + b"\xff\xf0\x9f", []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    assert print_streamed([*raw], tokenizer()) == len(raw)   # a byte a token
    assert "".join(written) == raw.decode(errors="replace") + "\n" and "🙂" in written


def test_sample_py_continues_a_prompt_from_the_command_line_a_file_and_standard_input(run, monkeypatch):
    write("prompt", "the é")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xc3\xa9")))
    one, *others = (run(f"sample.py --prompt '{source}' --seed=3") for source in ("the é", "@prompt", "-"))
    assert others == [one] * 2 and one.startswith("the é") and "tokens/s" in run.notes and "note" not in run.notes
    assert run("sample.py --prompt 'the é' --seed=4") != one


def test_sample_py_cuts_a_long_prompt_and_labels_several_samples(run):
    out = run(f"sample.py --prompt {'é' * 9} --num_samples=3 --max_new_tokens=4")
    assert "the prompt has 18 tokens; the model sees the last 16" in run.notes
    assert re.findall("^---.*", out, re.M) == [f"--- sample {i} of 3" for i in (1, 2, 3)]


def test_sample_py_scores_a_text_after_the_first_special_token(run):
    text = "the other thing<|user|>ü"
    model, tokenizer, _ = train.load_run("out")
    ids = [tokenizer.special_tokens[END]] + tokenizer.encode(text)   # special tokens in the text count as such
    nats, tokens, size = sum(surprise(model, ids)), len(ids) - 1, len(text.encode())
    assert run(f"sample.py --score '{text}'") == (
        f"{nats / tokens:.4f} nats per token, {nats / tokens / math.log(2):.4f} bits per token, "
        f"{nats / math.log(2) / size:.4f} bits per byte, perplexity {math.exp(nats / tokens):.2f} "
        f"({tokens} tokens, {size} bytes)\n")


@posix
@pytest.mark.parametrize("shell", ["--prompt=- <&- 2>&-", "--score=text 2>&-"])
def test_a_closed_stream_is_an_empty_one_and_no_note_goes_into_standard_output(run, shell):
    done = subprocess.run(f"'{sys.executable}' '{ROOT / 'sample.py'}' {shell}", shell=True, capture_output=True)
    assert done.returncode == 0 and done.stdout and b"tokens/s" not in done.stdout and not done.stderr


def test_a_run_without_special_tokens_needs_a_prompt(run):
    run("bpe.py --data=text.txt --vocab_size=260 --special_tokens= --num_processes=1")
    run(TRAIN)
    assert "--prompt" in run("sample.py", 2) and "end_id" not in run.notes
    run("sample.py --prompt=the --max_new_tokens=2")


def read_safetensors(path):
    """{name: tensor} of a safetensors file, all float32, one after the other with no gap."""
    raw, end, tensors = Path(path).read_bytes(), 0, {}
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert start % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        begin, (first, end) = end, entry["data_offsets"]
        assert (entry["dtype"], first) == ("F32", begin)
        tensors[name] = torch.tensor(np.frombuffer(raw[start + first:start + end], "<f4").reshape(entry["shape"]))
    assert start + end == len(raw)
    return tensors


LLAMA = """model.embed_tokens token_embeddings  model.layers layers  model.norm ln_final  input_layernorm ln1
           post_attention_layernorm ln2  self_attn attn  o_proj output_proj
           mlp.gate_proj ffn.w1  mlp.down_proj ffn.w2  mlp.up_proj ffn.w3""".split()


def exported_llama(folder):
    """The exported model: ours, but for the names and for RoPE, which turns the pairs (k, k + d_k / 2) in a Llama."""
    config, state = read_json(folder, "config.json"), {}
    for name, tensor in read_safetensors(Path(folder, "model.safetensors")).items():
        for theirs, ours in zip(LLAMA[::2], LLAMA[1::2]):
            name = name.replace(theirs, ours)
        state[name] = tensor
    model = TransformerLM(*(config[name] for name in (
        "vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads",
        "intermediate_size")), rope=False, tie_embeddings=config["tie_word_embeddings"])
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["token_embeddings.weight"]
    model.load_state_dict(state)
    for layer in model.layers:
        layer.attn.rope = lambda x, positions: turned(x, config["rope_theta"], halves=True)
    return model, config


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_run_is_a_llama_with_a_gpt2_tokenizer(run, tied):
    run(f"{TRAIN} --tie_embeddings={tied} --num_layers=2")
    run("sample.py --export=new/llama")
    (model, tokenizer, _), (llama, config) = train.load_run("out"), exported_llama("new/llama")
    ids = torch.randint(len(tokenizer.vocab), (3, 16))
    same(llama(ids), model(ids), 1e-5)
    words, (end, user) = read_json("new/llama/tokenizer_config.json"), tokenizer.special_tokens.values()
    assert (config["architectures"], config["eos_token_id"]) == (["LlamaForCausalLM"], end)
    assert (words["tokenizer_class"], words["eos_token"], words["bos_token"]) == ("GPT2Tokenizer", END, END)
    assert words["added_tokens_decoder"][str(user)]["content"] == "<|user|>"
    assert Tokenizer.from_folder("new/llama").vocab == tokenizer.vocab and len(listing("new/llama")) == 5


def test_what_is_no_llama_or_finds_no_room_is_not_exported(run, monkeypatch):
    for changes in ABLATIONS[1:5]:
        (name, value), = changes.items()
        run(f"{TRAIN} --{name}={value}")
        assert float(rows()[0]["train_loss"]) > float(rows()[-1]["train_loss"])   # every ablation trains
        assert name in run("sample.py --export=new", 2) and not Path("new").exists()

    def full(*words, **more):   # when the other three files are written
        raise OSError(28, "No space left on device")
    Path("new").mkdir()
    before = listing()
    monkeypatch.setattr(Path, "write_text", full)
    assert "No space" in run("sample.py --out_dir=out.1 --export=new", 1) and not listing("new") and listing() == before


# ------------------------------------------------------------------------------------------ the questions about Unicode

def test_chr_0_is_seen_in_its_repr_and_stays_in_the_text_around_it(capsys):
    print(chr(0), end="")
    assert capsys.readouterr().out == "\x00"   # one character goes to the terminal, which shows nothing for it
    text = "this is a test" + chr(0) + "string"
    assert len(text) == 21 and repr(text) == r"'this is a test\x00string'"


def test_utf8_is_the_shortest_for_english_though_not_for_chinese_and_has_no_byte_order():
    codes = "utf-8", "utf-16-le", "utf-32-le"
    assert [len("hello, 你好".encode(code)) for code in codes] == [13, 18, 36]
    assert [len("你好".encode(code)) for code in codes] == [6, 4, 8]
    assert ["hello".encode(code).count(0) for code in codes] == [0, 5, 15]
    assert "hello".encode("utf-16-le") != "hello".encode("utf-16-be") and "hello".encode("utf-8") == b"hello"


def decode_byte_by_byte(raw):
    """The handout's wrong decoder: right for ASCII alone."""
    return "".join(bytes([byte]).decode("utf-8") for byte in raw)


def decodes(raw, decode=bytes.decode):
    try:
        return bool(decode(raw))
    except UnicodeDecodeError:
        return False


def test_decoding_byte_by_byte_fails_beyond_ascii_and_some_pairs_of_bytes_decode_to_nothing():
    assert decode_byte_by_byte(b"hello") == "hello" and not decodes("é".encode(), decode_byte_by_byte)
    assert not any(map(decodes, [b"\xff\xff", b"\xc0\x80", b"\xe4\xbd"]))
    high = range(128, 256)
    assert sum(decodes(bytes([a, b])) for a in high for b in high) == 30 * 64   # C2..DF, then 80..BF: U+0080 to U+07FF


def test_every_token_is_at_least_one_byte_so_a_foreign_tokenizer_gives_at_least_one_byte_a_token():
    english = Tokenizer(*train_bpe(write("text", "the cat sat on the mat and the dog sat on the cat " * 9), 280, []))
    strange = "日本語のテキスト"   # nothing that it was trained on: exactly one byte a token, the worst that can happen
    assert len(english.encode(strange)) == len(strange.encode())
    assert 22 == len("the cat sat on the mat") > 2 * len(english.encode("the cat sat on the mat"))


# ---------------------------------------------------------------------------------------------------- the hostile world

def members(session):
    """The living processes of a session (a process started with start_new_session, and all that came from it),
    by /proc.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A command line for nine megabytes of a few thousand words: enough for two worker processes."""
    path, rng = tmp_path_factory.mktemp("large") / "text.txt", random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(3000)]
    lines = [" ".join(rng.choices(words, k=12)) + "<|endoftext|>\n" * (i % 9 == 0) for i in range(1000)]
    write(path, "\n".join(rng.choices(lines, k=130_000)))
    assert os.path.getsize(path) > 2 * bpe.BLOCK
    return f"bpe.py --data={path} --num_processes=2"


@pytest.fixture
def working(large):
    """A bpe.py whose two workers have begun, and their process ids."""
    process = start(large, start_new_session=True)
    wait_until(lambda: len(members(process.pid)) == 3)
    yield process, [pid for pid in members(process.pid) if pid != process.pid]
    process.kill()
    process.communicate()


@linux
def test_sigkill_at_random_moments_leaves_whole_files_and_no_worker_and_the_next_run_clears_up(large):
    rng, made, begin = random.Random(1), [], time.monotonic()
    for size in ("300", "900"):
        assert finish(f"{large} --vocab_size={size} --data_dir={size}")[0] == 0
        made.append(contents(size))
    seconds = (time.monotonic() - begin) / 2
    for size in ("300", "900", "300", "900", "300"):
        process = start(f"{large} --vocab_size={size}", start_new_session=True)
        time.sleep(rng.uniform(0.2, 1) * seconds)
        process.kill()
        process.wait()   # workers that outlive it would hold its pipes open
        wait_until(lambda: not members(process.pid))
        assert all(content in [files[name] for files in made] for name, content in contents("data").items()
                   if not name.endswith(".tmp"))
    assert finish(f"{large} --vocab_size=300")[0] == 0 and contents("data") == made[0]


@linux
@pytest.mark.parametrize("end", ["worker", "parent", "group"])
def test_a_killed_worker_and_ctrl_c_end_the_command_with_one_line_and_without_orphans(working, end):
    process, workers = working
    if end == "worker":
        os.kill(workers[0], signal.SIGKILL)
    else:
        (os.kill if end == "parent" else os.killpg)(process.pid, signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    if end == "worker":
        assert process.returncode == 1 and err.count("\n") == 1 and "a worker process died" in err
    else:
        assert process.returncode == 130 and err == "bpe.py: interrupted\n"
    wait_until(lambda: not members(process.pid))
    assert listing("data") == {".lock"}


@linux
def test_a_second_run_in_the_same_folder_is_refused(working, large):
    process, _ = working
    os.kill(process.pid, signal.SIGSTOP)   # so that it cannot have ended when the second comes
    status, _, err = finish(large)
    assert status == 1 and err.count("\n") == 1 and "another run" in err
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0 and listing("data") == TABLES | {".lock"}


@posix
@pytest.mark.parametrize("script, package", [("bpe.py", "regex"), ("sample.py", "torch")])
def test_ctrl_c_while_packages_load_leaves_no_traceback(script, package):
    write(f"{package}.py", "import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    assert finish(script, env={**os.environ, "PYTHONPATH": os.getcwd()}) == (-signal.SIGINT, "", "")


@linux
def test_a_full_disk_is_said_by_file_and_leaves_the_old_files(run):
    import resource
    before = contents("data")
    write("text.txt", "one two three four five six seven eight nine ten\n" * 3000)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)   # the write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    status, _, err = finish(f"{BPE} --vocab_size=258", preexec_fn=limit)
    assert status == 1 and err.count("\n") == 1 and "train.bin" in err and "too large" in err
    assert contents("data") == before


def test_odd_names_a_c_locale_and_no_home_cost_nothing(tmp_path):
    folder = Path("a 'b\"\n\u00e9 %d{x}")
    write(folder / "t \\n.txt", "one two three \u4e2d\u56fd " * 3000)
    bare = {"LC_ALL": "C", "HOME": "/nonexistent", "PYTHONIOENCODING": "ascii", "COLUMNS": "40",
            "SYSTEMROOT": os.environ.get("SYSTEMROOT", "")}
    names = shlex.join([f"--data={folder / 't '}\\n.txt", f"--data_dir={folder}"])
    status, out, err = finish(f"bpe.py {names} --vocab_size=270 --special_tokens=\u4e2d\u56fd", env=bare)
    assert status == 0 and not err and "??" in out   # the terminal lacks the characters, the files have them
    assert "\u4e2d\u56fd" in (folder / "vocab.json").read_text(encoding="utf-8")


def test_processes_may_be_spawned_instead_of_forked():
    text = "one two three four five six seven eight nine ten\n" * 1500
    write("text.txt", text)
    write("driver.py", """
import multiprocessing
import bpe
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    bpe.BLOCK = 1 << 14
    tokenizer = bpe.Tokenizer(*bpe.train_bpe("text.txt", 280, [], 2))
    print(tokenizer.merges, tokenizer.encode_file("text.txt", "ids.bin", 2))
""")
    done = subprocess.run([sys.executable, "driver.py"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    alone = Tokenizer(*train_bpe("text.txt", 280, [], 1))
    assert done.stdout == f"{alone.merges} {len(alone.encode(text))}\n", done.stderr


def test_a_megabyte_without_white_space_trains_and_encodes():
    text = random.Random(2).randbytes(500_000).hex()
    tokenizer = Tokenizer(*train_bpe(write("line", text), 300, [], 1))
    assert tokenizer.encode_file("line", "ids", 1) * 2 == os.path.getsize("ids")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_of_special_tokens_only_a_thousand_of_them_and_a_vocabulary_far_larger_than_the_text():
    specials = [f"<|{i}|>" for i in range(1000)]
    vocab, merges = train_bpe(write("text", "".join(specials)), 2000, specials, 1)
    assert len(vocab) == 1256 and not merges
    assert Tokenizer(vocab, merges, specials).encode("".join(specials) + "<|7") == [*range(256, 1256), *b"<|7"]
    vocab, merges = train_bpe(write("text", "low low lower"), 10 ** 12, [END], 1)
    assert len(vocab) == 257 + len(merges) and vocab[len(vocab) - 2] == b" lower"
