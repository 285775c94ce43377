"""
What the four scripts promise, each promise tried: python -m pytest -q test_all.py

A script is run as a user runs it: `run` takes its command line, in a folder where bpe.py and train.py have run already.
What is fast is held against the plain definition, which stands here or in the script.
"""
import csv
import doctest
import io
import itertools
import json
import math
import multiprocessing
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

ROOT = Path(__file__).resolve().parent
# Before torch loads, and for all processes that are started here: one thread each, since the models are tiny.
os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import bpe
import model as m
import train
from bpe import Tokenizer, plain_encode, plain_train, train_bpe
from model import TransformerLM, cross_entropy
from sample import candidates, generate, print_streamed, surprise
from train import SGD, AdamW, Muon, get_batch, load_checkpoint, load_tokens, read_checkpoint, save_checkpoint

END = "<|end|>"
BPE = f"bpe.py --data=text.txt --vocab_size=300 --special_tokens={END},<|user|> --num_processes=1"
TRAIN = ("train.py --context_length=16 --num_layers=1 --d_model=16 --num_heads=2 --rope_theta=500 --batch_size=4 "
         "--steps=12 --eval_interval=4 --eval_batches=2 --log_interval=2 --warmup_steps=2 --device=cpu --dtype=float32 "
         "--compile=False")
TABLES = {*"vocab.json merges.txt train.bin val.bin".split()}
RESULTS = {*"ckpt.pt best.pt log.csv config.json curves.svg vocab.json merges.txt".split()}
ABLATIONS = [dict(), dict(post_norm=True), dict(rms_norm=False), dict(rope=False), dict(swiglu=False),
             dict(tie_embeddings=True)]
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, or needs file names of any bytes")
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, or sends POSIX signals")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Every test begins in an empty folder, with the same random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def start(command, **how):
    """Start a command line as a process of its own."""
    script, *flags = shlex.split(command)
    return subprocess.Popen([sys.executable, ROOT / script, *flags], text=True, stdout=subprocess.PIPE,
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
    for command in BPE, TRAIN:
        assert finish(command, cwd=folder)[0] == 0
    return folder


def execute(command):
    """Run a command line in this process."""
    sys.argv = shlex.split(command)
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


@pytest.fixture
def run(made, monkeypatch, capsys):
    """Run a command line in this process, in a copy of `made`; return its standard output.

    wanted: the exit status. Where that is not 0, the one line on standard error returns. The notes on standard error
    are in run.notes.
    """
    def run(command, wanted=0):
        status = 0
        try:
            execute(command)
        except SystemExit as end:
            status = end.code
        out, run.notes = capsys.readouterr()
        assert status == wanted, run.notes
        if status in (1, 2):
            assert run.notes.count("\n") == 1
        return run.notes if status else out

    shutil.copytree(made, ".", dirs_exist_ok=True)
    monkeypatch.setattr(sys, "argv", [])
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    yield run
    for handler in handlers.items():
        signal.signal(*handler)


def execute_elsewhere(command, folder, environment):
    """Run a command line in a folder; its output goes into the files 1 and 2 there."""
    os.chdir(folder)
    os.environ.update(environment)
    for stream in 1, 2:
        os.dup2(os.open(str(stream), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout = open(1, "w")
    execute(command)


def fork(command, **environment):
    """Start a command line in a process that is forked from one that has loaded torch: this saves seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    process = context.Process(target=execute_elsewhere, args=(command, os.getcwd(), environment), daemon=True)
    process.start()
    return process


def status_of(*processes):
    """The exit statuses of processes, when all have ended."""
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


def wait_until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def run_two(*commands):
    """The exit statuses of two command lines that are started as torchrun does; if one fails, the other is ended."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)   # at any free port
    group = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(store.port),
                 TORCHELASTIC_USE_AGENT_STORE="True")
    processes = [fork(command, RANK=str(i), LOCAL_RANK=str(i), **group) for i, command in enumerate(commands)]
    wait_until(lambda: any(codes := [process.exitcode for process in processes]) or None not in codes)
    time.sleep(0.1)   # torchrun looks ten times a second
    for process in processes:
        process.kill()
    return status_of(*processes)


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogateescape"))
    return path


def full_disk(*words):
    raise OSError(28, "No space left on device")


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

def tokenizer(merges=(), specials=(), more=()):
    """A tokenizer whose vocabulary is the bytes, the tokens that are given, and what is special."""
    return Tokenizer(dict(enumerate([*bpe.BYTES, *more])), merges, specials)


def tokens_in(content, vocab_size):
    """Load and check a file of tokens, for contexts of ten."""
    return load_tokens(write("t.bin", content), vocab_size, 10)


@pytest.mark.parametrize("call, message", [
    (lambda: tokenizer().decode([999]), "none with id 999"),
    (lambda: tokenizer(specials=[""]), "empty"),
    (lambda: train_bpe(__file__, 256, [END]), "choose 257 or more, for 256 bytes and 1 special tokens"),
    (lambda: tokenizer([(b" ", b"t")], ["\u0120t"], [b" t"]).save("."), "write it in ASCII"),
    (lambda: small_model(num_heads=5), "d_model=32 cannot be split into num_heads=5"),
    (lambda: small_model(num_heads=32), "must be even"),
    (lambda: tokens_in(b"\0" * 42, 70_000), "t.bin .*42 bytes"),
    (lambda: tokens_in(b"\0" * 20, 300), "t.bin .*20 bytes"),
    (lambda: tokens_in(b"\0" * 40 + b"\1\1", 257), "t.bin .*token 257"),
    (lambda: get_batch(np.arange(10), 1, 10, "cpu"), "10 tokens are too few"),
    (lambda: AdamW([torch.zeros(1)], betas=(1.5, 0.9)), r"1\.5"),
    (lambda: SGD([torch.zeros(1)], lr=-1), "-1 is negative"),
    (lambda: next(generate(small_model(), [], 4)), "empty prompt"),
    (lambda: next(generate(small_model(), [1, 50], 4)), "0 to 49"),
    (lambda: next(generate(small_model(), [1, -1], 4)), "0 to 49")])
def test_a_call_that_cannot_be_right_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# a file of a tokenizer with one merge, what stands in it instead, what is said about it
BROKEN = """
vocab.json    {                               vocab.json
vocab.json    [1, 2]                          vocab.json
vocab.json    {"a": 1.5}                      vocab.json
vocab.json    {"a": 0, "a": 1}                vocab.json.*all differ: 0 is missing
vocab.json    {"a": -1}                       vocab.json.*all differ
vocab.json    {"a": 0}                        vocab.json.*lacks b'.x00'
merges.txt    \udcff                          merges.txt
merges.txt    #version: 0.2                   merges.txt.*'\u0120a'
merges.txt    a b c                           merges.txt.*'a b c' is not two tokens
merges.txt    a \u3000                        merges.txt.*is not two tokens
merges.txt    \u0120 a/a b                    merges.txt.*lacks b'ab'
merges.txt    \u0120 a/a bc                   merges.txt.*'a bc' is not two tokens
merges.txt    \u0120 a/\u0120 a               merges.txt.*out of order
merges.txt    a b/b c/a bc/abc ab/ab c/\u0120 a  merges.txt.*b'ab' and b'c' is out of order
"""   # the last one: of abcabc, is it ab c that comes first, or abc ab?


@pytest.mark.parametrize("line", BROKEN.strip().splitlines())
def test_a_broken_tokenizer_is_refused_by_the_name_of_its_file(line):
    name, content, message = re.split("  +", line)
    tokenizer([(b" ", b"a")], more=[b" a"]).save(".")
    write(name, content.replace("/", "\n"))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(".")


# a command line, its exit status, what it says in one line
REFUSED = """
bpe.py --help                                           0  worker processes; 0: one for each core
bpe.py --vocab_size=300 --vocab_size=256                2  vocab_size=256: choose 257
bpe.py --vocab_size=1e3                                 2  invalid int value
bpe.py --vocab_size=                                    2  invalid int value
bpe.py --vocab_size=9223372036854775808                 2  --vocab_size=9223372036854775808 is
bpe.py --num_processes -1                               2  --num_processes=-1
bpe.py --data_dir=                                      2  --data_dir
bpe.py --vocab=300                                      2  --vocab
bpe.py --data                                           2  expected one argument
bpe.py stray                                            2  stray
bpe.py --data=nowhere.txt                               1  no file has this name
bpe.py --data=.                                         1  no file has this name
bpe.py --data=*.none                                    1  '*.none'
bpe.py --data=text.txt --val_data=nowhere.txt           1  No such file or directory: 'nowhere.txt'
bpe.py --data=/dev/null --val_data=text.txt             1  no file has this name
bpe.py --data=empty                                     1  is empty
bpe.py --data=text.txt --tokenizer_dir=nowhere          1  nowhere
bpe.py --data=text.txt --data_dir=/proc                 1  /proc
bpe.py --data=text.txt --data_dir=mine                  2  mine/corpus.txt is not from bpe.py
bpe.py --data=data/train.bin                            2  would replace
bpe.py --data=link                                      2  would replace
bpe.py --data=text.txt --special_tokens=|               2  '|'
bpe.py --data=text.txt --special_tokens=\u0120the       2  reads like
train.py --d_model=0                                    2  --d_model=0
train.py --num_heads=3                                  2  num_heads=3
train.py --num_heads=16 --d_model=16                    2  must be even
train.py --lr=-1                                        2  --lr=-1
train.py --lr=nan                                       2  --lr
train.py --eps=0                                        2  --eps=0
train.py --weight_decay=-1                              2  --weight_decay=-1
train.py --min_lr=1                                     2  --min_lr=1
train.py --beta2=1.0                                    2  betas (0.9, 1.0)
train.py --optimizer=sgd                                2  --optimizer=sgd
train.py --dtype=int8                                   2  --dtype=int8
train.py --device=tpu                                   2  --device=tpu
train.py --device=cuda:99                               2  --device=cuda:99
train.py --batch_size=3 --grad_accum=2                  2  --batch_size=3
train.py --shard=True                                   2  --shard=True
train.py --out_dir=                                     2  --out_dir
train.py --out_dir=data                                 2  name two folders
train.py --steps=1e3                                    2  --steps
train.py --post_norm=yes                                2  invalid true_or_false value: 'yes'
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
sample.py --max_new_tokens=0                            2  max_new_tokens is 0
sample.py --temperature=-1                              2  temperature is -1
sample.py --temperature=nan                             2  --temperature
sample.py --top_k=-1                                    2  top_k is -1
sample.py --prompt=the --top_p=0                        2  top_p is 0
sample.py --top_p=1.1                                   2  top_p is 1.1
sample.py --num_samples=0                               2  num_samples 0
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


@pytest.mark.parametrize("command, folder", [(BPE, "data"), (TRAIN, "out")])
def test_a_second_run_in_the_same_folder_is_refused(run, command, folder):
    before = contents()
    with bpe.only_run_in(folder):
        assert "another run" in run(command, 1)
    assert contents() == before


# --------------------------------------------------------------------------------------------------------------- bpe.py

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"   # GPT-2's
SPACES = [*filter(str.isspace, map(chr, range(0x3001))), *"\u180e\u200b\ufeff"]
BITS = [
    *SPACES, *" \n " * 10, *"aaabbstdmlvre'''0123_-.,!\0\x7f\ufffd\U0003ffff\U00040000\U0010ffff",
    "\r\n", "\t", "  ", "    ", " \n", "a" * 9, "ab" * 65, "é中" * 40, "thesing" * 20,
    *"""'s 'll 've 're 'm don't they'll é 中 文字 😀 👩\u200d🔬 ½ ٣ Ⅷ ß \u0301 the ing <| |> <|end|> aab zq
        longer-than-fifteen 0123456789abcdef-0123456789abcdef""".split()]
MALFORMED = [b"\xff", b"\xc3", b"\xa9", b"\xe4\xb8", b"\xf0\x9f\x98", b"\x80", b"\xed\xa0\x80"]
SPECIALS = [END, "<|", "<|end", "aab", "a b", " z", "zq ", "q\nz", "'s", "x<|", "…"]


def random_text(rng, bits=60):
    return "".join(rng.choices(BITS, k=rng.randrange(bits)))


def in_bytes(texts):
    return [text.encode() for text in texts]


def plain_words(text, specials):
    return bpe.plain_words(text.encode(), bpe.special_pattern(in_bytes(specials)))


def fast_words(text, specials):
    distinct, index = bpe.distinct_words(text.encode(), bpe.special_pattern(in_bytes(specials)))
    return [distinct[i] for i in index]


def by_definition(text, specials, num_merges):
    """The vocabulary and the merges that a text gives, and its ids, all by the plain definitions."""
    words, special = plain_words(text, specials), in_bytes(specials)
    merges = plain_train(Counter(word for word in words if word not in special), num_merges)
    vocab = [*bpe.BYTES, *map(b"".join, merges), *special]
    tokens = [token for word in words for token in ([word] if word in special else plain_encode(word, merges))]
    return dict(enumerate(vocab)), merges, [*map(vocab.index, tokens)]


def test_the_examples_in_the_docstrings_of_bpe_py_are_true():
    failed, attempted = doctest.testmod(bpe)
    assert failed == 0 < attempted


def test_the_handouts_examples_and_what_special_tokens_mean():
    assert bpe.PATTERN.pattern == PATTERN
    words = {b"low": 5, b" lower": 2, b" widest": 3, b" newest": 6}
    assert b" ".join(map(b"".join, plain_train(words, 6))) == b"st est ow low west ne"
    # few words in all, and counts beyond 8 and 32 bits
    for many in {b"aba": 1}, words | {b" low": 128}, words | {b" low": 4_294_967_296}:
        assert plain_train(many, 12) == bpe.learn_merges(many, 12)
    merges = [(b"t", b"h"), (b" ", b"c"), (b" ", b"a"), (b"th", b"e"), (b" a", b"t")]
    assert tokenizer(merges, more=map(b"".join, merges)).encode("the cat ate") == [259, 257, *b"at", 260, *b"e"]
    # the leftmost match wins, and then the longest
    assert tokenizer(specials=["<|", "<|end", "x<|", "d|"]).encode("<|end|x<|e") == [257, *b"|", 258, *b"e"]
    # a special token keeps the id that the vocabulary gives it; special is what the caller names, nothing else
    assert tokenizer(specials=["<y>", "<x>"], more=[b"<x>"]).encode("<x><y>") == [256, 257]
    assert tokenizer(more=[b"<x>"]).encode("<x>") == [*b"<x>"]


def test_every_character_is_of_the_kind_that_the_pattern_gives_it():
    points = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 61), 0x10FFFF]
    text = "".join(f"a{chr(point)}1{chr(point)}!" for point in points)
    assert fast_words(text, []) == plain_words(text, [])


def test_fast_pretokens_are_the_plain_ones_and_no_cut_changes_one():
    rng = random.Random(0)
    for _ in range(2000):
        text, specials = random_text(rng), rng.sample(SPECIALS, rng.randrange(5))
        words, raw = plain_words(text, specials), text.encode()
        assert fast_words(text, specials) == words, (text, specials)
        for place in bpe.cut_pattern(in_bytes(specials)).finditer(raw):
            parts = raw[:place.start()].decode(), raw[place.start():].decode()
            assert [word for part in parts for word in plain_words(part, specials)] == words, (parts, specials)


# sizes of blocks, slices, groups and the cache: so small that their edges fall into everything
SMALL = dict(BLOCK=40)


@pytest.mark.parametrize("processes, sizes", [
    (1, SMALL), (1, dict(SMALL, LONG=0)), (2, dict(SMALL, TOGETHER=3, LONG=5)), (3, dict(SMALL, CACHE=20)), (7, SMALL)])
def test_a_file_trains_and_encodes_as_the_definition_says_for_any_number_of_processes(monkeypatch, processes, sizes):
    for size in sizes.items():
        monkeypatch.setattr(bpe, *size)
    rng, pieces = random.Random(processes), [*in_bytes(BITS), *MALFORMED]
    for _ in range(30 if processes == 1 else 3):
        raw, specials = b"".join(rng.choices(pieces, k=rng.randint(1, 400))), rng.sample(SPECIALS, rng.randrange(5))
        text = raw.decode(errors="replace")
        vocab, merges, ids = by_definition(text, specials, rng.choice([0, 50, 400]))
        assert train_bpe(write("text", raw), len(vocab), specials, processes) == (vocab, merges), (raw, specials)
        tokenizer = Tokenizer(vocab, merges, specials)
        tokenizer.encode_file("text", "ids", processes)
        assert np.fromfile("ids", "<u2").tolist() == ids == tokenizer.encode(text), (raw, specials)
        assert tokenizer.decode(ids) == text and tokenizer.encode("a") == [97]
        assert "CACHE" not in sizes or len(tokenizer.cache) < 9


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer trained on random text with special tokens."""
    path, specials = tmp_path_factory.mktemp("trained") / "text", [END, "<|", "a b"]
    return Tokenizer(*train_bpe(write(path, random_text(random.Random(5), 9000)), 700, specials, 1), specials)


def test_any_unicode_survives_encoding_and_decoding_and_what_is_malformed_is_replaced(trained):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert trained.decode(trained.encode(text)) == text
    assert trained.encode("a\ud800b\udfff") == trained.encode("a\ufffdb\ufffd")   # lone surrogates
    assert trained.decode([0xE4, 0xBD, 97]) == "\ufffda"


def test_encode_iterable_is_lazy_and_gives_the_ids_of_the_joined_text(trained):
    # of the second text, an item may end in a special token, where the last cut must not lie
    for text, sizes in ((random_text(random.Random(9), 50_000), (1, 7)),
                        ("é" * 17_000 + END * 9000, range(17_000, 17_007))):
        for size in sizes:
            items = [text[i:i + size] for i in range(0, len(text), size)]
            assert [*trained.encode_iterable(items)] == trained.encode(text)
    for item in ("once upon a time\n" * 3000, "\n" + "x" * 20_000):   # in the second, the only cut is far from the end
        taken = []
        ids = trained.encode_iterable(taken.append(item) or item for _ in range(20))
        first = next(ids)
        assert len(taken) < 4 and trained.decode([first, *ids]) == item * 20


def test_ids_are_uint16_up_to_65536_tokens_and_uint32_beyond():
    for size, dtype in (65536, "<u2"), (65537, "<u4"):
        numbered = tokenizer(more=[b"<%d>" % i for i in range(256, size)], specials=[f"<{size - 1}>"])
        numbered.encode_file(write("text", f"a<{size - 1}>"), "ids")
        assert np.fromfile("ids", dtype).tolist() == [97, size - 1]


def test_saved_files_have_gpt2s_layout_and_load_again(trained):
    trained.save(".")
    table, lines = read_json("vocab.json"), Path("merges.txt").read_bytes().decode().split("\n")
    assert lines[0] == "#version: 0.2" and len(lines) == len(trained.merges) + 2
    assert [table[token] for token in ("\u0120", "\u010a", "!", END)] == [*b" \n!", 256 + len(trained.merges)]
    write("merges.txt", "\r\n".join(lines[1:]))   # the version line may be absent
    again = Tokenizer.from_files("vocab.json", "merges.txt", trained.special_tokens)
    for name in "vocab", "merges", "special_tokens":
        assert getattr(again, name) == getattr(trained, name)


def texts_of(folder):
    """The training and the validation text that the ids in a folder stand for."""
    tokenizer = Tokenizer.from_folder(folder)
    return [tokenizer.decode(np.fromfile(Path(folder, name), "<u2").tolist()) for name in ("train.bin", "val.bin")]


def test_a_pattern_makes_a_document_of_each_file_in_an_order_that_is_shuffled_but_fixed(run):
    documents = [f"Note {i:03} is here.\n" for i in range(200)]
    for i, text in enumerate(documents):
        write(f"notes/{i // 100}/{i:03}.md", text)
    Path("notes/folder.md").mkdir()
    Path("notes/again.md").symlink_to("0/000.md")   # counts once
    command = "bpe.py --data_dir=notes --vocab_size=300 --num_processes=1"
    run(f"{command} --data=notes/**/*.md --special_tokens=</s>,<a>")
    corpus = Path("notes/corpus.txt").read_text()
    *shuffled, rest = corpus.split("</s>")
    assert not rest and sorted(shuffled) == documents != shuffled
    training, validation = texts_of("notes")
    assert training + validation == corpus and training.endswith("</s>") and validation.startswith("Note")
    run(f"{command} --data=notes/** --special_tokens=")
    assert Path("notes/corpus.txt").read_text() == corpus.replace("</s>", "\n")
    run(f"{command} --data=notes/** --val_data=notes/0/007.md")
    assert "Note 007" not in Path("notes/corpus.txt").read_text()


def test_a_file_that_vanishes_is_left_out(capsys):
    bpe.collect([write("a", "text"), "gone"], "corpus", b"|")
    assert Path("corpus").read_text() == "text|" and "gone was removed" in capsys.readouterr().err


def test_the_default_corpus_is_the_standard_library_and_its_order_is_fixed(run):
    run("bpe.py --vocab_size=257 --num_processes=1")
    modules = Path("data/corpus.txt").read_bytes().split(b"<|endoftext|>")
    assert Path(json.__file__).read_bytes() in modules != sorted(modules)


def test_the_held_out_text_begins_after_a_document_and_never_inside_a_special_token(run):
    text = "x" * 930 + "a b" * 20 + " a b<e>" + "y " * 20 + "<e>"
    write("text.txt", text)
    assert "no more pairs" in run(f"{BPE} --special_tokens=<e>,a\\ b --vocab_size=1000000000000")
    assert "name a longer text with --val_data" in run.notes   # it has 41 ids
    training, validation = texts_of("data")
    assert training.endswith("<e>") and training + validation == text and validation[0] == "y"
    for mark in range(3):   # it falls into a special token, and no document that text follows ends near it
        training, validation = "x" * (925 + mark) + "a b" * 30, " y" * 9 + "<e>\n<e>"
        write("text.txt", training + validation)
        run(f"{BPE} --special_tokens=<e>,a\\ b")
        assert texts_of("data") == [training, validation]


def test_encoding_with_a_folders_own_tokenizer_keeps_its_files_and_only_temporary_files_go(run):
    table = os.stat("data/vocab.json").st_ino
    for name in ("train.bin.tmp_backup.txt", "vocab.json.tmpl", "train.bin.tmp"):
        write(f"data/{name}", "mine")
    write("text.txt", b"two \xff three<|end|>" * 900)
    assert "900 malformed places" in run("bpe.py --data=text.txt --tokenizer_dir=data --num_processes=1")
    assert os.stat("data/vocab.json").st_ino == table and "three" in texts_of("data")[1]
    assert listing("data") == TABLES | {".lock", "train.bin.tmp_backup.txt", "vocab.json.tmpl"}


def test_a_kill_before_any_rename_or_removal_never_leaves_ids_beside_another_vocabulary(run, monkeypatch):
    old = Path("text.txt").read_text()
    texts = old, old[::-1]
    write("new.txt", texts[1])
    states = []   # copies of the folder, as a kill would leave it

    def noting(real):
        def call(*words, **more):
            states.append(shutil.copytree("data", f"state{len(states)}"))
            return real(*words, **more)
        return call
    for place, name in (os, "replace"), (Path, "unlink"):
        monkeypatch.setattr(place, name, noting(getattr(place, name)))
    run(f"{BPE} --data=new.txt")
    whole = [folder for folder in [*states, "data"] if "vocab.json" in listing(folder)]
    assert 1 < len(whole) < len(states)
    for folder in whole:
        training, validation = texts_of(folder)
        assert any(training in text and validation in text for text in texts)
    assert training in texts[1] and listing("data") == TABLES | {".lock"}


def test_a_text_of_special_tokens_only_and_one_of_a_megabyte_without_white_space():
    assert train_bpe(write("text", END * 9), 300, [END], 1)[1] == []
    text = random.Random(2).randbytes(500_000).hex()
    tokenizer = Tokenizer(*train_bpe(write("text", text), 300, [], 1))
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ------------------------------------------------------------------------------------------------------------- model.py

def small_model(**changes):
    torch.manual_seed(0)
    return TransformerLM(**{**dict(vocab_size=50, context_length=16, num_layers=2, d_model=32, num_heads=4, d_ff=64),
                            **changes})


IDS = torch.tensor([[1, 1, 8], [0, 1, 3]])
MASK = torch.eye(4, 3) == 0


def with_weights(layer):
    """The layer as a function of its input and then its weights."""
    return lambda x, *weights: torch.func.functional_call(layer, dict(zip(dict(layer.named_parameters()), weights)), x)


def turned(x, theta=100.0, halves=False):
    """RoPE at the positions 0, 1, 2, ... with the pairs (2k, 2k + 1) taken apart; or, as in Llama, (k, k + d_k / 2)."""
    a, b = x.chunk(2, -1) if halves else (x[..., 0::2], x[..., 1::2])
    angles = torch.arange(x.size(-2))[:, None] * theta ** (-torch.arange(0, 1, 2 / x.size(-1)))
    pairs = torch.view_as_real(torch.complex(a, b) * (1j * angles).exp())   # (..., d_k / 2, 2)
    return (pairs.mT if halves else pairs).flatten(-2)


# name: ours, the definition or torch's own, shapes of the inputs
BLOCKS = {
    "Linear": (with_weights(m.Linear(5, 7)), F.linear, (2, 3, 5), (7, 5)),
    "Embedding": (lambda w: with_weights(m.Embedding(9, 4))(IDS, w), lambda w: w[IDS], (9, 4)),
    "RMSNorm": (with_weights(m.RMSNorm(6, 0.1)), lambda x, w: F.rms_norm(x, (6,), w, 0.1), (2, 3, 6), (6,)),
    "SwiGLU": (with_weights(m.SwiGLU(8, 20)), lambda x, w1, w2, w3: (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T,
               (3, 8), (20, 8), (8, 20), (20, 8)),
    "ungated": (with_weights(m.SwiGLU(8, 20, gated=False)), lambda x, w1, w2: F.silu(x @ w1.T) @ w2.T,
                (3, 8), (20, 8), (8, 20)),
    "RoPE": (lambda x: m.RotaryPositionalEmbedding(100.0, 8, 5)(x, torch.arange(3).expand(2, 3)), turned,
             (2, 3, 8)),
    "softmax": (lambda x: m.softmax(x, 0), lambda x: x.softmax(0), (3, 4)),
    "attention under a mask": (lambda *qkv: m.scaled_dot_product_attention(*qkv, MASK),
                               lambda *qkv: F.scaled_dot_product_attention(*qkv, MASK), (4, 6), (3, 6), (3, 7)),
    **{f"attention in blocks, {T}": (m.causal_attention_in_blocks,
                                     lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True),
                                     *[(2, 3, T, 4)] * 3) for T in (1, 2, 3, 4, 5, 7, 64, 129)},
    "cross-entropy": (lambda x: cross_entropy(x, IDS), lambda x: F.cross_entropy(x.mT, IDS), (2, 3, 9))}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_definition_and_so_are_its_gradients(name):
    ours, theirs, *shapes = BLOCKS[name]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ours, theirs = ours(*inputs).double(), theirs(*inputs)
    same(ours, theirs, 1e-5)
    direction = torch.randn_like(theirs)
    same(torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), 1e-5)


def test_blocks_survive_extremes():
    huge = torch.full((1, 6), 300.0, dtype=torch.float16)   # its square overflows float16
    same(m.RMSNorm(6)(huge), torch.ones_like(huge))
    assert m.softmax(torch.tensor([1e30, -1e30, 1e30, -math.inf]), 0).tolist() == [0.5, 0, 0.5, 0]
    assert cross_entropy(torch.tensor([1e4, 0, -1e30]), torch.tensor(1)).item() == 1e4


NAMES = """token_embeddings ln_final lm_head layers.N.ln1 layers.N.ln2 layers.N.ffn.w1 layers.N.ffn.w2 layers.N.ffn.w3
           layers.N.attn.q_proj layers.N.attn.k_proj layers.N.attn.v_proj layers.N.attn.output_proj""".split()


def test_a_model_is_its_blocks_before_or_after_norms_under_the_handouts_names():
    nothing, norm = lambda x: x, lambda x: F.rms_norm(x, (32,), eps=1e-5)
    for changes, missing, before, after, last in [
            (dict(), "none", norm, nothing, norm), (dict(post_norm=True), "none", nothing, norm, norm),
            (dict(rms_norm=False), "ln", nothing, nothing, nothing), (dict(rope=False), "none", norm, nothing, norm)]:
        model = small_model(**changes)
        assert {*model.state_dict()} == {
            f"{name}.weight".replace("N", i) for name in NAMES for i in "01" if missing not in name}
        x = model.token_embeddings(IDS)
        for layer in model.layers:
            assert bool(layer.attn.rope) == ("rope" not in changes)
            x = after(x + layer.attn(before(x), torch.tensor([7, 8, 9])))   # only distances of positions matter
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


def test_the_usual_d_ff_is_a_multiple_of_64_near_8_3_d_model_or_4_d_model_without_the_gate():
    for d_model, gated, d_ff in (512, True, 1344), (8, True, 64), (32, False, 128):
        model = small_model(d_model=d_model, d_ff=0, swiglu=gated)
        assert len(model.layers[0].ffn.w1.weight) == d_ff


@pytest.mark.parametrize("changes", ABLATIONS)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_context_so_no_position_sees_a_later_one(changes):
    model, ids = small_model(**changes), torch.randint(50, (1, 16))
    whole, cache, seen = model(ids), model.new_cache(), 0
    for step in (5, 1, 1, 3, 6):   # a prompt, single tokens, and several at once
        seen += step
        same(model(ids[:, seen - step:seen], cache), whole[:, seen - 1:seen], 1e-5)
    with pytest.raises(ValueError, match="17 tokens do not fit into the context of 16"):
        model(ids[:, :1], cache)


def test_compiled_gradients_are_the_eager_ones_at_a_real_shape():
    """torch 2.13 compiled the gradient of the maximum in a masked softmax into NaN on the CPU,
    at shapes of this size only, with a good loss.
    """
    model, ids = TransformerLM(2000, 256, 1, 256, 8), torch.randint(2000, (4, 257))

    def gradients():
        with torch.autocast("cpu"):   # in bfloat16
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        return torch.autograd.grad(loss, [*model.parameters()])
    eager = gradients()
    torch.set_num_threads(2)   # as users compile it
    model.compile_parts()
    compiled = gradients()
    assert torch.equal(gradients()[0], compiled[0])   # the embedding's: its sums have an order that does not change
    torch.set_num_threads(1)
    assert all((a - b).norm() < 0.02 * a.norm() for a, b in zip(eager, compiled))   # NaN is not
    assert not all(map(torch.equal, eager, compiled))   # equal to the last bit: nothing was compiled


@pytest.mark.parametrize("gated, tied", [(True, False), (False, False), (True, True)])
def test_the_accounting_counts_what_a_real_model_has_and_does(gated, tied, monkeypatch):
    # The handout counts attention over all T x T scores: the plain definition, not the form that leaves out most of
    # those above the diagonal.
    monkeypatch.setattr(m, "causal_attention_in_blocks", m.causal_attention)
    shape = 61, 32, 3, 48, 4, 80
    model = TransformerLM(*shape, swiglu=gated, tie_embeddings=tied)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(61, (1, 32)))
    assert m.forward_flops(*shape, gated).total() == counter.get_total_flops()
    parts = {"token embeddings": "embeddings", "projections": "_proj", "FFN": "ffn", "RMSNorm": "ln",
             "LM head": "lm_head"}
    assert m.parameters(*shape, gated, tied) == {
        part: sum(p.numel() for name, p in model.named_parameters() if mark in name) for part, mark in parts.items()}


ANSWERS = """
total                     2,127,057,600    100.0%      8.51 GB
total                                                                         4,513.34   100.0%
small  gated    1,024     190,460,160    151,862,784  0.3496   16.6%      11.1%  49.8%   22.6%
medium gated    1,024     505,629,696    454,166,528   1.033   20.0%      10.0%  59.9%   10.2%
large  gated    1,024   1,072,469,760  1,008,140,800   2.258   21.4%       8.6%  64.2%    5.8%
XL     gated    1,024   2,127,057,600  2,046,646,400   4.513   22.3%       7.1%  66.9%    3.6%
XL     gated   16,384   2,127,057,600  2,046,646,400   149.5   10.8%      55.2%  32.3%    1.8%
sixteen times the context:  33.1 x
XL     ungated  1,024   1,635,537,600  1,555,126,400   3.507   28.7%       9.2%  57.4%    4.7%
XL     ungated 16,384   1,635,537,600  1,555,126,400   133.4   12.1%      61.8%  24.1%    2.0%
two moments 8               26.17 GB
15.52 GB for B = 1
in 80 GB: 3
400,000 steps at 9.75 TFLOP/s: 5,115 days
"""


def test_model_py_prints_the_handouts_answers_on_100_columns_and_accounts_for_any_shape_at_once(run):
    out = run("model.py")
    assert max(map(len, out.splitlines())) < 100
    assert not [words for words in ANSWERS.strip().splitlines() if words not in out]
    # every layer of the default shape has 4 D^2 + 3 D F + 2 D parameters
    assert f" {2 * 10000 * 512 + 512 + 10**8 * 3_113_984:,} " in run("model.py --num_layers=100000000")


# ------------------------------------------------------------------------------------------------------------- train.py

def rows(out="out"):
    with open(Path(out, "log.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def validation_losses(out="out"):
    """{step: validation loss} of a run's log."""
    return {int(row["step"]): float(row["val_loss"]) for row in rows(out) if row["val_loss"]}


def weights(out="out", name="ckpt.pt"):
    return read_checkpoint(Path(out, name))["model"]


def same_weights(one, other, tolerance=0):
    """Two runs ended with the same weights, and the same best ones."""
    for name in "ckpt.pt", "best.pt":
        same(weights(one, name), weights(other, name), tolerance)


def same_runs(one, other):
    """Two runs logged the same figures, times aside, and ended with the same weights."""
    timeless = [[{**row, "seconds": "", "tokens_per_second": ""} for row in rows(out)] for out in (one, other)]
    assert timeless[0] == timeless[1]
    same_weights(one, other)


def small_trainee(rule=AdamW, **inside):
    """A model and its optimiser; inside: more options for the matrices in its blocks."""
    model = small_model(d_model=16, d_ff=0)
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1 or len(p) == 50]   # gains, embeddings and head
    groups = [dict(params=matrices, weight_decay=0.3, **inside), dict(params=rest)]
    return model, rule(groups, 1e-2, (0.8, 0.95), 1e-6, 0.1)


def step_once(model, rule, seed=1):
    """One step on a random batch; its loss."""
    batch = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(seed))
    rule.zero_grad()
    loss = model.loss(batch[:, :-1], batch[:, 1:])
    loss.backward()
    rule.step()
    return loss.item()


def test_a_batch_holds_contexts_from_every_place_and_the_same_shifted_by_one_by_seed_and_step_alone():
    def draw(*seed_and_step):
        return get_batch(np.arange(20, dtype=np.uint16), 2000, 10, "cpu", train.generator_of_step(*seed_and_step))
    inputs, targets = draw(7, 11)
    assert {*inputs[:, 0].tolist()} == {*range(10)} and inputs.dtype == torch.int64
    assert torch.equal(inputs + 1, targets) and torch.equal(inputs, inputs[:, :1] + torch.arange(10))
    assert [torch.equal(inputs, draw(*other)[0]) for other in ((7, 11), (7, 12), (8, 11))] == [True, False, False]


def test_large_token_files_are_read_through_in_parts():
    content = b"\1\0\3\0" * 2_097_157   # 2 ** 21 + 5 pairs
    assert tokens_in(content, 4)[1] == zlib.crc32(content)


def test_the_schedule_warms_up_linearly_and_falls_along_a_cosine():
    rates = [train.get_lr_cosine_schedule(it, 1.0, 0.1, 7, 21) for it in range(25)]
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 14)) for i in range(14)]
    assert rates == pytest.approx([*(i / 7 for i in range(7)), *cosine, *[0.1] * 4])
    assert train.get_lr_cosine_schedule(0, 1.0, 0.1, 0, 10) == 1


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_clipping_is_torchs_and_returns_the_norm_before(limit):
    results = []
    for clip in train.gradient_clipping, torch.nn.utils.clip_grad_norm_:
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (12, 5, 2)]
        for p in parameters[:2]:   # the third has no gradient
            p.grad = torch.linspace(-1, 2, len(p))
        results.append([clip(parameters, limit), *(p.grad for p in parameters[:2])])
    same(*results)


@pytest.mark.parametrize("lr", [1e1, 1e2, 1e3])
def test_sgd_decays_slowly_at_10_fast_at_100_and_diverges_at_1000(lr):
    w, losses = torch.nn.Parameter(5 * torch.randn(10, 10)), []
    rule = SGD([w], lr=lr)
    for _ in range(10):
        losses.append((w ** 2).mean())
        w.grad, = torch.autograd.grad(losses[-1], w)
        rule.step()
    print(f"\nlr {lr:g}:", *(f"{loss:.3g}" for loss in losses))   # for README.md: python -m pytest -q -s -k sgd
    # the gradient is w / 50, so step t multiplies w by 1 - lr / sqrt(t) / 50
    factor = math.prod(1 - lr / math.sqrt(t) / 50 for t in range(1, 10))
    same(losses[-1], losses[0] * factor ** 2, 1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_is_torchs_adamw(fused):
    (mine, rule), (peer, template) = small_trainee(), small_trainee()
    torchs, rule.fused = torch.optim.AdamW(template.param_groups), fused
    for step in range(20):
        for model, one in (mine, rule), (peer, torchs):
            one.param_groups[0]["lr"] = 1e-2 / (step + 1)
            step_once(model, one, step)
    same([*mine.parameters()], [*peer.parameters()], 1e-4)


def test_orthogonalise_brings_every_singular_value_near_one_and_keeps_the_directions():
    for shape in (2, 20, 48), (48, 20):
        matrices = torch.randn(shape).double()   # U S V^T
        ours = train.orthogonalise(matrices, torch.float64)
        assert (torch.linalg.svdvals(ours) - 1).abs().max() < 0.25
        product = ours @ matrices.mT   # symmetric, as U S U^T is
        same(product, product.mT)


@pytest.mark.parametrize("kind, inside", [(AdamW, {}), (torch.optim.AdamW, {}), (Muon, dict(momentum=0.95))])
def test_a_model_learns_by_heart_and_a_checkpoint_brings_it_and_its_optimiser_back(kind, inside):
    model, rule = small_trainee(kind, **inside)
    losses, memory = [step_once(model, rule) for _ in range(60)], io.BytesIO()
    assert losses[-1] < 0.1 < losses[0]
    for place in Path("a.pt"), "b.pt", memory:
        save_checkpoint(model, rule, 17, place)
        memory.seek(0)
        other, other_rule = small_trainee(kind, **inside)
        assert load_checkpoint(place, other, other_rule) == 17
        same([other.state_dict(), other_rule.state_dict()], [model.state_dict(), rule.state_dict()], 0)
    assert listing() == {"a.pt", "b.pt"}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_that_is_damaged_is_refused_or_gives_the_same_tensors(run):
    good, rng, refused, saved = Path("out/ckpt.pt").read_bytes(), random.Random(0), 0, weights()
    for place in rng.choices(range(len(good)), k=200):
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        write("bad.pt", bytes(bad[:rng.choice([None, None, place])]))   # one bit is wrong, or it is cut
        try:
            same(read_checkpoint("bad.pt")["model"], saved, 0)
        except ValueError as refusal:
            assert "bad.pt is damaged" in str(refusal)
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("value, save", [
    ({"weights": torch.zeros(3)}, torch.save), (torch.zeros(3), torch.save), ({"model": Evil()}, torch.save),
    ({"model": {}}, torch.save), (Evil(), pickle.dump)])
def test_a_checkpoint_that_is_foreign_or_evil_is_refused_and_runs_nothing(value, save):
    with open("bad.pt", "wb") as file:
        save(value, file)
    with pytest.raises(ValueError, match="bad.pt "):
        load_checkpoint("bad.pt", None, None)
    assert listing() == {"bad.pt"}


def test_a_failed_write_leaves_the_older_checkpoint(run, monkeypatch):
    before = contents("out")
    monkeypatch.setattr(torch, "save", full_disk)
    assert re.search("out/.* was not written.*No space left", run("train.py --resume=True --steps=16", 1))
    after = contents("out")
    assert after.keys() == before.keys() and all(after[name] == before[name] for name in ("ckpt.pt", "best.pt"))


def test_a_run_leaves_a_folder_that_stands_alone_and_never_overwrites_one(run):
    before = Path("out/ckpt.pt").read_bytes()
    out = run(TRAIN)
    assert "it is in out.1" in out and Path("out.1/ckpt.pt").read_bytes() == before
    same_runs("out", "out.1")
    assert listing("out") == {".lock", *RESULTS}
    table, losses, config = rows()[-7:], validation_losses(), read_json("out/config.json")
    assert " ".join(row["step"] for row in table) == "1 2 4 6 8 10 12" and [*losses][-3:] == [4, 8, 12]
    assert all(int(row["tokens"]) == int(row["step"]) * 4 * 16 for row in table)
    tokens, tokenizer = np.fromfile("data/val.bin", "<u2"), Tokenizer.from_folder("out")
    size = len(tokenizer.decode(tokens.tolist())) / len(tokens)
    assert config["val_bytes_per_token"] == pytest.approx(size)
    groups = read_checkpoint("out/ckpt.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0, 0]   # not of gains and embeddings
    assert f"{losses[12] / math.log(2) / size:.4f} bits per byte" in out


def test_compare_shows_last_and_best_losses_and_draws_the_runs_that_a_pattern_names(run):
    import xml.etree.ElementTree as xml
    assert "warming up over 2" in run(f"{TRAIN} --seed=1 '--out_dir=out&<b>' --steps=20 --warmup_steps=11")
    before = Path("out/curves.svg").read_bytes()
    lines = run("train.py --compare=out*").splitlines()
    assert "--seed=1" in lines[0] and "d_model" not in lines[0]
    for line, name in zip(lines, ("out&<b>", "out")):   # as "&" comes before "/"
        size, losses = read_json(name, "config.json")["val_bytes_per_token"], [*validation_losses(name).values()]
        for loss in losses[-1], min(losses):
            assert all(text in line for text in (name, f"{loss:.4f}", f"{loss / math.log(2) / size:.4f}"))
    svg = xml.parse("out/compare.svg").getroot()
    assert {"out", "out&<b>", "optimiser steps", "wall-clock seconds"} <= {*svg.itertext()}
    points = [node.get("points") for node in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(points) == 8 and all(points) and "nan" not in str(points)
    assert Path("out/curves.svg").read_bytes() == before
    run(f"{TRAIN} --out_dir=early --lr=1e9 --warmup_steps=0", 1)   # diverges before its first evaluation
    assert re.search("early .*1000000000.0.*no evaluation yet", run("train.py --compare=*"))
    for row in "", "1,2", "1,2,3,1,1e400,,1,2", "1,2,3,1,5,nan,1,2", "1,2,3,1,,,1,2", "1,2,x,1,5,,1,2":
        write("early/log.csv", ",".join(rows()[0]) + "\n" + row)
        assert "early/log.csv" in run("train.py --compare=early", 1)


def test_a_run_resumes_with_its_own_constants_and_what_it_has_lost_is_restored(run):
    command, resume = f"{TRAIN} --lr=0.01 --optimizer=muon --out_dir", "train.py --resume=True --out_dir=new"
    for folder in "straight", "new":
        run(f"{command}={folder}")
    assert re.search("stands at step 12.*validation loss", run(resume), re.DOTALL)
    with open("new/log.csv", "a") as log:   # a killed run may have got beyond its last checkpoint
        log.write("14,896,1.0,0.001,5.0,,1.0,900.0\n16,10")
    out = run(f"{resume} --steps=16 --lr=0.01")
    assert "new schedule" in out and "step 16 of 16" in out and read_json("new/config.json")["steps"] == 16
    run(f"{command}=straight --resume=True --steps=16")
    same_runs("straight", "new")
    for name in "log.csv", "config.json", "vocab.json", "best.pt":
        Path("new", name).unlink()
    run(resume)
    assert listing("new") == {".lock", *RESULTS} and rows("new")[-1]["step"] == "16"
    shutil.copytree("data", "other")
    shutil.copyfile("data/train.bin", "other/val.bin")
    assert "other has other tokens" in run(f"{resume} --data_dir=other", 2)
    Path("new/ckpt.pt").unlink()   # nothing is left to resume, but best.pt is not overwritten
    assert "it is in new.1" in run(f"{command}=new --resume=True")


@posix
def test_a_run_killed_ten_times_ends_as_one_that_was_never_stopped(run):
    command = f"{TRAIN} --steps=150 --eval_interval=10 --log_interval=3 --optimizer=muon --resume=True --out_dir"
    straight, log = fork(f"{command}=straight"), Path("broken/log.csv")
    for kill in range(10):   # each time the run has got a bit further
        process = fork(f"{command}=broken")
        wait_until(lambda: log.exists() and log.read_text().count("\n") > 5 * kill + 1 or not process.is_alive())
        process.join(random.uniform(0, 0.05))
        process.kill()
        process.join()
    assert status_of(fork(f"{command}=broken"), straight) == [0, 0]
    same_runs("broken", "straight")
    assert not Path("broken.1").exists()


@posix
@pytest.mark.parametrize("end, status", [("SIGTERM", 143), ("SIGHUP", 129), ("a full disk", 1)])
def test_a_run_that_is_ended_early_saves_a_checkpoint_from_which_it_goes_on_exactly(run, monkeypatch, end, status):
    def interrupting(text, plain=sys.stdout.write):
        plain(text)
        if "step 14 of" in text:
            if end == "a full disk":
                full_disk()
            signal.raise_signal(getattr(signal, end))
    command = f"{TRAIN} --steps=40 --eval_interval=100 --log_interval=7 --out_dir"
    run(f"{command}=straight")
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", interrupting)
        run(f"{command}=broken", status)
    assert 14 <= read_checkpoint("broken/ckpt.pt")["iteration"] < 40 and "best.pt" not in listing("broken")
    run("train.py --resume=True --out_dir=broken")
    same_weights("broken", "straight")
    assert validation_losses("broken") == validation_losses("straight")


@posix
def test_a_run_whose_output_goes_to_a_closed_pipe_saves_a_checkpoint_and_ends_silently(run):
    os.mkfifo("1")   # its standard output
    process = fork(f"{TRAIN} --steps=1000000 --eval_interval=1000000 --out_dir=new")
    with open("1") as pipe:
        assert "parameters" in pipe.readline()
    assert status_of(process) == [1] and not Path("2").read_bytes() and weights("new")


@posix
def test_two_processes_do_what_one_does_and_so_do_two_that_share_the_model(run):
    command = f"{TRAIN} --optimizer=muon --resume=True"
    for steps in "--steps=6", "--steps=8":
        run(f"{command} {steps} --out_dir=one")
        for more in "two", "shared --shard=True":
            assert run_two(*[f"{command} {steps} --grad_accum=2 --out_dir={more}"] * 2) == [0, 0], Path("2").read_text()
    assert Path("1").read_text().count("validation loss") == 4
    for other in "two", "shared":
        same_weights(other, "one", 1e-4)
        for a, b in zip(rows("one"), rows(other), strict=True):
            for name in "train_loss", "grad_norm":
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)
    run("train.py --resume=True --out_dir=shared --shard=False --steps=9")


@posix
def test_an_error_in_several_processes_is_one_line(run):
    assert run_two(f"{TRAIN} --device=cpu:0", f"{TRAIN} --device=cpu:0")[0] == 2
    assert run_two(TRAIN, f"{TRAIN} --data_dir=nowhere")[1] == 1
    assert [line[:16] for line in Path("2").read_text().splitlines()] == ["train.py: --devi", "train.py: nowher"]


def test_divergence_is_said_and_keeps_the_last_good_checkpoint(run):
    assert "diverged" in run(f"{TRAIN} --steps=100 --lr=1e3 --eval_interval=1 --log_interval=4 --warmup_steps=50", 1)
    assert all(tensor.isfinite().all() for tensor in weights().values())
    assert all(math.isfinite(float(row["train_loss"] or 0)) for row in rows())


def test_a_timed_run_ends_within_its_time_at_the_smallest_rate_and_tells_what_is_left_by_the_pace_of_its_steps(
        run, monkeypatch):
    ticks = itertools.chain([0], itertools.count(1, 0.01))   # looking at the clock takes 10 ms, compiling a second
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    out = run(f"{TRAIN} --max_minutes=0.1 --eval_interval=1000000 --log_interval=5 --warmup_steps=1000000")
    assert 4 < next(ticks) < 6
    rates = {row["step"]: float(row["lr"]) for row in rows()}
    assert [*rates.values()][-1] < 1e-4 and rows()[-1]["val_loss"]
    shown = [int(total.replace(",", "")) for total in re.findall(r"step [\d,]+ of about ([\d,]+):", out)]
    assert len(shown) > 2 and shown[1] == pytest.approx(shown[-1], rel=0.2)
    assert int(re.search(r"warming up over (\d+)", out)[1]) == pytest.approx(shown[-1] / 10, rel=0.2)
    assert rates["10"] > 100 * rates["5"]   # decided after step 5


def test_a_run_that_over_fits_keeps_its_best_weights_and_says_so(run):
    write("data/train.bin", Path("data/train.bin").read_bytes()[:200])
    out = run(f"{TRAIN} --steps=60 --eval_interval=10 --lr=0.03")
    losses = validation_losses()
    step = min(losses, key=losses.get)
    assert losses[step] < losses[60] - 0.1
    assert float(rows()[-1]["train_loss"]) < 1   # the mean over the last steps, not over all
    assert f"validation loss {losses[60]:.4f} (best {losses[step]:.4f} at step {step}" in out
    for name, loss in ("best.pt", losses[step]), ("ckpt.pt", losses[60]):   # without a best.pt, ckpt.pt counts
        run(f"{TRAIN} --init_from=out --out_dir={name} --steps=1 --lr=1e-9 --min_lr=0")
        assert validation_losses(name)[1] == pytest.approx(loss, abs=1e-4)
        Path("out/best.pt").unlink(missing_ok=True)


def test_fine_tuning_begins_with_weights_shape_and_tokenizer_of_another_run(run):
    run(f"{TRAIN} --steps=40 --d_ff=48 --post_norm=True --out_dir=parent")
    command = ("train.py --device=cpu --dtype=float32 --compile=False --steps=4 --eval_interval=2 --eval_batches=2 "
               "--log_interval=1 --lr=1e-9 --min_lr=0 --init_from=parent")
    run(f"{command} --out_dir=child --context_length=8")
    config = train.load_run("child")[2]
    assert (config["d_ff"], config["post_norm"], config["context_length"]) == (48, True, 8)
    same(weights("child"), weights("parent", "best.pt"))
    assert "bfloat16" in run("train.py --out_dir=child --init_from=parent --resume=True --steps=6 --dtype=bfloat16")
    run("train.py --out_dir=child --init_from=nowhere --resume=True", 2)
    shutil.copytree("data", "other")
    tokenizer([(b"a", b"b")], [END], [b"ab"]).save("other")
    assert "bpe.py --tokenizer_dir=parent" in run(f"{command} --data_dir=other --out_dir=child", 2)
    run(f"{command} --out_dir=parent")   # which is moved aside
    assert Path("parent.1/best.pt").exists()


def test_broken_data_and_a_model_beyond_the_memory_are_refused_at_the_beginning(run):
    assert "allocate" in run(f"{TRAIN} --d_model=100000000000 --num_heads=10000000000", 1)
    os.truncate("data/val.bin", 101)
    assert "val.bin" in run(TRAIN, 1)
    Path("data/vocab.json").unlink()
    assert "not to its end" in run(TRAIN, 1)


@linux
def test_a_run_folder_whose_name_is_no_text_is_as_good_as_any(run):
    out = os.fsdecode(b"\xff out")
    run(f"{TRAIN} '--out_dir={out}'")
    run(f"train.py --resume=True '--out_dir={out}' --steps=16")
    assert "? out" in Path(out, "curves.svg").read_text() and rows(out)[-1]["step"] == "16"


# ------------------------------------------------------------------------------------------------------------ sample.py

@torch.no_grad()
def plain_logits(model, ids):
    """The logits after each of these ids (T, V), by the rule of generate, with the whole window computed every time."""
    window, logits = [], []
    for number in ids:
        if len(window) == model.context_length:
            window = window[(model.context_length + 1) // 2:]   # the older half goes
        window = [*window, number]
        logits.append(model(torch.tensor([window]))[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("switches", [
    *ABLATIONS, *(dict(context_length=length) for length in (1, 2, 3, 7, 64))], ids=str)
def test_greedy_text_and_the_score_of_a_text_follow_the_plain_rule_within_and_beyond_the_context(switches):
    model = small_model(vocab_size=61, d_ff=48, **switches)
    before = str(model)
    for length in 1, 3, 17:
        ids = torch.randint(61, (length,)).tolist()
        new = [*generate(model, ids, 20, temperature=0)]
        text = ids[-model.context_length:] + new   # of a prompt beyond the context, the end counts
        logits = plain_logits(model, text)[:-1]
        assert new == logits[-20:].argmax(-1).tolist()
        assert [*generate(model, ids, 20, temperature=0, num_samples=2)] == [[one, one] for one in new]
        nats = F.cross_entropy(logits, torch.tensor(text[1:]), reduction="none")
        same(np.hstack([*surprise(model, text)]).tolist(), nats.tolist(), 1e-5)
    model(torch.tensor([[1]])).sum().backward()   # still trainable: no tensor of inference mode has stayed in it
    assert str(model) == before


# flags, and the probabilities that they leave of 0.2, 0.5, 0.05 and 0.25
CANDIDATES = """
{"top_k": 9}                     0.2     0.5     0.05    0.25
{"top_k": 2}                     0       0.6667  0       0.3333
{"top_p": 0.4}                   0       1       0       0
{"top_p": 0.6}                   0       0.6667  0       0.3333     0.5 falls short, 0.75 reaches it
{"top_p": 1e-50}                 0       1       0       0
{"top_k": 2, "top_p": 0.6}       0       1       0       0          top-k first: 0.5 / 0.75 reaches it
{"temperature": 0.5}             0.1127  0.7042  0.0070  0.1761
{"temperature": 0}               0       1       0       0
{"temperature": 1e-300}          0       1       0       0
"""


@pytest.mark.parametrize("line", CANDIDATES.strip().splitlines())
def test_top_k_and_top_p_on_a_distribution_made_by_hand(line):
    limits, *expected = re.split("  +", line)[:5]
    probabilities, ids = candidates(torch.tensor([0.2, 0.5, 0.05, 0.25]).log(), **json.loads(limits))
    same(torch.zeros(4).scatter(0, ids, probabilities).tolist(), [*map(float, expected)], 1e-4)


def test_tokens_are_drawn_with_the_probabilities_of_the_model():
    model = small_model(vocab_size=5)
    drawn = torch.tensor(next(generate(model, [2], 1, num_samples=20_000, temperature=1.3)))
    expected = (model(torch.tensor([[2]]))[0, -1] / 1.3).softmax(-1)
    same(drawn.bincount(minlength=5) / 20_000, expected, 0.01)


def test_the_end_token_ends_a_text_and_fills_up_those_that_wait_and_begins_an_empty_one():
    model, texts = small_model(vocab_size=4), []
    for ids in [], [3]:
        torch.manual_seed(0)
        texts.append([*zip(*generate(model, ids, 200, end_id=3, num_samples=8))])
    ends = [(*text, 3).index(3) for text in texts[0]]
    assert texts[0] == texts[1] and len({*ends}) > 2
    assert all({*text[end:]} <= {3} for text, end in zip(texts[0], ends))
    assert max(ends) == len(texts[0][0])   # the row in which the last one ends is not yielded
    assert 3 not in [*generate(model, [0], 200, end_id=3)]


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
    nats, tokens, size = np.hstack([*surprise(model, ids)]).sum(), len(ids) - 1, len(text.encode())
    assert run(f"sample.py --score '{text}' --device=cpu") == (
        f"{nats / tokens:.4f} nats per token, {nats / tokens / math.log(2):.4f} bits per token, "
        f"{nats / math.log(2) / size:.4f} bits per byte, perplexity {math.exp(nats / tokens):.2f} "
        f"({tokens} tokens, {size} bytes)\n")


@posix
def test_a_closed_stream_is_an_empty_one_and_no_note_goes_into_standard_output(run):
    shell = f"'{sys.executable}' '{ROOT / 'sample.py'}' --prompt=- <&- 2>&-"
    done = subprocess.run(shell, shell=True, capture_output=True)
    assert not done.returncode and done.stdout and b"tokens/s" not in done.stdout and not done.stderr


def test_a_run_without_special_tokens_needs_a_prompt(run):
    run("bpe.py --data=text.txt --vocab_size=260 --special_tokens= --num_processes=1")
    run(TRAIN)
    assert "prompt" in run("sample.py", 2) and "end_id" not in run.notes
    run("sample.py --prompt=the --max_new_tokens=2")


LLAMA = """model.embed_tokens token_embeddings  model.layers layers  model.norm ln_final  input_layernorm ln1
           post_attention_layernorm ln2  self_attn attn  o_proj output_proj
           mlp.gate_proj ffn.w1  mlp.down_proj ffn.w2  mlp.up_proj ffn.w3""".split()
LLAMA_SHAPE = """vocab_size max_position_embeddings num_hidden_layers hidden_size num_attention_heads
                 intermediate_size""".split()


def exported_llama(folder):
    """The exported model: ours, but for the names and for RoPE, which turns the pairs (k, k + d_k / 2) in a Llama."""
    config, raw = read_json(folder, "config.json"), Path(folder, "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, end, state = json.loads(raw[8:start]), 0, {}
    assert header.pop("__metadata__") == {"format": "pt"} and start % 8 == 0
    for name, entry in header.items():   # all in float32, one after the other with no gap
        begin, end = end, end + 4 * math.prod(entry["shape"])
        assert entry["dtype"] == "F32" and entry["data_offsets"] == [begin, end]
        for theirs, ours in zip(LLAMA[::2], LLAMA[1::2]):
            name = name.replace(theirs, ours)
        state[name] = torch.tensor(np.frombuffer(raw[start + begin:start + end], "<f4").reshape(entry["shape"]))
    assert start + end == len(raw)
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["token_embeddings.weight"]
    model = TransformerLM(*(config[name] for name in LLAMA_SHAPE), rope=False)
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
    assert {**config, **words}.items() >= dict(
        architectures=["LlamaForCausalLM"], eos_token_id=end, tie_word_embeddings=tied,
        tokenizer_class="GPT2Tokenizer", bos_token=END, eos_token=END).items()
    assert words["added_tokens_decoder"][str(user)]["content"] == "<|user|>"
    assert Tokenizer.from_folder("new/llama").vocab == tokenizer.vocab and len(listing("new/llama")) == 5


def test_what_is_no_llama_or_finds_no_room_is_not_exported(run, monkeypatch):
    for flag in "post_norm=True", "rms_norm=False", "rope=False", "swiglu=False":
        run(f"{TRAIN} --{flag}")
        assert float(rows()[-7]["train_loss"]) > float(rows()[-1]["train_loss"])   # every ablation trains
        assert flag in run("sample.py --export=new", 2) and not Path("new").exists()
    Path("new").mkdir()
    before = contents()
    monkeypatch.setattr(os, "fsync", full_disk)
    assert "No space" in run("sample.py --out_dir=out.1 --export=new", 1) and contents() == before


def test_the_answers_to_the_questions_about_unicode():
    assert repr("a" + chr(0) + "b") == r"'a\x00b'"
    assert [len("hello, 你好".encode(f"utf-{bits}")) for bits in (8, 16, 32)] == [13, 20, 40]
    for raw in b"\xc3", b"\xa9", b"\xff\xff":   # the first two are é
        with pytest.raises(UnicodeDecodeError):
            raw.decode()


# ---------------------------------------------------------------------------------------------------- the hostile world

def members(session):
    """The living processes of a session (a process started with start_new_session, and all that came from it),
    by /proc.
    """
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            found.add(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A command line for nine megabytes of a few thousand words: enough for two worker processes."""
    path, rng = tmp_path_factory.mktemp("large") / "text.txt", random.Random(0)
    lines = [" ".join(f"{rng.randrange(3000) ** 4:x}" for _ in range(8)) + "<|endoftext|>\n" for _ in range(1000)]
    write(path, "".join(rng.choices(lines, k=80_000)))
    return f"bpe.py --data={path} --num_processes=2"


@linux
def test_sigkill_at_random_moments_leaves_whole_files_and_no_worker_and_the_next_run_clears_up(large):
    rng, made, begin = random.Random(1), [], time.monotonic()
    for size in "300", "900", "600":
        assert finish(f"{large} --vocab_size={size} --data_dir={size}")[0] == 0
        made.append(contents(size))
    seconds = (time.monotonic() - begin) / 3
    for size in "300", "900", "300", "900":
        process = start(f"{large} --vocab_size={size}", start_new_session=True)
        time.sleep(rng.uniform(0.2, 1) * seconds)
        process.kill()
        process.wait()   # workers that outlive it would hold its pipes open
        wait_until(lambda: not members(process.pid))
        assert all(content in [files[name] for files in made] for name, content in contents("data").items()
                   if not name.endswith(".tmp"))
    # with workers that are spawned, as on macOS and Windows, instead of forked
    write("sitecustomize.py", "import multiprocessing; multiprocessing.set_start_method('spawn')")
    done = finish(f"{large} --vocab_size=600", env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done[0] == 0 and contents("data") == made[2]


@linux
@pytest.mark.parametrize("end, told", [
    ("worker", "1 bpe.py: a worker process died.*\n"), ("parent", "130 bpe.py: interrupted\n"),
    ("group", "130 bpe.py: interrupted\n")])
def test_a_killed_worker_and_ctrl_c_end_the_command_with_one_line_and_without_orphans(made, large, end, told):
    for command in large, f"{large} --tokenizer_dir={made}/data":   # while it counts words, and while it encodes
        process = start(command, start_new_session=True)
        wait_until(lambda: len(members(process.pid)) == 3)
        if end == "worker":
            os.kill((members(process.pid) - {process.pid}).pop(), signal.SIGKILL)
        else:
            (os.kill if end == "parent" else os.killpg)(process.pid, signal.SIGINT)
        err = process.communicate(timeout=20)[1]
        assert re.fullmatch(told, f"{process.returncode} {err}")
        wait_until(lambda: not members(process.pid))
        assert listing("data") == {".lock"}


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
    limit = resource.RLIMIT_FSIZE, (100_000, 100_000)   # a write beyond this fails, as on a full disk
    status, _, err = finish(f"{BPE} --vocab_size=258", preexec_fn=lambda: resource.setrlimit(*limit))
    assert status == 1 and err.count("\n") == 1 and "train.bin" in err and "too large" in err
    assert contents("data") == before


@linux
def test_odd_names_a_c_locale_and_no_home_cost_nothing():
    folder = Path("a 'b\"\n\u00e9 %d{x}")
    write(folder / "t \\n.txt", "one two three \u4e2d\u56fd " * 3000)
    bare = {"LC_ALL": "C", "HOME": "/nonexistent", "PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    names = shlex.join([f"--data={folder / 't '}\\n.txt", f"--data_dir={folder}"])
    status, out, err = finish(f"bpe.py {names} --vocab_size=270 --special_tokens=\u4e2d\u56fd", env=bare)
    assert not status and not err and "??" in out   # the terminal lacks the characters, the files have them
    assert "\u4e2d\u56fd" in (folder / "vocab.json").read_text(encoding="utf-8")
