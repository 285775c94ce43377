"""
What the four scripts do, stated as facts and tried, in the order of the scripts: python -m pytest -q test_all.py

The plain versions of what is fast in the scripts stand here, and both are held against each other.
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
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import bpe
import model as m
import sample
import train
from bpe import Tokenizer, plain_encode, plain_train, plain_words, train_bpe
from model import (
    Embedding, Linear, MultiHeadSelfAttention, RMSNorm, RotaryPositionalEmbedding, SwiGLU, TransformerBlock,
    TransformerLM, causal_attention, causal_attention_in_blocks, cross_entropy, scaled_dot_product_attention, silu,
    softmax)
from sample import candidates, generate, print_streamed, streamed, surprise
from train import (
    AdamW, Muon, SGD, get_batch, get_lr_cosine_schedule, gradient_clipping, load_checkpoint, load_tokens, orthogonalise,
    read_checkpoint, save_checkpoint)

ROOT = Path(__file__).resolve().parent
END = "<|endoftext|>"


# --------------------------------------------------------------------------------------------------------------- bpe.py

SPACES = [chr(point) for point in range(0x3001) if regex.match(r"\s", chr(point))] + [
    "\x1c", "\x1f", "\u180e", "\u200b", "\ufeff"]
BITS = SPACES + [" "] * 20 + ["\n"] * 6 + ["\r\n", "\t", "  ", "    ", " \n"] + list("aaabbstdmlvre'''0123_-.,!") + [
    "'s", "'ll", "'ve", "don't", "they'll", "é", "\u0301", "中", "文字", "😀", "👩\u200d🔬", "½", "٣", "Ⅷ", "ß", "\0",
    "\x7f", "\ufffd", "\U0003ffff", "\U00040000", "\U0010ffff", "the", " the", "ing", "<|", "|>", END, "aab", "zq",
    "longer-than-fifteen", "abcdefghijklmnop", "0123456789abcdef" * 3]
SPECIALS = [END, "<|", "<|end", "aab", "a b", " z", "zq ", "q\nz", "b", "'s", "x<|", "…"]


def random_text(rng, bits=60):
    return "".join(rng.choice(BITS) for _ in range(rng.randrange(bits)))


def random_specials(rng):
    return rng.sample(SPECIALS, rng.randrange(5))


def in_bytes(tokens):
    return [token.encode() for token in tokens]


def counted(text, specials):
    """How often each word occurs, by the plain definition."""
    words = Counter(plain_words(text.encode(), bpe.special_pattern(in_bytes(specials))))
    return {word: count for word, count in words.items() if word not in in_bytes(specials)}


def plain_ids(text, tokenizer):
    """The ids of a text by the plain definitions."""
    ids, specials = {token: number for number, token in tokenizer.vocab.items()}, in_bytes(tokenizer.special_tokens)
    return [ids[token] for word in plain_words(text.encode(), bpe.special_pattern(specials))
            for token in ([word] if word in specials else plain_encode(word, tokenizer.merges))]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_examples_in_the_docstrings_of_bpe_py_are_true():
    assert doctest.testmod(bpe).failed == 0 < doctest.testmod(bpe).attempted


def test_the_handouts_examples(tmp_path):
    words = {b"low": 5, b" lower": 2, b" widest": 3, b" newest": 6}
    assert [left + right for left, right in plain_train(words, 6)] == [b"st", b"est", b"ow", b"low", b"west", b"ne"]
    assert plain_train({b"ab": 2, b"cd": 2}, 1) == [(b"c", b"d")]   # equally frequent: the greater pair
    vocab = dict(enumerate([*bpe.BYTES, b"th", b" c", b" a", b"the", b" at"]))
    merges = [(b"t", b"h"), (b" ", b"c"), (b" ", b"a"), (b"th", b"e"), (b" a", b"t")]
    assert Tokenizer(vocab, merges).encode("the cat ate") == [259, 257, ord("a"), ord("t"), 260, ord("e")]


def test_of_special_tokens_the_leftmost_match_wins_and_then_the_longest():
    tokenizer = Tokenizer(dict(enumerate(bpe.BYTES)), [], ["<|", "<|end", "x<|", "d|"])
    assert tokenizer.encode("<|end|x<|e") == [257, 124, 258, 101]


def test_every_code_point_has_the_kind_that_the_pattern_gives_it():
    every = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    found = bpe.kind_of_byte("".join(every).encode())[np.cumsum([0] + [len(char.encode()) for char in every[:-1]])]
    for kind, pattern in (bpe.SPACE, r"\s"), (bpe.LETTER, r"\p{L}"), (bpe.DIGIT, r"\p{N}"):
        wanted = set(regex.findall(pattern, "".join(every)))
        assert {char for char, k in zip(every, found.tolist()) if k == kind} == wanted


def test_fast_pretokens_are_the_plain_ones_and_no_cut_changes_one():
    rng = random.Random(0)
    for _ in range(5000):
        text, specials = random_text(rng).encode(), in_bytes(random_specials(rng))
        special = bpe.special_pattern(specials)
        words = plain_words(text, special)
        distinct, index = bpe.distinct_words(text, special)
        assert [distinct[i] for i in index] == words, (text, specials)
        for place in bpe.cut_pattern(specials).finditer(text):
            left, right = text[:place.start()], text[place.start():]
            assert plain_words(left, special) + plain_words(right, special) == words, (left, right, specials)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_training_equals_the_definition_for_any_number_of_processes(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(bpe, "BLOCK", 300)   # many ranges, so that their edges fall into everything
    monkeypatch.setattr(bpe, "SLICE", 40)
    rng = random.Random(processes)
    for _ in range(60 if processes == 1 else 4):
        text, specials, merges = random_text(rng, 400) + "a", random_specials(rng), rng.choice([0, 5, 50, 400])
        appended = [token for token in in_bytes(specials) if len(token) > 1]
        vocab, found = train_bpe(write(tmp_path / "text", text), 256 + merges + len(appended), specials, processes)
        assert found == plain_train(counted(text, specials), merges), (text, specials)
        assert [*vocab.values()] == [*bpe.BYTES, *(left + right for left, right in found), *appended]


def test_training_on_ties_repeats_and_counts_beyond_32_bits_equals_the_definition():
    rng = random.Random(3)
    for letters in ("a", "ab", "abc", "aé"):
        for _ in range(15):
            words = {"".join(rng.choices(letters, k=rng.randrange(1, 40))).encode(): rng.choice([1, 2, 3, 2 ** 33])
                     for _ in range(rng.randrange(9))}
            assert bpe.learn_merges(words, 200) == plain_train(words, 200)


def test_malformed_utf8_counts_as_replacement_characters_wherever_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "BLOCK", 16)
    rng = random.Random(4)
    pieces = [b"\xff", b"\xc3", b"\xa9", b"\xe4\xb8", b"\xf0\x9f\x98", b"\x80", b"\xed\xa0\x80", b" ", b" ", b"\n",
              b"ab", "é ".encode(), "\ufffd".encode()]
    for _ in range(100):
        raw = b"".join(rng.choice(pieces) for _ in range(rng.randrange(1, 60)))
        path, text = write(tmp_path / "text", raw), raw.decode(errors="replace")
        tokenizer = Tokenizer(*train_bpe(path, 300, [], 1))
        assert tokenizer.merges == plain_train(counted(text, []), 44)
        _, malformed = tokenizer.encode_part(path, 0, len(raw), tmp_path / "ids", 1)
        assert np.fromfile(tmp_path / "ids", "<u2").tolist() == tokenizer.encode(text)
        assert malformed == text.count("\ufffd") - raw.count("\ufffd".encode())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer trained on random text with special tokens."""
    rng = random.Random(5)
    path = write(tmp_path_factory.mktemp("trained") / "text", "".join(random_text(rng) for _ in range(300)))
    return Tokenizer(*train_bpe(path, 700, [END, "<|", "a b"]), [END, "<|", "a b"])


@pytest.mark.parametrize("sizes", [{}, dict(LONG=0), dict(TOGETHER=3, LONG=5), dict(CACHE=20, SLICE=50)])
def test_encoding_equals_the_definition_and_decodes_to_the_text(trained, monkeypatch, sizes):
    for name, size in sizes.items():
        monkeypatch.setattr(bpe, name, size)
    rng, tokenizer = random.Random(6), Tokenizer(trained.vocab, trained.merges, trained.special_tokens)
    words = ["".join(rng.choices(letters, k=length)) for length in (1, 2, 15, 17, 129, 400)
             for letters in ("a", "ab", "é中", "thesing")]
    for text in [random_text(rng) for _ in range(150)] + words:
        ids = plain_ids(text, tokenizer)
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
        assert tokenizer.encode_bytes(text.encode()).tolist() == ids   # the array code that long texts take
    assert (sum(len(word) + len(ids) for word, ids in tokenizer.cache.items()) < 3000) == ("CACHE" in sizes)


def test_random_unicode_survives_encoding_and_decoding(trained):
    rng, points = random.Random(7), [*range(0xD800), *range(0xE000, 0x110000)]
    for _ in range(3000):
        text = "".join(map(chr, rng.choices(points, k=rng.randrange(12))))
        assert trained.decode(trained.encode(text)) == text
    every = "".join(map(chr, points))
    assert trained.decode(trained.encode(every)) == every
    assert trained.encode("a\ud800b\udfff") == trained.encode("a\ufffdb\ufffd")   # lone surrogates


def test_encode_iterable_is_lazy_and_gives_the_ids_of_the_joined_text(trained):
    rng = random.Random(9)
    for size in (1, 7, 10_000):
        text = "".join(random_text(rng) for _ in range(2000))
        parts = [text[i:i + size] for i in range(0, len(text), size)]
        assert list(trained.encode_iterable(parts)) == trained.encode(text)
    for item in ("once upon a time\n" * 3000, "\n" + "x" * 20_000):   # in the second, the only cut is far from the end
        taken, given, behind = 0, 0, 0

        def items():
            nonlocal taken
            for taken in range(1, 21):
                yield item
        for number in trained.encode_iterable(items()):
            behind = max(behind, taken * len(item) - given)
            given += len(trained.vocab[number])
        assert given == 20 * len(item) and behind < 3 * len(item)


def test_encode_file_writes_the_ids_of_encode_for_any_number_of_processes(trained, tmp_path, monkeypatch):
    rng = random.Random(10)
    text = "".join(random_text(rng) for _ in range(1500))
    path = write(tmp_path / "text", text)
    monkeypatch.setattr(bpe, "BLOCK", 5000)
    for processes in (1, 2, 3):
        count = trained.encode_file(path, tmp_path / "ids.bin", processes)
        ids = np.fromfile(tmp_path / "ids.bin", "<u2")
        assert count == len(ids) and ids.tolist() == trained.encode(text)
    assert sorted(os.listdir(tmp_path)) == ["ids.bin", "text"]


def test_ids_are_uint16_up_to_65536_tokens_and_uint32_beyond(tmp_path):
    for size, dtype in ((65536, "<u2"), (65537, "<u4")):
        vocab = dict(enumerate(bpe.BYTES + [b"<%d>" % i for i in range(256, size)]))
        Tokenizer(vocab, [], [f"<{size - 1}>"]).encode_file(write(tmp_path / "text", f"a<{size - 1}>"), tmp_path / "ids")
        assert np.fromfile(tmp_path / "ids", dtype).tolist() == [97, size - 1]


def test_a_special_token_keeps_the_id_that_the_vocabulary_gives_it():
    vocab = dict(enumerate([b"<x>", *bpe.BYTES]))
    tokenizer = Tokenizer(vocab, [], ["<x>", "<y>"])
    assert tokenizer.encode("a<x><y>") == [98, 0, 257] and tokenizer.decode([0, 257]) == "<x><y>"
    assert Tokenizer(vocab, []).encode("<x>") == [61, 121, 63]   # special is what the caller names, nothing else


def test_saved_files_have_gpt2s_layout_and_load_again(trained, tmp_path):
    trained.save(tmp_path)
    table = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "#version: 0.2" and len(lines) == len(trained.merges) + 2
    assert (table["\u0120"] == 32 and table["\u010a"] == 10 and table["!"] == 33
            and table[END] == 256 + len(trained.merges) and table["a b"] > 256)
    (tmp_path / "merges.txt").write_text("\r\n".join(lines[1:]), encoding="utf-8")   # the version line may be absent
    for loaded in (Tokenizer.from_folder(tmp_path),
                   Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", [END, "<|", "a b"])):
        assert ((loaded.vocab, loaded.merges, loaded.special_tokens)
                == (trained.vocab, trained.merges, trained.special_tokens))


def test_decoding_replaces_malformed_bytes(trained):
    assert trained.decode([0xE4, 0xBD, 97]) == "\ufffda"


@pytest.mark.parametrize("call, message", [
    (lambda: Tokenizer(dict(enumerate(bpe.BYTES)), []).decode([999]), "none with id 999"),
    (lambda: bpe.special_pattern([b""]), "empty text"),
    (lambda: train_bpe(__file__, 256, [END]), "no room for 256 bytes and 1 special tokens"),
    (lambda: train_bpe(os.devnull, 300, []), "is empty"),
    (lambda: Tokenizer({0: b"a", 1: b"a"}, []), "all differ: 0 is missing"),
    (lambda: Tokenizer({1: b"a"}, []), "ids 0 to 0"),
    (lambda: Tokenizer({0: b"a"}, []), r"lacks b'\\x00'"),
    (lambda: Tokenizer(dict(enumerate(bpe.BYTES)), [(b"a", b"b")]), "lacks b'ab'"),
    (lambda: Tokenizer(dict(enumerate(bpe.BYTES)), [(b"a", b"bc")]), "b'a' and b'bc' is out of order"),
    (lambda: Tokenizer(dict(enumerate([*bpe.BYTES, b"ab"])), [(b"a", b"b")] * 2), "out of order"),
    # abcabc: does ab c come first, or abc ab?
    (lambda: Tokenizer({}, [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"abc", b"ab"), (b"ab", b"c")]),
     "b'ab' and b'c' is out of order"),
    (lambda: Tokenizer(dict(enumerate([*bpe.BYTES, b" t"])), [(b" ", b"t")], ["\u0120t"]).file_contents(),
     "choose another")])
def test_what_would_be_ambiguous_or_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("vocab, merges, message", [
    ("{", "", "no JSON object"), ("[1]", "", "no JSON object"), ('{"a": 1.5}', "", "no JSON object"),
    ('{"a": [1]}', "", "no JSON object"), (None, b"\xff", "no text"), ('{"a": 0, "a": 1}', "", "all differ"),
    (None, "a b c\n", "'a b c' is not two tokens"), (None, "a\n", "'a' is not two tokens"),
    (None, "a \u3000\n", "is not two tokens"), (None, "abc d\n", "out of order")])
def test_broken_tokenizer_files_are_refused_by_name(tmp_path, vocab, merges, message):
    Tokenizer(dict(enumerate(bpe.BYTES)), []).save(tmp_path)
    if vocab:
        write(tmp_path / "vocab.json", vocab)
    write(tmp_path / "merges.txt", merges)
    with pytest.raises(ValueError, match="(?s)vocab.json|merges.txt") as error:
        Tokenizer.from_folder(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- bpe.py as a command

TABLES = ("vocab.json", "merges.txt", "train.bin", "val.bin")


def run_bpe(*words):
    """Run bpe.py with these flags, as its main program does, in this process; return the exit status."""
    saved = {name: value for name, value in vars(bpe).items() if name.islower()}
    bpe.__file__, arguments = str(ROOT / "bpe.py"), sys.argv
    sys.argv = ["bpe.py", "--num_processes=1", *map(str, words)]
    try:
        with bpe.one_line_errors():
            bpe.configure(vars(bpe))
            bpe.main()
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = arguments
        vars(bpe).update(saved)


def texts_of(folder):
    """The training and the validation text that the ids in a folder stand for."""
    tokenizer = Tokenizer.from_folder(folder)
    return [tokenizer.decode(np.fromfile(folder / name, "<u2").tolist()) for name in ("train.bin", "val.bin")]


def test_a_pattern_makes_a_document_of_each_file_in_an_order_that_is_shuffled_but_fixed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = [f"Note {i} is here.\n" for i in range(1000)]
    for i, text in enumerate(documents):
        folder = tmp_path / "notes" / str(i % 7)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{i}.md", text)
    (tmp_path / "notes" / "folder.md").mkdir()
    assert run_bpe("--data=notes/**/*.md", "--data_dir=notes", "--vocab_size=300", "--special_tokens=</s>,<a>") == 0
    corpus = (tmp_path / "notes" / "corpus.txt").read_text()
    assert corpus.endswith("</s>") and sorted(corpus.split("</s>")[:-1]) == sorted(documents)
    assert corpus.split("</s>")[:-1] not in (documents, sorted(documents))
    training, validation = texts_of(tmp_path / "notes")
    assert training + validation == corpus and training.endswith("</s>") and validation.startswith("Note")
    assert run_bpe("--data=notes/**", "--data_dir=notes", "--vocab_size=300", "--special_tokens=") == 0
    assert "corpus.txt" in capsys.readouterr().err and not (tmp_path / "notes" / "corpus.txt.tmp").exists()
    assert (tmp_path / "notes" / "corpus.txt").read_text().count("\n\n") == 1000   # joined by a newline


def test_files_that_vanish_cannot_be_read_or_are_not_utf8(tmp_path, capsys, monkeypatch):
    for name in "abc":
        write(tmp_path / f"{name}.txt", f"the text of {name} ".encode() * 300 + b"\xff")

    def failing(error):
        def opened(path, *how):
            if str(path).endswith("b.txt"):
                raise error(2, "gone", str(path))
            return io.open(path, *how)
        return opened
    words = f"--data={tmp_path}/*.txt", f"--data_dir={tmp_path / 'data'}", "--vocab_size=260"
    monkeypatch.setattr(bpe, "open", failing(FileNotFoundError), raising=False)
    assert run_bpe(*words) == 0
    out, err = capsys.readouterr()
    assert "2 malformed places" in out and err.count("\n") == 1 and "b.txt was removed" in err
    before = (tmp_path / "data" / "corpus.txt").read_bytes()
    monkeypatch.setattr(bpe, "open", failing(PermissionError), raising=False)
    assert run_bpe(*words) == 1 and "b.txt" in capsys.readouterr().err
    assert (tmp_path / "data" / "corpus.txt").read_bytes() == before


def test_the_default_corpus_is_the_standard_library_and_its_order_is_fixed(tmp_path):
    assert run_bpe(f"--data_dir={tmp_path}", "--vocab_size=257") == 0
    modules = (tmp_path / "corpus.txt").read_bytes().split(END.encode())
    assert Path(heapq.__file__).read_bytes() in modules and modules != sorted(modules)
    assert not any(b"test_all" in module for module in modules)


def test_the_held_out_text_begins_after_a_document_and_never_inside_a_special_token(tmp_path, capsys):
    text = write(tmp_path / "text", "x" * 930 + "a b" * 20 + "<e>" + "y " * 20 + "<e>")
    words = f"--data={text}", f"--data_dir={tmp_path / 'd'}", "--vocab_size=260"
    assert run_bpe(*words, "--special_tokens=<e>,a b") == 0
    training, validation = texts_of(tmp_path / "d")
    assert training.endswith("<e>") and validation == "y " * 20 + "<e>" and training + validation == text.read_text()
    assert "name a longer text with --val_data" in capsys.readouterr().err   # it has 41 ids
    write(text, "x" * 925 + "a b" * 40)   # no document ends near the mark, which falls into a special token
    for mark in range(3):
        write(text, "x" * (925 + mark) + "a b" * 30 + " y" * 9)
        assert run_bpe(*words, "--special_tokens=a b") == 0
        assert sum(text_of.count("a b") for text_of in texts_of(tmp_path / "d")) == 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes made by fork")
def test_a_kill_before_any_rename_or_removal_never_leaves_ids_beside_another_vocabulary(tmp_path, monkeypatch):
    texts = [("old words, told of old. " * 200), ("new text in new letters! " * 200)]
    for name, text in zip("ab", texts):
        words = f"--data={write(tmp_path / name, text)}", "--vocab_size=270", "--special_tokens="
        assert run_bpe(*words, f"--data_dir={tmp_path / (name * 2)}") == 0
    calls, states, alive = 0, set(), False

    def killing(real):
        def call(*words, **more):
            nonlocal calls
            calls -= 1
            return os.kill(os.getpid(), signal.SIGKILL) if calls < 0 else real(*words, **more)
        return call
    for kill_at in range(30):
        folder = shutil.copytree(tmp_path / "aa", tmp_path / "folder", dirs_exist_ok=True)
        pid = os.fork()
        if not pid:
            calls, os.replace, Path.unlink = kill_at, killing(os.replace), killing(Path.unlink)
            os._exit(run_bpe(*words, f"--data_dir={folder}"))
        alive = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        whole = (folder / "vocab.json").exists()
        if whole:
            training, validation = texts_of(folder)
            assert any(training in text and validation in text for text in texts)
        states.add((whole, alive))
        if alive:
            break
    assert states == {(True, False), (False, False), (True, True)} and training in texts[1]
    assert {path.name for path in folder.iterdir()} == {*TABLES, ".lock"}   # the last run has cleared up


def test_encoding_with_a_folders_own_tokenizer_keeps_its_files(tmp_path):
    first, second = write(tmp_path / "a", f"one two{END}" * 900), write(tmp_path / "b", f"two three{END}" * 900)
    assert run_bpe(f"--data={first}", f"--data_dir={tmp_path / 'd'}", "--vocab_size=270") == 0
    stamp = os.stat(tmp_path / "d" / "vocab.json").st_ino
    assert run_bpe(f"--data={second}", f"--data_dir={tmp_path / 'd'}", f"--tokenizer_dir={tmp_path / 'd'}") == 0
    assert os.stat(tmp_path / "d" / "vocab.json").st_ino == stamp and "three" in texts_of(tmp_path / "d")[1]


def test_only_the_exact_temporary_names_are_removed(tmp_path):
    text = write(tmp_path / "text", "some words to learn " * 90)
    for name in ("train.bin.tmp_backup.txt", "vocab.json.tmpl", "merges.txt.tmp"):
        write(tmp_path / name, "mine")
    assert run_bpe(f"--data={text}", f"--data_dir={tmp_path}", "--vocab_size=260") == 0
    assert {path.name for path in tmp_path.iterdir()} == {*TABLES, ".lock", "text", "train.bin.tmp_backup.txt",
                                                          "vocab.json.tmpl"}


@pytest.mark.parametrize("words, status, complaint", [
    ("--vocab_size=256", 2, "--vocab_size=256: choose 257"), ("--vocab_size=1e3", 2, "a whole number"),
    ("--vocab_size=", 2, "a whole number"), ("--vocab_size=9223372036854775808", 2, "a whole number"),
    ("--num_processes=-1", 2, "--num_processes=-1"), ("--num_processes -1", 2, "--num_processes=-1"),
    ("--data_dir=", 2, "--data_dir"), ("--vocabsize=300", 2, "--vocabsize"), ("--vocab=300", 2, "--vocab"),
    ("--data", 2, "expected one argument"), ("stray", 2, "stray"),
    ("--data=nowhere.txt", 1, "no file has this name"), ("--data=.", 1, "no file has this name"),
    ("--data=*.none", 1, "'*.none'"), ("--val_data=nowhere.txt", 1, "--val_data"), ("--data=empty", 1, "is empty"),
    ("--tokenizer_dir=nowhere", 1, "nowhere"), ("--data=data/train.bin", 2, "would replace"),
    ("--data=link", 2, "would replace"), ("--special_tokens=|", 2, "reads like"),
    ("--special_tokens=\u0120the", 2, "reads like")])
def test_wrong_flags_and_files_of_bpe_py_are_refused_by_name(tmp_path, monkeypatch, capsys, words, status, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("text.txt", "data/train.bin"):
        write(tmp_path / name, "some words to learn " * 50)
    write(tmp_path / "empty", "")
    (tmp_path / "link").symlink_to("data/train.bin")
    assert run_bpe("--data=text.txt", *words.split()) == status
    err = capsys.readouterr().err
    assert complaint in err and err.count("\n") == 1 + err.startswith("usage:")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) in (["train.bin"], [".lock", "train.bin"])


def test_the_last_of_a_repeated_flag_wins_and_help_lists_all_with_their_comments(tmp_path, capsys):
    constants = {**vars(bpe), "__file__": str(ROOT / "bpe.py")}
    assert bpe.configure(constants, ["--vocab_size=3", "--vocab_size", "4", "--data", "-x"])["vocab_size"] == 4
    assert constants["data"] == "-x" and constants["vocab_size"] == 4
    with pytest.raises(SystemExit) as end:
        bpe.configure(constants, ["--help"])
    assert end.value.code == 0 and "worker processes; 0: one for each core" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- model.py: the building blocks

ABLATIONS = [dict(), dict(post_norm=True), dict(rms_norm=False), dict(rope=False), dict(swiglu=False),
             dict(tie_embeddings=True)]


def same(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def small_model(**changes):
    torch.manual_seed(0)
    return TransformerLM(**{**dict(vocab_size=50, context_length=16, num_layers=2, d_model=32, num_heads=4, d_ff=64),
                            **changes})


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


IDS = torch.tensor([[1, 1, 8], [0, 1, 3]])
MASK = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]]) == 1


def with_weights(layer):
    """The layer as a function of its input and then its weights."""
    return lambda x, *weights: torch.func.functional_call(layer, dict(zip(dict(layer.named_parameters()), weights)), x)


def turned(x):
    """RoPE at the positions 0, 1, 2, with the pairs taken apart."""
    angles = torch.arange(3)[:, None] * 100 ** (-torch.arange(0, 8, 2) / 8)
    a, b, cos, sin = x[..., 0::2], x[..., 1::2], angles.cos(), angles.sin()
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def triangle(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# name: ours, the definition or torch's own, shapes of the inputs
BLOCKS = {
    "Linear": (with_weights(Linear(5, 7)), F.linear, (2, 3, 5), (7, 5)),
    "Embedding": (lambda w: with_weights(Embedding(9, 4))(IDS, w), lambda w: w[IDS], (9, 4)),
    "RMSNorm": (with_weights(RMSNorm(6)), lambda x, w: F.rms_norm(x, (6,), w, 1e-5), (2, 3, 6), (6,)),
    "silu": (silu, F.silu, (3, 8)),
    "SwiGLU": (with_weights(SwiGLU(8, 20)), lambda x, w1, w2, w3: (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T,
               (3, 8), (20, 8), (8, 20), (20, 8)),
    "ungated": (with_weights(SwiGLU(8, 20, gated=False)), lambda x, w1, w2: F.silu(x @ w1.T) @ w2.T,
                (3, 8), (20, 8), (8, 20)),
    "RoPE": (lambda x: RotaryPositionalEmbedding(100.0, 8, 5)(x, torch.arange(3)), turned, (2, 3, 8)),
    "softmax": (lambda x: softmax(x, -1), lambda x: x.softmax(-1), (3, 4, 5)),
    "softmax along 0": (lambda x: softmax(x, 0), lambda x: x.softmax(0), (3, 4)),
    "attention": (scaled_dot_product_attention, F.scaled_dot_product_attention, (2, 4, 6), (2, 3, 6), (2, 3, 7)),
    "attention under a mask": (lambda *qkv: scaled_dot_product_attention(*qkv, MASK),
                               lambda *qkv: F.scaled_dot_product_attention(*qkv, MASK), (4, 6), (3, 6), (3, 7)),
    "the last queries": (lambda q, k, v: causal_attention(q[:, 5:], k, v), lambda *qkv: triangle(*qkv)[:, 5:],
                         *[(2, 9, 4)] * 3),
    **{f"attention in blocks, {T}": (causal_attention_in_blocks, triangle, *[(2, 3, T, 4)] * 3)
       for T in (1, 2, 3, 4, 5, 7, 64, 129)},
    "cross-entropy": (lambda x: cross_entropy(x, IDS),
                      lambda x: -x.log_softmax(-1).gather(-1, IDS[..., None]).mean(), (2, 3, 9)),
    "of one token": (lambda x: cross_entropy(x, IDS[0, 2]), lambda x: F.cross_entropy(x, IDS[0, 2]), (9,))}


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
    same(RMSNorm(6)(huge), torch.ones_like(huge))
    assert softmax(torch.tensor([1e30, -1e30, 1e30, float("-inf")]), 0).tolist() == [0.5, 0, 0.5, 0]
    for logits, target, loss in [([1e30, -1e30], 0, 0), ([1e4, 0.0], 1, 1e4), ([-1e4, 1e4], 0, 2e4)]:
        assert cross_entropy(torch.tensor(logits), torch.tensor(target)).item() == loss
    coarse = torch.full((50,), 3.0, dtype=torch.bfloat16)
    assert cross_entropy(coarse, torch.tensor(1)).item() == pytest.approx(math.log(50))


def test_multi_head_attention_takes_positions_that_only_matter_relatively():
    attention, x = MultiHeadSelfAttention(32, 4, RotaryPositionalEmbedding(10000.0, 8, 64)), torch.randn(2, 7, 32)
    first = torch.arange(7)
    same(attention(x), attention(x, first), 0)
    same(attention(x), attention(x, torch.stack([first + 20, first + 57])), 1e-5)
    assert (attention(x) - attention(x, first.flip(0))).abs().max() > 1e-3


def test_block_is_pre_norm_or_post_norm_or_without_norm():
    x, nothing, norm = torch.randn(2, 5, 32), lambda x: x, lambda x: F.rms_norm(x, (32,), eps=1e-5)
    for changes, before, after in [(dict(), norm, nothing), (dict(post_norm=True), nothing, norm),
                                   (dict(rms_norm=False), nothing, nothing)]:
        block = TransformerBlock(32, 4, 64, **changes)
        middle = after(x + block.attn(before(x)))
        same(block(x), after(middle + block.ffn(before(middle))), 1e-5)


def test_state_dict_has_the_handouts_names_and_nothing_else():
    parts = "attn.q_proj attn.k_proj attn.v_proj attn.output_proj ln1 ln2 ffn.w1 ffn.w2 ffn.w3".split()
    names = {"token_embeddings.weight", "ln_final.weight", "lm_head.weight",
             *(f"layers.{i}.{part}.weight" for i in range(2) for part in parts)}
    for changes, missing in [(dict(), "none"), (dict(swiglu=False), "w3"), (dict(rms_norm=False), "ln")]:
        assert set(small_model(**changes).state_dict()) == {name for name in names if missing not in name}


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
    assert [len(small_model(d_ff=0, swiglu=gated).layers[0].ffn.w1.weight) for gated in (True, False)] == [64, 128]


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_a_future_token_changes_no_earlier_logit(changes):
    model, ids = small_model(**changes), torch.randint(50, (2, 16))
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % 50
    before, after = model(ids), model(changed)
    assert before.shape == (2, 16, 50)
    same(after[:, :9], before[:, :9], 1e-6)
    assert ((after[:, 9:] - before[:, 9:]).abs().amax((0, 2)) > 1e-4).all()   # while every later one hears of it


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_every_ablation_trains(changes):
    model, ids = small_model(**changes), torch.randint(50, (4, 17))
    losses = []
    for _ in range(3):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        same(loss, cross_entropy(model(ids[:, :-1]), ids[:, 1:]))
        losses.append(loss.item())
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            assert g.isfinite().all() and g.abs().max() > 0
            p.data -= 0.05 * g
    assert losses[2] < losses[1] < losses[0]


def test_ablations_are_what_they_say():
    assert len({id(layer.attn.rope) for layer in small_model().layers}) == 1   # one table for all
    tied = small_model(tie_embeddings=True)
    assert tied.token_embeddings.weight is tied.lm_head.weight
    # without positions, the last token's logits cannot tell the order of those before it
    ids = torch.arange(6)[None]
    for rope in (False, True):
        model = small_model(rope=rope, num_layers=1)
        difference = (model(ids)[:, -1] - model(ids[:, [2, 0, 1, 4, 3, 5]])[:, -1]).abs().max()
        assert difference > 1e-3 if rope else difference < 1e-5


@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_context():
    model, ids = small_model(), torch.randint(50, (3, 16))
    whole, cache, seen = model(ids), model.new_cache(3), 0
    for step in (5, 1, 1, 3, 6):   # a prompt, single tokens, and several at once
        seen += step
        logits = model(ids[:, seen - step:seen], cache)
        assert logits.shape == (3, 1, 50)
        same(logits[:, 0], whole[:, seen - 1], 1e-5)
    with pytest.raises(ValueError, match="17 tokens do not fit into the context of 16"):
        model(ids[:, :1], cache)


@pytest.mark.parametrize("changes, words", [
    (dict(num_heads=5), "d_model=32 cannot be split into num_heads=5"), (dict(num_heads=32), "must be even"),
    (dict(d_model=30), "d_model=30 cannot be split into num_heads=4"), (dict(vocab_size=0), "vocab_size=0"),
    (dict(num_layers=-1), "num_layers=-1"), (dict(num_heads=0), "num_heads=0"), (dict(d_ff=-64), "d_ff=-64")])
def test_wrong_shapes_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        small_model(**changes)
    assert small_model(num_heads=32, rope=False)(IDS).shape == (2, 3, 50)   # an odd d_k without RoPE


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


# --------------------------------------------------------------------------------------------- model.py: the accounting

@pytest.mark.parametrize("switches", [{}, dict(swiglu=False), dict(tie_embeddings=True)], ids=str)
def test_the_accounting_counts_what_a_real_model_has_and_does(switches, monkeypatch):
    # The handout counts attention over all T x T scores: the plain definition, not the form that leaves out most of
    # those above the diagonal.
    monkeypatch.setattr(m, "causal_attention_in_blocks", causal_attention)
    shape = 61, 32, 3, 48, 4, 80   # without RoPE, which turns pairs: no matrix product by its definition
    model, gated, tied = TransformerLM(*shape, rope=False, **switches), "swiglu" not in switches, "tie" in str(switches)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(61, (1, 32)))
    assert m.forward_flops(*shape, gated).total() == counter.get_total_flops()
    assert m.training_flops(*shape, swiglu=gated) == 3 * counter.get_total_flops() / 32
    parts = {"token embeddings": "embeddings", "projections": "_proj", "FFN": "ffn", "RMSNorm": "ln",
             "LM head": "lm_head"}
    assert m.parameters(*shape, gated, tied) == {
        part: sum(p.numel() for name, p in model.named_parameters() if mark in name) for part, mark in parts.items()}


def test_model_py_prints_the_handouts_answers_on_100_columns():
    done = subprocess.run([sys.executable, ROOT / "model.py"], capture_output=True, text=True)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) < 100
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
        assert words in done.stdout, words


@pytest.mark.parametrize("flags, words", [
    ("--num_heads=5", "num_heads=5"), ("--num_layers=0", "num_layers=0"), ("--d_ff=-64", "d_ff=-64"),
    ("--vocab_size=-5", "vocab_size=-5"), ("--mfu=0", "--mfu=0"), ("--num_layers=100000000", "")])
def test_model_py_accounts_for_any_shape_at_once_or_refuses_it_by_name(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", flags])
    for name in ("num_heads", "num_layers", "d_ff", "vocab_size", "mfu"):
        monkeypatch.setattr(m, name, getattr(m, name))   # so that what configure sets is taken back
    with pytest.raises(bpe.UsageError, match=words) if words else nullcontext():
        m.main()
    out = capsys.readouterr().out
    # every layer of the default shape has 4 D^2 + 3 D F + 2 D parameters
    assert not out if words else f" {2 * 10000 * 512 + 512 + 10**8 * 3_113_984:,} " in out


# ------------------------------------------------------------------------------------------------------------- train.py

TINY = dict(context_length=16, num_layers=1, d_model=16, num_heads=2, batch_size=4, steps=12, eval_interval=4,
            eval_batches=2, log_interval=2, warmup_steps=2, device="cpu", dtype="float32", compile=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder as bpe.py writes it: 257 entries, a text of a few thousand bytes."""
    folder = tmp_path_factory.mktemp("data")
    Tokenizer({**{i: bytes([i]) for i in range(256)}, 256: END.encode()}, [], [END]).save(folder)
    text = b"".join(b"the %d of %d is %d. " % (i, i * i, i % 7) for i in range(600))
    for name, part in (("train.bin", text[:-2000]), ("val.bin", text[-2000:])):
        np.frombuffer(part, np.uint8).astype("<u2").tofile(folder / name)
    return folder


def flags(data, out, *words, **changes):
    return [f"--data_dir={data}", f"--out_dir={out}", *words,
            *(f"--{name}={value}" for name, value in {**TINY, **changes}.items())]


def run_train(*words):
    """Run train.py with these flags, as its main program does, in this process; return the exit status."""
    saved = {name: value for name, value in vars(train).items() if name.islower()}
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    arguments, sys.argv = sys.argv, ["train.py", *words]
    train.STARTED, train.__file__ = time.perf_counter(), str(ROOT / "train.py")
    try:
        with train.one_line_errors(), train.one_voice():
            train.main()
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = arguments
        vars(train).update(saved)
        for number, handler in handlers:
            signal.signal(number, handler)


FORKING = """
import os, random, signal, sys, time
import train
def start(*flags, **environment):
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment)
    sys.argv, status = ["train.py", *flags], 0
    try:
        with train.one_line_errors(), train.one_voice():
            train.main()
    except SystemExit as end:
        status = end.code
    os._exit(status)
def two(port, *flags, **more):
    return [start(*flags, *more.get(f"rank{rank}", ()), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                  MASTER_ADDR="localhost", MASTER_PORT=str(port)) for rank in range(2)]
def join(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def forking(code):
    """Run Python code with `start` (train.py in a process of its own, without the seconds of importing torch), `two`
    (two such processes, as torchrun starts them) and `join`; return the finished process.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", FORKING + code],
                          cwd=ROOT, text=True, capture_output=True, timeout=120, env=environment)


def rows(out):
    with open(Path(out) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_runs(one, other):
    """Whether two runs logged the same figures, times aside, and ended with the same weights."""
    timeless = lambda out: [{**row, "seconds": "", "tokens_per_second": ""} for row in rows(out)]
    return timeless(one) == timeless(other) and all(
        torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def weights(out, name="ckpt.pt"):
    return read_checkpoint(Path(out) / name)["model"]


def small_trainee(seed=0):
    torch.manual_seed(seed)
    return TransformerLM(50, 16, 2, 16, 2)


# ---- loader

def test_a_batch_holds_contexts_of_the_data_and_the_same_shifted_by_one():
    tokens = np.arange(1000, dtype=np.uint16)
    inputs, targets = get_batch(tokens, 64, 10, "cpu", torch.Generator().manual_seed(3))
    assert inputs.shape == targets.shape == (64, 10) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets) and torch.equal(inputs, inputs[:, :1] + torch.arange(10))
    again, _ = get_batch(tokens, 64, 10, "cpu", torch.Generator().manual_seed(3))
    assert torch.equal(inputs, again) and not torch.equal(inputs, get_batch(tokens, 64, 10, "cpu")[0])


def test_every_place_that_fits_is_drawn_and_no_other():
    starts = get_batch(np.arange(20), 2000, 10, "cpu", torch.Generator().manual_seed(0))[0][:, 0]
    assert set(starts.tolist()) == set(range(10))
    with pytest.raises(ValueError, match="10 tokens are too few"):
        get_batch(np.arange(10), 1, 10, "cpu")


def test_processes_read_their_rows_of_one_global_batch():
    tokens = np.random.default_rng(0).integers(0, 100, 500)
    draw = lambda part, seed=7, step=11: get_batch(tokens, 8, 5, "cpu", train.generator_of_step(seed, step), part)[0]
    everything = draw(slice(None))
    assert torch.equal(torch.cat([draw(slice(0, 3)), draw(slice(3, 8))]), everything)
    assert not torch.equal(draw(slice(None), step=12), everything) and not torch.equal(draw(slice(None), 8), everything)


@pytest.mark.parametrize("content, vocab_size, complaint", [
    (b"\0" * 41, 300, "41 bytes"), (np.full(50, 299, "<u2").tobytes(), 299, "token 299"),
    (b"\0" * 20, 300, "10 tokens"), (b"", 300, "0 tokens"),
    (np.full(50, 70_000, "<u4").tobytes(), 70_000, "token 70000"), (b"\0" * 42, 70_000, "42 bytes")])
def test_token_files_that_cannot_be_right_are_refused_by_name(tmp_path, content, vocab_size, complaint):
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as refusal:
        train.read_through(load_tokens(tmp_path / "t.bin", vocab_size, 10), np.ones(vocab_size, int))
    assert "t.bin" in str(refusal.value)


def test_token_files_are_uint16_up_to_65536_entries_and_uint32_beyond_and_read_through_in_parts(tmp_path):
    for kind, top, size in (("<u2", 65535, 65536), ("<u4", 65536, 65537)):
        content = np.array([1, top] * (2 ** 21 + 5), kind)
        content.tofile(tmp_path / "t.bin")
        tokens = load_tokens(tmp_path / "t.bin", size, 10)
        assert tokens[-1] == top and train.read_through(tokens, np.arange(size)) == (zlib.crc32(content), (1 + top) / 2)


# ---- optimisation

def test_the_schedule_warms_up_linearly_and_falls_along_a_cosine():
    rates = [get_lr_cosine_schedule(it, 1.0, 0.1, 7, 21) for it in range(25)]
    assert (rates[:8] == pytest.approx([i / 7 for i in range(8)]) and rates[14] == pytest.approx(0.55)
            and rates[21:] == [0.1] * 4)
    assert rates[10] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 3 / 14)))
    assert get_lr_cosine_schedule(0, 1.0, 0.1, 0, 10) == 1.0 and get_lr_cosine_schedule(5, 1.0, 0.1, 5, 5) == 0.1


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_clipping_is_torchs_and_returns_the_norm_before(limit):
    results = []
    for clip in (gradient_clipping, torch.nn.utils.clip_grad_norm_):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (12, 5, 2)]
        for p in parameters[:2]:   # the third has no gradient
            p.grad = torch.randn_like(p)
        results.append([clip(parameters, limit), *(p.grad for p in parameters[:2])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("lr, ends", [(1e1, (0.5, 24.0)), (1e2, (0.0, 1e-9)), (1e3, (1e3, math.inf))])
def test_sgd_decays_slowly_at_10_fast_at_100_and_diverges_at_1000(lr, ends):
    torch.manual_seed(0)
    w, losses = torch.nn.Parameter(5 * torch.randn(10, 10)), []
    rule = SGD([w], lr=lr)
    for _ in range(10):
        loss = (w ** 2).mean()
        rule.zero_grad()
        loss.backward()
        rule.step()
        losses.append(loss.item())
    print(f"\nlr {lr:g}:", *(f"{loss:.3g}" for loss in losses))   # for README.md: python -m pytest -q -s -k sgd
    assert ends[0] <= losses[-1] <= ends[1]


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_is_torchs_adamw(fused):
    mine, peer = small_trainee(), small_trainee()
    groups = lambda model: [dict(params=[p for p in model.parameters() if p.dim() == 2], weight_decay=0.3),
                            dict(params=[p for p in model.parameters() if p.dim() == 1])]
    options = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    rules = AdamW(groups(mine), **options), torch.optim.AdamW(groups(peer), **options)
    rules[0].fused = fused
    for step in range(20):
        for model, rule in zip((mine, peer), rules):
            rule.param_groups[0]["lr"] = 1e-2 / (step + 1)
            step_once(model, rule, step)
    torch.testing.assert_close([*mine.parameters()], [*peer.parameters()], rtol=1e-4, atol=1e-6)


def step_once(model, rule, seed=1):
    """One step on a random batch; its loss."""
    batch = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(seed))
    rule.zero_grad()
    loss = model.loss(batch[:, :-1], batch[:, 1:])
    loss.backward()
    rule.step()
    return loss.item()


@pytest.mark.parametrize("rule, options", [(AdamW, dict(lr=-1)), (AdamW, dict(betas=(1.5, 0.9))), (AdamW, dict(eps=-1)),
                                           (AdamW, dict(weight_decay=-1)), (SGD, dict(lr=-1))])
def test_optimisers_refuse_values_out_of_range(rule, options):
    with pytest.raises(ValueError, match=r"-1|1\.5"):
        rule([torch.nn.Parameter(torch.zeros(1))], **options)


def test_orthogonalise_brings_every_singular_value_near_one_and_keeps_the_directions():
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (2, 20, 48), (48, 20)):
        u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        matrices = u * torch.logspace(-1, 1, min(shape[-2:])) @ v
        for dtype, most, aside in (torch.float64, 0.22, 1e-9), (torch.bfloat16, 0.25, 0.1):
            along = u.mT @ orthogonalise(matrices, dtype).double() @ v.mT
            values = along.diagonal(dim1=-2, dim2=-1)
            assert (values - 1).abs().max() < most and (along - torch.diag_embed(values)).abs().max() < aside
    one = torch.outer(torch.randn(30), torch.randn(40))   # its one singular value is the whole norm
    assert torch.linalg.matrix_norm(orthogonalise(one, torch.bfloat16).float()) < 1.3


def trainee_and_rule(name, monkeypatch, seed=0):
    monkeypatch.setattr(train, "optimizer", name)
    model = small_trainee(seed)
    return model, {"adamw": AdamW, "muon": Muon}[name](train.parameter_groups(model), 1e-2, (0.9, 0.95), 1e-8, 0.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_model_learns_one_batch_by_heart(monkeypatch, name):
    model, rule = trainee_and_rule(name, monkeypatch)
    assert [step_once(model, rule) for _ in range(60)][-1] < 0.05


# ---- checkpoints

@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_brings_back_model_and_optimiser_exactly(tmp_path, monkeypatch, name):
    model, rule = trainee_and_rule(name, monkeypatch)
    step_once(model, rule)
    memory = io.BytesIO()
    for out in (tmp_path / "a.pt", str(tmp_path / "b.pt"), memory):
        save_checkpoint(model, rule, 17, out)
    memory.seek(0)
    step_once(model, rule)
    for src in (tmp_path / "a.pt", str(tmp_path / "b.pt"), memory):
        other, other_rule = trainee_and_rule(name, monkeypatch, seed=5)
        assert load_checkpoint(src, other, other_rule) == 17
        step_once(other, other_rule)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert not list(tmp_path.glob("*.tmp"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_that_is_cut_or_flipped_is_refused_or_gives_the_same_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, rule = trainee_and_rule("muon", monkeypatch)
    save_checkpoint(model, rule, 1, "good.pt")
    good, bad, rng = Path("good.pt").read_bytes(), Path("bad.pt"), np.random.default_rng(0)
    for cut in rng.integers(0, len(good), 100):
        bad.write_bytes(good[:cut])
        with pytest.raises(ValueError, match="bad.pt is damaged"):
            read_checkpoint(bad)
    refused = 0
    for place in rng.integers(0, len(good), 300):
        bad.write_bytes(good[:place] + bytes([good[place] ^ 1 << int(rng.integers(8))]) + good[place + 1:])
        try:
            read = read_checkpoint(bad)["model"]
            assert all(torch.equal(tensor, read[name]) for name, tensor in model.state_dict().items())
        except ValueError as refusal:
            refused += "bad.pt is damaged" in str(refusal)
    assert refused > 200


def test_a_checkpoint_that_is_foreign_or_evil_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for foreign in ({"weights": torch.zeros(3)}, torch.zeros(3), {"model": Evil()}):
        torch.save(foreign, "bad.pt")
        with pytest.raises(ValueError, match="no checkpoint of train.py"):
            read_checkpoint("bad.pt")
    Path("bad.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="no checkpoint of train.py"):
        read_checkpoint("bad.pt")
    assert not Path("evil").exists()
    torch.save({"model": {}}, "bad.pt")
    with pytest.raises(ValueError, match="no optimiser state"):
        load_checkpoint("bad.pt", None, None)


def test_a_failed_write_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    model, rule = trainee_and_rule("adamw", monkeypatch)
    save_checkpoint(model, rule, 1, tmp_path / "c.pt")
    def full(saved, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="c.pt was not written.*No space left"):
        save_checkpoint(model, rule, 2, tmp_path / "c.pt")
    assert (read_checkpoint(tmp_path / "c.pt")["iteration"] == 1
            and [path.name for path in tmp_path.iterdir()] == ["c.pt"])


# ---- log and picture

def test_curves_are_svg_with_both_axes_and_the_names_of_the_runs(tmp_path):
    import xml.etree.ElementTree as xml
    steps = np.arange(1.0, 50)
    losses = {"a & <b>": 9 / steps, "c": 9 / steps + 1e9, "worse": steps, "\udcff": 9 / steps}
    validation = np.where(steps % 5, np.nan, 9 / steps)
    logs = {name: dict(step=steps, seconds=steps / 3, train_loss=loss, val_loss=validation)
            for name, loss in losses.items()}
    train.draw_curves(logs, tmp_path / "curves.svg")
    svg = xml.parse(tmp_path / "curves.svg").getroot()
    words = [node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a & <b>", "c", "worse", "?", "optimiser steps", "wall-clock seconds"} <= set(words)
    lines = [node.get("points").split() for node in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in lines] == [49, 9] * 8 and "nan" not in str(lines)


def test_ticks_are_round_numbers_within_the_range():
    assert train.round_ticks(0, 1000).tolist() == [0, 200, 400, 600, 800, 1000]
    assert train.round_ticks(1.71, 3.92).tolist() == pytest.approx([2, 2.5, 3, 3.5])


@pytest.mark.parametrize("row, number", [("1,2,3.0,1,5.5,,1,2", 1), ("1,2,3.0,1,5.5,4.5,1,2\n2,2", 1), ("1,2", 0),
                                         ("1,2,3,1,1e400,,1,2", None), ("1,2,3,1,5,nan,1,2", None),
                                         ("1,2,3,,5,,1,2", None), ("1,2,x,1,5,,1,2", None)])
def test_a_log_is_read_whole_but_for_a_row_that_was_cut_or_refused_by_name(tmp_path, capsys, row, number):
    log = tmp_path / "log.csv"
    log.write_text(",".join(train.COLUMNS) + "\n" + row)
    (tmp_path / "config.json").write_text("{}")
    if number is not None:
        assert len(train.read_log(log)["step"]) == number
    if number != 1:
        assert run_train(f"--compare={tmp_path}", f"--out_dir={tmp_path}") == 1
        assert str(log) in (error := capsys.readouterr().err) and error.count("\n") == 1


# ---- runs

def test_a_run_leaves_a_folder_that_stands_alone_and_never_overwrites_one(data, tmp_path, capsys):
    out, aside = tmp_path / "a run", tmp_path / "a run.1"
    assert run_train(*flags(data, out)) == 0
    assert {path.name for path in out.iterdir()} == {".lock", *train.RESULTS}
    table = rows(out)
    assert [row["step"] for row in table] == ["1", "2", "4", "6", "8", "10", "12"]
    assert [row["step"] for row in table if row["val_loss"]] == ["4", "8", "12"]
    assert all(int(row["tokens"]) == int(row["step"]) * 4 * 16 for row in table)
    assert float(table[0]["train_loss"]) == pytest.approx(math.log(257), abs=0.3)
    bits = f"{float(table[-1]['val_loss']) / math.log(2):.4f}"   # every token of this data is one byte
    assert float(bits) < 7.8 and f"{bits} bits per byte" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["warmup_steps"], config["val_bytes_per_token"]) == (2, 1)
    assert b"\r" not in (out / "log.csv").read_bytes()
    before = weights(out)
    assert run_train(*flags(data, out, seed=1)) == 0 and "it is in a run.1" in capsys.readouterr().out
    torch.testing.assert_close(weights(aside), before, rtol=0, atol=0)


def test_compare_shows_last_and_best_losses_of_the_runs_that_a_pattern_names(data, tmp_path, capsys):
    for seed in (1, 2):
        assert run_train(*flags(data, tmp_path / f"run{seed}", seed=seed)) == 0
    before = (tmp_path / "run1" / "curves.svg").read_bytes()
    capsys.readouterr()
    assert run_train(f"--compare={tmp_path}/run*", f"--out_dir={tmp_path / 'run1'}") == 0
    told = capsys.readouterr().out.splitlines()
    assert "seed" in told[0] and told[0].count("bits/byte") == 2
    for line, run in zip(told[1:3], ("run1", "run2")):
        losses = [float(row["val_loss"]) for row in rows(tmp_path / run) if row["val_loss"]]
        for loss in (losses[-1], min(losses)):   # a token of this data is a byte
            assert f"{loss:.4f}" in line and f"{loss / math.log(2):.4f}" in line
    assert "<svg" in (tmp_path / "run1" / "compare.svg").read_text()
    assert (tmp_path / "run1" / "curves.svg").read_bytes() == before
    assert run_train(f"--compare={tmp_path}/run1,nowhere*") == 2 and "'nowhere*' is no run" in capsys.readouterr().err


def test_a_run_resumes_with_its_own_constants_and_what_was_lost_is_restored(data, tmp_path, capsys):
    straight, out = tmp_path / "straight", tmp_path / "out"
    settings = dict(steps=8, lr=0.01, optimizer="muon")
    for folder in (straight, out):
        assert run_train(*flags(data, folder, **settings)) == 0
    resume = "--resume=True", f"--out_dir={out}"
    capsys.readouterr()
    assert run_train(*resume) == 0 and "all of its 8 steps" in capsys.readouterr().out
    for wrong in ("--lr=0.003", "--seed=1", "--d_model=32"):   # the first is the default, and still contradicts
        assert run_train(*resume, wrong) == 2 and wrong[2:].split("=")[0] in capsys.readouterr().err
    assert run_train(*resume, "--steps=16", "--log_interval=2", "--lr=0.01") == 0
    told = capsys.readouterr().out
    assert "new schedule" in told and "step 16 of 16" in told
    assert json.loads((out / "config.json").read_text())["steps"] == 16
    assert run_train(*flags(data, straight, "--resume=True", **{**settings, "steps": 16})) == 0
    assert same_runs(straight, out)


def test_what_a_run_has_lost_is_restored_as_far_as_possible(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_train(*flags(data, out)) == 0
    resume = "--resume=True", f"--out_dir={out}"
    for name in ("log.csv", "config.json", "vocab.json", "best.pt"):
        (out / name).unlink()
    assert run_train(*resume, "--steps=20") == 0
    assert "lost best.pt, log.csv, config.json, vocab.json" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {".lock", *train.RESULTS} and rows(out)[0]["step"] == "14"
    train.load_run(out)
    other = shutil.copytree(data, tmp_path / "other")
    shutil.copyfile(data / "train.bin", other / "val.bin")
    assert run_train(*resume, f"--data_dir={other}") == 2 and "val.bin is another file" in capsys.readouterr().err
    (out / "ckpt.pt").unlink()   # nothing is left to resume, but best.pt is not overwritten
    assert run_train(*resume) == 0 and "it is in out.1" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes made by fork")
def test_a_run_killed_ten_times_ends_as_one_that_was_never_stopped(data, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    settings = dict(steps=100, eval_interval=10, log_interval=3, optimizer="muon")
    done = forking(f"""
begin = time.perf_counter()
assert join(start(*{flags(data, straight, **settings)})) == 0
length, kills = time.perf_counter() - begin, 0
while kills < 10:
    run_train = start(*{flags(data, broken, "--resume=True", **settings)})
    time.sleep(random.Random(kills).uniform(0.1, 0.5) * length)
    os.kill(run_train, signal.SIGKILL)
    kills += join(run_train) == -signal.SIGKILL
assert join(start(*{flags(data, broken, "--resume=True", **settings)})) == 0
""")
    assert done.returncode == 0, done.stderr
    assert same_runs(broken, straight) and len(rows(straight)) == 41 and not (tmp_path / "broken.1").exists()
    assert all(torch.equal(tensor, weights(broken, "best.pt")[name])
               for name, tensor in weights(straight, "best.pt").items())


@pytest.mark.parametrize("end, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129),
                                         (OSError(28, "No space left on device"), 1)])
def test_a_run_that_is_ended_early_saves_a_checkpoint_from_which_it_goes_on_exactly(
        data, tmp_path, capsys, monkeypatch, end, status):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    settings = dict(steps=40, eval_interval=100, log_interval=7)
    assert run_train(*flags(data, straight, **settings)) == 0

    def interrupt(row, *more, plain=train.report):
        plain(row, *more)
        if row["step"] == 14 and not isinstance(end, OSError):
            os.kill(os.getpid(), end)
        elif row["step"] == 14:
            raise end
    with monkeypatch.context() as patch:
        patch.setattr(train, "report", interrupt)
        assert run_train(*flags(data, broken, **settings)) == status
    assert read_checkpoint(broken / "ckpt.pt")["iteration"] == 15
    told = capsys.readouterr()
    assert "Traceback" not in told.err and ("--resume=True" in told.out) == (status > 1)
    assert (broken / "curves.svg").exists() == (status > 1)
    assert run_train("--resume=True", f"--out_dir={broken}") == 0 and same_runs(broken, straight)


def test_a_run_whose_output_goes_to_a_closed_pipe_saves_a_checkpoint_and_ends_silently(data, tmp_path):
    process = start(*flags(data, tmp_path, steps=10 ** 6, eval_interval=10 ** 6), script="train.py")
    assert "parameters" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1 and not process.stderr.read() and weights(tmp_path)


def test_two_processes_do_what_one_does_and_so_do_two_that_share_the_model(data, tmp_path):
    settings = dict(optimizer="muon", grad_accum=2, steps=6)
    assert run_train(*flags(data, tmp_path / "one", **{**settings, "grad_accum": 1})) == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           f"--master_port={29600 + os.getpid() % 300}", "train.py",
                           *flags(data, tmp_path / "two", **settings)],
                          cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("validation loss") == 1, done.stderr
    done = forking(f"""
runs = two({29950 + os.getpid() % 30}, *{flags(data, tmp_path / "shared", "--shard=True", **settings)})
assert list(map(join, runs)) == [0, 0]
""")
    assert done.returncode == 0, done.stderr
    one = weights(tmp_path / "one")
    for other in (tmp_path / "two", tmp_path / "shared"):
        for name in ("ckpt.pt", "best.pt"):
            torch.testing.assert_close(weights(other, name), one, rtol=1e-3, atol=1e-5)
        for a, b in zip(rows(tmp_path / "one"), rows(other), strict=True):
            assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), abs=1e-4)
            assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)
    assert run_train("--resume=True", f"--out_dir={tmp_path / 'shared'}", "--shard=False", "--steps=8") == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
def test_an_error_in_several_processes_is_one_line(data, tmp_path):
    port, words = 29900 + os.getpid() % 30, ["--device=cpu", "--compile=False", f"--out_dir={tmp_path / 'out'}"]
    done = forking(f"""
print(*map(join, two({port}, "--lr=-1", *{words})))
first, second = two({port + 1}, *{words}, rank0=["--data_dir={data}"], rank1=["--data_dir=nowhere"])
print(join(second))
os.kill(first, signal.SIGKILL)
""")
    assert done.stdout == "2 1\n1\n" and [line[:16] for line in done.stderr.splitlines()] == [
        "train.py: --lr=-", "train.py: nowher"], done.stderr


def test_divergence_is_said_and_keeps_the_last_good_checkpoint(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_train(*flags(data, out, steps=100, lr=1e3, eval_interval=1, log_interval=4, warmup_steps=50)) == 1
    assert "diverged" in capsys.readouterr().err and rows(out)
    assert all(tensor.isfinite().all() for tensor in weights(out).values())
    assert all(math.isfinite(float(row["train_loss"])) for row in rows(out))


def test_a_timed_run_ends_within_its_time_at_the_smallest_rate_and_tells_what_is_left_by_the_pace_of_its_steps(
        data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "keep_freed_memory", lambda: time.sleep(1))   # a slow start, as compilation is
    begin = time.perf_counter()
    assert run_train(*flags(data, tmp_path / "out", max_minutes=0.1, eval_interval=10 ** 6, log_interval=5,
                            warmup_steps=10 ** 6)) == 0
    assert 3 < time.perf_counter() - begin < 6
    assert float(rows(tmp_path / "out")[-1]["lr"]) < 1e-4 and rows(tmp_path / "out")[-1]["val_loss"]
    told = capsys.readouterr().out
    shown = [int(total.replace(",", "")) for total in regex.findall(r"step [\d,]+ of about ([\d,]+):", told)]
    assert len(shown) > 2 and shown[-1] / 3 < shown[1] < shown[-1] * 3
    warmup = int(regex.search(r"warming up over (\d+)", told)[1])
    assert shown[-1] / 30 < warmup < shown[-1] / 3
    rates = {row["step"]: float(row["lr"]) for row in rows(tmp_path / "out")}
    assert rates["10"] > 100 * rates["5"]   # decided after step 5


def test_a_short_run_warms_up_over_its_first_tenth(data, tmp_path, capsys):
    assert run_train(*flags(data, tmp_path / "out", steps=20, warmup_steps=11, log_interval=1)) == 0
    assert "warming up over 2" in capsys.readouterr().out
    assert [float(row["lr"]) for row in rows(tmp_path / "out")[:2]] == [0.0015, 0.003]


def test_a_run_that_over_fits_keeps_its_best_weights_and_says_so(data, tmp_path, capsys):
    small = shutil.copytree(data, tmp_path / "small")
    (small / "train.bin").write_bytes((data / "train.bin").read_bytes()[:200])
    assert run_train(*flags(small, tmp_path / "out", steps=60, eval_interval=10, lr=0.03)) == 0
    losses = {int(row["step"]): float(row["val_loss"]) for row in rows(tmp_path / "out") if row["val_loss"]}
    step = min(losses, key=losses.get)
    assert losses[step] < losses[60] - 0.1
    assert f"validation loss {losses[60]:.4f} (best {losses[step]:.4f} at step {step}" in capsys.readouterr().out
    model, tokenizer, config = train.load_run(tmp_path / "out")
    tokens = load_tokens(small / "val.bin", 257, 16)
    for name in ("batch_size", "eval_batches", "context_length"):
        assert config[name] == TINY[name]
    starts = np.linspace(0, len(tokens) - 17, 8).astype(int)
    assert model.loss(*train.windows(tokens, starts, 16, "cpu")).item() == pytest.approx(losses[step], abs=1e-4)


def test_fine_tuning_begins_with_weights_shape_and_tokenizer_of_another_run(data, tmp_path, capsys):
    parent, child, other = tmp_path / "parent", tmp_path / "child", tmp_path / "other"
    assert run_train(*flags(data, parent, steps=40, d_ff=48, post_norm=True)) == 0
    words = ["--device=cpu", "--dtype=float32", "--compile=False", "--steps=4", "--eval_interval=2", "--eval_batches=2",
             "--log_interval=1", "--lr=1e-9", "--min_lr=0", f"--init_from={parent}"]
    of, into = f"--data_dir={data}", f"--out_dir={child}"
    assert run_train(*words, of, into, "--context_length=8") == 0
    model, tokenizer, config = train.load_run(child)
    assert (config["d_ff"], config["post_norm"], config["context_length"]) == (48, True, 8)
    assert float(rows(child)[0]["train_loss"]) < float(rows(parent)[4]["train_loss"])
    torch.testing.assert_close(weights(child), weights(parent, "best.pt"))
    assert run_train(into, f"--init_from={parent}", "--resume=True", "--steps=6") == 0
    assert run_train(into, "--init_from=nowhere", "--resume=True") == 2
    assert run_train(*words, of, into, "--num_layers=2") == 2
    assert "num_layers is 1 there and 2 here" in capsys.readouterr().err
    shutil.copytree(data, other)
    Tokenizer({**{i: bytes([i]) for i in range(256)}, 256: b"ab"}, [(b"a", b"b")]).save(other)
    assert run_train(*words, f"--data_dir={other}", into) == 2
    assert f"bpe.py --tokenizer_dir={parent}" in capsys.readouterr().err
    assert run_train(*words, of, f"--out_dir={parent}") == 0   # which is moved aside
    assert json.loads((parent / "config.json").read_text())["init_from"] == f"{parent}.1"
    assert run_train("--init_from=nowhere") == 1 and "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    "--d_model=0", "--num_heads=3", "--lr=-1", "--lr=nan", "--min_lr=1", "--beta2=1.0", "--optimizer=sgd",
    "--dtype=int8", "--device=tpu", "--device=cpu:x", "--device=cuda:99", "--batch_size=3 --grad_accum=2",
    "--shard=True", "--out_dir=", "--rope_theta=0", "--steps=1e3", "--post_norm=yes", "--eps=0",
    "--num_heads=16 --d_model=16",
    "--eval_batches=1000000000000"])
def test_flags_that_make_no_sense_are_refused_by_name_before_anything_is_made(
        data, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert run_train(f"--data_dir={data}", *words.split()) == 2
    *usage, message = capsys.readouterr().err.splitlines()
    assert words.split("=")[0] in message and (not usage or usage[0].startswith("usage:")) and len(usage) < 2
    assert not list(tmp_path.iterdir())


def test_broken_data_and_a_full_disk_are_refused_at_the_beginning(data, tmp_path, monkeypatch, capsys):
    broken, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    (broken / "val.bin").write_bytes((data / "val.bin").read_bytes()[:-1])
    assert run_train(*flags(broken, out)) == 1 and "val.bin" in capsys.readouterr().err and not out.exists()
    (broken / "vocab.json").unlink()
    assert run_train(*flags(broken, out)) == 1 and "not to its end" in capsys.readouterr().err and not out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), dict(free=100)))
    assert run_train(*flags(data, out)) == 1 and "make room" in capsys.readouterr().err
    assert run_train(*flags(data, out, d_model=10 ** 8, num_heads=10 ** 7)) == 1
    assert "smaller model" in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
def test_a_run_folder_whose_name_is_no_text_is_as_good_as_any(data, tmp_path):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff out")
    assert run_train(*flags(data, out)) == 0 and run_train("--resume=True", f"--out_dir={out}", "--steps=16") == 0
    assert "? out" in Path(out, "curves.svg").read_text() and len(rows(out)) == 9


# ------------------------------------------------------------------------------------------------------------ sample.py

def tiny_model(context_length=8, vocab_size=61, **switches):
    torch.manual_seed(1)
    return TransformerLM(vocab_size, context_length, 2, 32, 4, 48, **switches)


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


@pytest.mark.parametrize("switches", [*ABLATIONS, *(dict(context_length=length) for length in (1, 2, 3))], ids=str)
def test_greedy_text_is_the_same_with_and_without_cache_within_and_beyond_the_context(switches):
    model = tiny_model(**switches)
    for length in (1, 2, 3, 7, 8, 10):
        ids = torch.randint(61, (length,)).tolist()
        expected = greedy_without_cache(model, ids, 20)
        assert list(generate(model, ids, 20, temperature=0)) == expected
        assert list(generate(model, ids, 20, temperature=0, num_samples=2)) == [[one, one] for one in expected]


def test_the_streamed_product_is_the_linear_product():
    for d_in, d_out in [(32, 96), (5, 7), (1, 1)]:
        linear = Linear(d_in, d_out)
        for leading in ((), (3,), (2, 4)):
            x = torch.randn(*leading, d_in)
            same(streamed(linear)(x), linear(x), 1e-5)


def test_generating_leaves_the_model_as_it_was():
    model = tiny_model()
    before = [(type(module), *map(id, module.parameters())) for module in model.modules()]
    list(generate(model, [1], 5))
    assert before == [(type(module), *map(id, module.parameters())) for module in model.modules()]
    model(torch.tensor([[1, 2]])).sum().backward()   # still trainable: no tensor of inference mode has stayed in it


def test_top_k_and_top_p_on_a_distribution_made_by_hand():
    for limits, kept in [
            (dict(top_k=9), {0: 0.2, 1: 0.5, 2: 0.05, 3: 0.25}), (dict(top_k=2), {1: 0.6667, 3: 0.3333}),
            (dict(top_p=0.4), {1: 1}), (dict(top_p=1e-9), {1: 1}),
            (dict(top_p=0.6), {1: 0.6667, 3: 0.3333}),            # 0.5 falls short of 0.6, 0.75 reaches it
            (dict(top_k=3, top_p=0.6), {1: 0.6667, 3: 0.3333}),   # 0.5 / 0.95 falls short
            (dict(top_k=2, top_p=0.6), {1: 1}),                   # top-k first: 0.5 / 0.75 reaches 0.6
            (dict(temperature=0.5), {0: 0.1127, 1: 0.7042, 2: 0.007, 3: 0.1761}),
            (dict(temperature=0), {1: 1}), (dict(temperature=1e-300), {1: 1})]:
        probabilities, ids = candidates(torch.tensor([0.2, 0.5, 0.05, 0.25]).log(), **limits)
        assert {i: round(p, 4) for i, p in zip(ids.tolist(), probabilities.tolist()) if p} == kept, limits


def test_tokens_are_drawn_with_the_probabilities_of_the_model():
    model = tiny_model(vocab_size=5)
    torch.manual_seed(0)
    drawn = torch.tensor(next(generate(model, [2], 1, num_samples=20_000, temperature=1.3)))
    expected = (model(torch.tensor([[2]]))[0, -1] / 1.3).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=5) / 20_000, expected, atol=0.012, rtol=0)


def test_the_end_token_ends_a_text_and_fills_up_those_that_wait():
    model = tiny_model(vocab_size=4)
    torch.manual_seed(0)
    rows = list(zip(*generate(model, [0], 200, end_id=3, num_samples=8)))
    assert len({row.index(3) if 3 in row else len(row) for row in rows}) > 1
    for row in rows:
        assert 3 not in row or set(row[row.index(3):]) == {3}
    assert not all(row[-1] == 3 for row in rows)   # the row in which the last one ends is not yielded
    assert 3 not in list(generate(model, [0], 200, end_id=3))


def test_a_seed_gives_its_own_tokens_and_an_empty_prompt_starts_from_the_end_token():
    texts = []
    for seed, ids in [(0, []), (0, [60]), (1, [60])]:
        model = tiny_model()
        torch.manual_seed(seed)
        texts.append(list(generate(model, ids, 30, top_k=20, top_p=0.9, end_id=60)))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("name, value, words", [
    ("max_new_tokens", 0, "max_new_tokens is 0"), ("temperature", -0.1, "temperature is -0.1"),
    ("temperature", math.nan, "temperature"), ("top_k", -1, "top_k"), ("top_p", 0.0, "top_p"), ("top_p", 1.1, "top_p"),
    ("top_p", math.nan, "top_p"), ("num_samples", 0, "num_samples 0"), ("prompt_ids", [], "empty prompt"),
    ("prompt_ids", [61], "0 to 60"), ("prompt_ids", [-1], "0 to 60")])
def test_values_out_of_range_are_refused_by_name(name, value, words):
    with pytest.raises(ValueError, match=words):
        next(generate(tiny_model(), **{"prompt_ids": [1], "max_new_tokens": 4, name: value}))


@pytest.mark.parametrize("context_length", [1, 4, 7, 64])
def test_the_score_of_a_text_is_what_generate_would_have_given_each_token(context_length):
    model = tiny_model(context_length)
    ids = torch.randint(61, (30,)).tolist()
    expected, window = [], []
    for before, token in zip(ids, ids[1:]):
        window = (window if len(window) < context_length else window[(context_length + 1) // 2:]) + [before]
        expected.append(-model(torch.tensor([window]))[0, -1].log_softmax(-1)[token].item())
    assert list(surprise(model, ids)) == pytest.approx(expected, abs=1e-5)


def test_streaming_never_prints_half_a_character_and_replaces_malformed_bytes(monkeypatch):
    raw, written = "naïve 🙂 漢字".encode() + b"\xff\xf0\x9f", []
    terminal = type("Terminal", (), {"write": lambda self, text: written.append(text), "flush": lambda self: None})
    monkeypatch.setattr(sys, "stdout", terminal())
    vocab = type("Bytes", (), {"vocab": [bytes([byte]) for byte in raw]})   # one byte a token
    assert print_streamed(range(len(raw)), vocab) == len(raw)
    assert "".join(written) == raw.decode(errors="replace") + "\n" and "🙂" in written


# ----------------------------------------------------------------------------------------------------- the command line

def write_run(folder, specials=("<|end|>", "<|user|>"), **changes):
    """A run folder as train.py leaves it, with an untrained model of 16 tokens of context."""
    vocab = [*(bytes([i]) for i in range(256)), b"th", b"the", *(token.encode() for token in specials)]
    Tokenizer(dict(enumerate(vocab)), [(b"t", b"h"), (b"th", b"e")], specials).save(folder)
    config = dict(context_length=16, num_layers=2, d_model=16, num_heads=2, d_ff=0, rope_theta=500.0, post_norm=False,
                  rms_norm=True, rope=True, swiglu=True, tie_embeddings=False) | changes
    torch.manual_seed(0)
    torch.save({"model": TransformerLM(len(vocab), **config).state_dict(), "config": config}, folder / "best.pt")
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("sampling") / "a run")


@pytest.fixture
def run_sample(run_folder, monkeypatch, capsys):
    """sample.py in this process: the exit status, standard output and standard error."""
    def run(*flags, folder=run_folder):
        before, status = vars(sample).copy(), 0
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={folder}", *flags])
        try:
            with bpe.one_line_errors():
                sample.main()
        except SystemExit as end:
            status = end.code
        finally:
            vars(sample).update(before)
        return status, *capsys.readouterr()
    return run


def test_sample_py_continues_a_prompt_from_the_command_line_a_file_and_standard_input(
        run_sample, tmp_path, monkeypatch):
    flags = ("--max_new_tokens=30", "--seed=3")
    status, out, err = run_sample("--prompt", "the é", *flags)
    assert status == 0 and out.startswith("the é") and len(out) > 20 and "tokens/s" in err and "note" not in err
    (tmp_path / "prompt").write_bytes("the é".encode())
    assert run_sample(f"--prompt=@{tmp_path}/prompt", *flags)[1] == out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("the é".encode())))
    assert run_sample("--prompt=-", *flags)[1] == out


def test_sample_py_cuts_a_long_prompt_and_labels_several_samples(run_sample):
    status, out, err = run_sample("--prompt", "the" * 17, "--num_samples=3", "--max_new_tokens=4")
    assert status == 0 and "the prompt has 17 tokens; the model sees the last 16" in err
    assert [line for line in out.split("\n") if line[:3] == "---"] == [f"--- sample {i} of 3" for i in (1, 2, 3)]


def test_sample_py_scores_a_text_after_the_first_special_token(run_sample, run_folder):
    text = "the other thing<|user|>ü"
    model, tokenizer, _ = train.load_run(run_folder)
    ids = [258] + tokenizer.encode(text)   # 258: <|end|>
    assert 259 in ids   # special tokens in the text count as such
    nats, tokens, size = sum(surprise(model, ids)), len(ids) - 1, len(text.encode())
    assert run_sample("--score", text)[1] == (
        f"{nats / tokens:.4f} nats per token, {nats / tokens / math.log(2):.4f} bits per token, "
        f"{nats / math.log(2) / size:.4f} bits per byte, perplexity {math.exp(nats / tokens):.2f} "
        f"({tokens} tokens, {size} bytes)\n")


@pytest.mark.skipif(os.name == "nt", reason="closes streams as a POSIX shell does")
@pytest.mark.parametrize("shell", ["--prompt=- <&- 2>&-", "--score=text 2>&-"])
def test_a_closed_stream_is_an_empty_one_and_no_note_goes_into_standard_output(run_folder, shell):
    done = subprocess.run(f"'{sys.executable}' '{ROOT / 'sample.py'}' '--out_dir={run_folder}' {shell}", shell=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout and b"tokens/s" not in done.stdout and not done.stderr


def read_safetensors(path):
    """{name: tensor} of a safetensors file, all float32, one after the other with no gap."""
    raw, end, weights = path.read_bytes(), 0, {}
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert start % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        begin, (first, end) = end, entry["data_offsets"]
        assert (entry["dtype"], first) == ("F32", begin)
        weights[name] = torch.tensor(np.frombuffer(raw[start + first:start + end], "<f4").reshape(entry["shape"]))
    assert start + end == len(raw)
    return weights


def plain_llama(weights, config, ids):
    """The logits of Hugging Face's Llama, whose RoPE turns the pairs (k, k + d_k / 2)."""
    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], config["rms_norm_eps"])

    def turn(x):   # (B, H, T, d_k)
        angles = torch.arange(x.size(2))[:, None] * config["rope_theta"] ** (-torch.arange(0, 1, 2 / x.size(3)))
        a, b = x.chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
    heads, x = config["num_attention_heads"], weights["model.embed_tokens.weight"][ids]
    for layer in (f"model.layers.{i}." for i in range(config["num_hidden_layers"])):
        project = lambda x, name: x @ weights[f"{layer}{name}_proj.weight"].T
        normed = norm(x, layer + "input_layernorm")
        q, k, v = (project(normed, f"self_attn.{name}").unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv")
        x = x + project(triangle(turn(q), turn(k), v).transpose(1, 2).flatten(2), "self_attn.o")
        normed = norm(x, layer + "post_attention_layernorm")
        x = x + project(F.silu(project(normed, "mlp.gate")) * project(normed, "mlp.up"), "mlp.down")
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return norm(x, "model.norm") @ weights[head + ".weight"].T


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_an_exported_run_is_a_llama_with_a_gpt2_tokenizer(run_sample, tmp_path, tied):
    run, out = write_run(tmp_path / "run", tie_embeddings=tied), tmp_path / "new" / "llama"
    assert run_sample(f"--export={out}", folder=run)[0] == 0
    config, words = (json.loads((out / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    weights = read_safetensors(out / "model.safetensors")
    assert len(weights) == (20 if tied else 21)
    model, tokenizer, _ = train.load_run(run)
    ids = torch.randint(260, (3, 16))
    same(plain_llama(weights, config, ids), model(ids), 1e-5)
    for name, value in dict(architectures=["LlamaForCausalLM"], vocab_size=260, hidden_size=16, intermediate_size=64,
                            max_position_embeddings=16, eos_token_id=258).items():
        assert config[name] == value
    assert words["tokenizer_class"] == "GPT2Tokenizer" and words["eos_token"] == words["bos_token"] == "<|end|>"
    assert words["added_tokens_decoder"]["259"]["content"] == "<|user|>"
    assert Tokenizer.from_folder(out).vocab == tokenizer.vocab and len([*out.iterdir()]) == 5


def test_what_is_no_llama_or_finds_no_room_is_not_exported(run_sample, run_folder, tmp_path, monkeypatch):
    new = tmp_path / "new"
    for changes in ABLATIONS[1:5]:
        status, _, err = run_sample(f"--export={new}", folder=write_run(tmp_path / str(changes), **changes))
        assert status == 2 and [*changes][0] in err and not new.exists()
    assert run_sample(f"--export={run_folder}")[0] == 2 and (run_folder / "best.pt").exists()
    new.mkdir()
    monkeypatch.setattr(sample, "llama_settings", lambda *_: 1 / 0)   # when the other three files are written
    with pytest.raises(ZeroDivisionError):
        run_sample(f"--export={new}")
    assert not [*new.iterdir()] and len([*tmp_path.iterdir()]) == 5


@pytest.mark.parametrize("flags, status, words", [
    ("--prompt=the --top_p=0", 2, "top_p"), ("--prompt=@none", 1, "none"), ("--device=cuda:9", 2, "cuda:9"),
    ("--device=cpu:x", 2, "cpu:x"), ("--device=tpu", 2, "tpu")])
def test_what_is_wrong_is_said_in_one_line(run_sample, flags, status, words):
    found, out, err = run_sample(*flags.split())
    assert found == status and words in err and err.count("\n") == 1 and not out


def test_a_run_without_special_tokens_needs_a_prompt(run_sample, tmp_path):
    folder = write_run(tmp_path, specials=())
    status, _, err = run_sample(folder=folder)
    assert status == 2 and "--prompt" in err and "end_id" not in err
    assert run_sample("--prompt=the", "--max_new_tokens=2", folder=folder)[0] == 0


# ------------------------------------------------------------------------------------------ the questions about Unicode

def test_chr_0_is_seen_in_its_repr_and_printed_as_itself(capsys):
    assert repr(chr(0)) == r"'\x00'"
    print(chr(0), end="")
    assert capsys.readouterr().out == "\x00"  # one character goes to the terminal, which shows nothing for it


def test_chr_0_stays_in_the_text_around_it():
    text = "this is a test" + chr(0) + "string"
    assert len(text) == 21 and repr(text) == r"'this is a test\x00string'" and text != "this is a teststring"


def test_utf8_is_the_shortest_of_the_three_for_english_though_not_for_chinese():
    sizes = {code: len("hello, 你好".encode(code)) for code in ("utf-8", "utf-16-le", "utf-32-le")}
    assert sizes == {"utf-8": 13, "utf-16-le": 18, "utf-32-le": 36}
    zeros = {code: "hello".encode(code).count(0) for code in ("utf-8", "utf-16-le", "utf-32-le")}
    assert zeros == {"utf-8": 0, "utf-16-le": 5, "utf-32-le": 15}
    assert len("你好".encode("utf-8")) == 6 > len("你好".encode("utf-16-le")) == 4


def test_utf8_has_neither_a_byte_order_nor_its_mark():
    assert "hello".encode("utf-16-le") != "hello".encode("utf-16-be")
    assert "hello".encode("utf-16")[:2] in (b"\xff\xfe", b"\xfe\xff") and "hello".encode("utf-8") == b"hello"


def decode_byte_by_byte(raw):
    """The handout's wrong decoder: right for ASCII alone."""
    return "".join(bytes([byte]).decode("utf-8") for byte in raw)


def test_decoding_byte_by_byte_fails_on_the_first_character_of_two_bytes():
    assert decode_byte_by_byte("hello".encode()) == "hello"
    with pytest.raises(UnicodeDecodeError):
        decode_byte_by_byte("é".encode())


@pytest.mark.parametrize("two_bytes", [b"\xff\xff", b"\xc0\x80", b"\xe4\xbd"])
def test_some_pairs_of_bytes_decode_to_nothing(two_bytes):
    with pytest.raises(UnicodeDecodeError):
        two_bytes.decode("utf-8")


def test_most_pairs_of_bytes_with_the_upper_bit_set_decode_to_nothing():
    def decodes(pair):
        try:
            return bool(pair.decode("utf-8"))
        except UnicodeDecodeError:
            return False
    high = range(128, 256)
    assert sum(decodes(bytes([a, b])) for a in high for b in high) == 30 * 64  # C2..DF, then 80..BF: U+0080 to U+07FF


def test_every_token_is_at_least_one_byte_so_a_foreign_tokenizer_gives_at_least_one_byte_a_token(tmp_path):
    (tmp_path / "english.txt").write_text("the cat sat on the mat and the dog sat on the cat " * 9)
    vocab, merges = train_bpe(tmp_path / "english.txt", 280, [])
    tokenizer = Tokenizer(vocab, merges)
    assert min(map(len, tokenizer.vocab.values())) == 1
    strange = "日本語のテキスト"  # nothing that it was trained on
    # exactly one byte a token: the worst that can happen
    assert len(tokenizer.encode(strange)) == len(strange.encode())
    english = "the cat sat on the mat"
    assert len(english) > 2 * len(tokenizer.encode(english))


# ---------------------------------------------------------------------------------------------------- the hostile world

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FILES = ("vocab.json", "merges.txt", "train.bin", "val.bin")


def start(*words, script="bpe.py", **how):
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, words)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def finish(*words, **how):
    """Run a script to its end: status, standard output, standard error."""
    process = start(*words, **how)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


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


def all_gone(session, seconds=2):
    end = time.monotonic() + seconds
    while members(session) and time.monotonic() < end:
        time.sleep(0.02)
    return not members(session)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Nine megabytes of a few thousand words: enough for two worker processes."""
    path, rng = tmp_path_factory.mktemp("text") / "text.txt", random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(3000)]
    lines = [" ".join(rng.choices(words, k=12)) + "<|endoftext|>\n" * (i % 9 == 0) for i in range(1000)]
    path.write_text("\n".join(rng.choices(lines, k=130_000)))
    assert os.path.getsize(path) > 1.05 * bpe.BLOCK
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The files that bpe.py makes of the text with two vocabularies: {vocab_size: {name: content}},
    and the seconds that takes.
    """
    made, begin = {}, time.monotonic()
    for size in (300, 900):
        folder = tmp_path_factory.mktemp("finished")
        assert finish(f"--data={text}", f"--data_dir={folder}", f"--vocab_size={size}", "--num_processes=2")[0] == 0
        assert {path.name for path in folder.iterdir()} == {*FILES, ".lock"}
        made[size] = {name: (folder / name).read_bytes() for name in FILES}
    return made, (time.monotonic() - begin) / 2


@linux
def test_sigkill_at_random_moments_leaves_whole_files_and_no_worker_and_the_next_run_clears_up(
        text, finished, tmp_path):
    (made, seconds), rng = finished, random.Random(1)
    for i in range(5):
        process = start(f"--data={text}", f"--data_dir={tmp_path}", f"--vocab_size={(300, 900)[i % 2]}",
                        "--num_processes=2", start_new_session=True)
        time.sleep(rng.uniform(0.2, 1) * seconds)
        process.kill()
        process.wait()
        assert all_gone(process.pid)
        process.communicate()
        for name in FILES:
            assert (not (tmp_path / name).exists()
                    or (tmp_path / name).read_bytes() in [made[size][name] for size in made])
    assert finish(f"--data={text}", f"--data_dir={tmp_path}", "--vocab_size=300", "--num_processes=2")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, ".lock"}
    assert all((tmp_path / name).read_bytes() == made[300][name] for name in FILES)


def once_working(process):
    """Wait until the workers of a bpe.py are there, and return their process ids."""
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        workers = [pid for pid in members(process.pid) if pid != process.pid]
        if len(workers) == 2:
            return workers
        time.sleep(0.005)
    raise AssertionError("no workers came")


@linux
def test_a_killed_worker_ends_the_command_with_one_line_and_status_1(text, tmp_path):
    process = start(f"--data={text}", f"--data_dir={tmp_path}", "--num_processes=2", start_new_session=True)
    os.kill(once_working(process)[0], signal.SIGKILL)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 1 and err.count("\n") == 1 and "a worker process died" in err
    assert all_gone(process.pid) and {path.name for path in tmp_path.iterdir()} == {".lock"}


@linux
@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_ends_bpe_py_within_two_seconds_without_a_traceback_or_orphans(text, tmp_path, whole_group):
    process = start(f"--data={text}", f"--data_dir={tmp_path}", "--num_processes=2", start_new_session=True)
    once_working(process)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    begin = time.monotonic()
    err = process.communicate(timeout=20)[1]
    assert time.monotonic() - begin < 2 and process.returncode == 130 and err == "bpe.py: interrupted\n"
    assert all_gone(process.pid) and {path.name for path in tmp_path.iterdir()} == {".lock"}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("script, package", [("bpe.py", "regex"), ("sample.py", "torch")])
def test_ctrl_c_while_packages_load_leaves_no_traceback(script, package, tmp_path):
    write(tmp_path / f"{package}.py", "import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    process = start(script=script, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.communicate(timeout=20)[1] == "" and process.returncode == -signal.SIGINT


@linux
def test_a_full_disk_is_said_by_file_and_leaves_the_old_files(tmp_path):
    import resource
    text, folder = tmp_path / "text.txt", tmp_path / "data"
    text.write_text("one two three four five six seven eight nine ten\n" * 3000)
    words = f"--data={text}", f"--data_dir={folder}", "--vocab_size=257"
    assert finish(*words)[0] == 0
    before = {name: (folder / name).read_bytes() for name in FILES}

    def limit():
        # so that the write fails, as on a full disk, instead of ending the process
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    status, _, err = finish(*words[:2], "--vocab_size=258", preexec_fn=limit)
    assert status == 1 and err.count("\n") == 1 and "train.bin" in err and "too large" in err
    assert {name: (folder / name).read_bytes() for name in FILES} == before and len([*folder.iterdir()]) == 5


@linux
def test_a_second_run_in_the_same_folder_is_refused(text, tmp_path):
    first = start(f"--data={text}", f"--data_dir={tmp_path}", "--num_processes=2", start_new_session=True)
    once_working(first)
    os.kill(first.pid, signal.SIGSTOP)   # so that it cannot have ended when the second comes
    status, _, err = finish(f"--data={text}", f"--data_dir={tmp_path}")
    assert status == 1 and err.count("\n") == 1 and "another run" in err
    os.kill(first.pid, signal.SIGCONT)
    first.communicate(timeout=60)
    assert first.returncode == 0 and {path.name for path in tmp_path.iterdir()} == {*FILES, ".lock"}


def test_odd_names_a_c_locale_and_no_home_cost_nothing(tmp_path):
    folder = tmp_path / "a 'b\"\n\u00e9 %d{x}"
    folder.mkdir()
    (folder / "t \\n.txt").write_text("one two three \u4e2d\u56fd " * 3000, encoding="utf-8")
    bare = {"LC_ALL": "C", "HOME": "/nonexistent", "PYTHONIOENCODING": "ascii", "COLUMNS": "40",
            "SYSTEMROOT": os.environ.get("SYSTEMROOT", "")}
    status, out, err = finish(f"--data={folder / 't '}\\n.txt", f"--data_dir={folder}", "--vocab_size=270",
                              "--special_tokens=\u4e2d\u56fd", env=bare)
    assert status == 0 and not err and "??" in out   # the terminal lacks the characters, the files have them
    assert "\u4e2d\u56fd" in (folder / "vocab.json").read_text(encoding="utf-8")


def test_processes_may_be_spawned_instead_of_forked(tmp_path):
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 1500)
    (tmp_path / "driver.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import multiprocessing\nimport bpe\n\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n    bpe.BLOCK = 1 << 14\n"
        "    tokenizer = bpe.Tokenizer(*bpe.train_bpe('text.txt', 280, ['<|endoftext|>'], 2), ['<|endoftext|>'])\n"
        "    print(tokenizer.merges, tokenizer.encode_file('text.txt', 'ids.bin', 2))\n")
    done = subprocess.run([sys.executable, "driver.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    tokenizer = Tokenizer(*train_bpe(tmp_path / "text.txt", 280, ["<|endoftext|>"], 1), ["<|endoftext|>"])
    assert done.stdout == (f"{tokenizer.merges} "
                           f"{len(tokenizer.encode((tmp_path / 'text.txt').read_text()))}\n"), done.stderr


def test_a_megabyte_without_white_space_trains_and_encodes(tmp_path):
    path = tmp_path / "line.txt"
    path.write_bytes(random.Random(2).randbytes(500_000).hex().encode())
    vocab, merges = train_bpe(path, 300, [], 1)
    tokenizer = Tokenizer(vocab, merges)
    assert tokenizer.encode_file(path, tmp_path / "ids.bin", 1) * 2 == os.path.getsize(tmp_path / "ids.bin")
    assert tokenizer.decode(tokenizer.encode(path.read_text())) == path.read_text()


def test_a_text_of_special_tokens_only_and_a_thousand_special_tokens(tmp_path):
    path, specials = tmp_path / "text.txt", [f"<|{i}|>" for i in range(1000)]
    path.write_text("".join(specials))
    vocab, merges = train_bpe(path, 2000, specials, 1)
    assert len(vocab) == 1256 and not merges
    tokenizer = Tokenizer(vocab, merges, specials)
    assert tokenizer.encode(path.read_text() + "<|7") == [*range(256, 1256), *b"<|7"]


def test_a_vocabulary_far_larger_than_the_text_ends_where_pairs_do(tmp_path):
    (tmp_path / "text.txt").write_text("low low lower")
    vocab, merges = train_bpe(tmp_path / "text.txt", 10 ** 12, ["<|endoftext|>"], 1)
    assert len(vocab) == 257 + len(merges) and vocab[len(vocab) - 2] == b" lower"


