"""
Byte-level byte-pair encoding (BPE): train a tokenizer on text, encode the text with it, and report how well it does.

    $ python bpe.py --data=TinyStories.txt --vocab_size=10000
    $ python bpe.py --data='notes/**/*.md'                                    # many files, a document each
    $ python bpe.py --data=owt.txt --tokenizer_dir=data --data_dir=data_owt   # encode with another folder's tokenizer

writes vocab.json and merges.txt (GPT-2's format), train.bin and val.bin (raw token ids) into data_dir, and reports
seconds for each phase, peak memory, the longest tokens, bytes per token and MB/s. Without --data the text is the source
of Python's standard library. Text from many files is first joined in data_dir/corpus.txt. The sections of this file:

1. Pre-tokens: a pattern cuts the text into words. Everything else happens inside these words.
2. BPE, the definition: training and encoding in plain Python, on one page. You may stop there and know BPE.
3. to 7. The same, a hundred times as fast: pre-tokens at array speed; the distinct words of a text; all cores;
   learning merges; the Tokenizer, and training from a file.
8. Flags, errors and files, for all four scripts: also for model.py, train.py and sample.py.

Needs numpy and regex. Imports neither torch nor another file of this project.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C while packages load ends the script without a traceback

import argparse
import ctypes
import glob
import json
import mmap
import multiprocessing
import os
import random
import re
import shutil
import sqlite3
import sys
import threading
import time
from bisect import insort
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import regex

data = ""                          # UTF-8 text: a file, or a pattern in quotes; empty: Python's standard library
val_data = ""                      # file for validation; empty: the last documents of data (a twentieth, 10 MB at most)
vocab_size = 4096                  # tokens in all: 256 bytes, the merges, the special tokens
special_tokens = "<|endoftext|>"   # strings that are one token each, separated by commas; the first ends a document
data_dir = "data"                  # folder for vocab.json, merges.txt, train.bin and val.bin
tokenizer_dir = ""                 # encode with this folder's tokenizer and special tokens; empty: train one
num_processes = 0                  # worker processes; 0: one for each core

OUTPUTS = "vocab.json", "merges.txt", "train.bin", "val.bin"   # and corpus.txt, unless --data names a file
BLOCK = 1 << 21    # bytes of text, then on to a place to cut, in one pass of the array code and one task of a worker
TOGETHER = 2048    # new words in one call of Tokenizer.merge_words
LONG = 512         # a group of new words goes to Tokenizer.replay if one of them has more bytes than this
CACHE = 3 << 24    # bytes of the words whose ids a tokenizer remembers; with more, it forgets all
NEVER = 2 ** 63 - 1                                # in Tokenizer.merge_words: greater than any pair and any key
BYTES = [bytes([byte]) for byte in range(256)]     # the first 256 tokens


# -------------------------------------------------------------------------------------------------------- 1. pre-tokens

# GPT-2's pattern. A pre-token, or word, is one of: the tail of a contraction; letters, digits or other signs, each with
# the space before them; white space. "We've  2 dogs!" is cut into "We", "'ve", " ", " 2", " dogs", "!". Of the white
# space before a word, the last character joins the word if it is a space, else it is a word by itself.
PATTERN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
CONTRACTION = re.compile(rb"'(?:[sdmt]|ll|ve|re)")


def special_pattern(specials):
    """The compiled pattern of the special tokens (bytes); of several that match at one place the longest wins.

    Raises InputError for one that is empty or a single byte.
    """
    require(all(len(token) > 1 for token in specials),
            f"special tokens {[*specials]}: one is empty, which matches everywhere, or a single byte, which is a token")
    # In reverse order, a token stands before its own prefixes, so the longer one is tried first. Without any token, the
    # pattern is the byte 0xFF, which UTF-8 never has.
    return re.compile(b"(%s)" % (b"|".join(map(re.escape, sorted(specials, reverse=True))) or b"\xff"))


def plain_words(text, special):
    """The pre-tokens of UTF-8 bytes and the special tokens between them, list[bytes]. special: see special_pattern.

    >>> plain_words(b"We've  2 dogs<|end|>!", special_pattern([b"<|end|>"]))
    [b'We', b"'ve", b' ', b' 2', b' dogs', b'<|end|>', b'!']
    """
    words = []
    for i, piece in enumerate(special.split(text)):   # every second piece is a special token
        words += [piece] if i % 2 else [word.encode() for word in PATTERN.findall(piece.decode())]
    return words


# ----------------------------------------------------------------------------------------------- 2. BPE, the definition
# Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2; and section 2.4 of
# the first assignment of Stanford's CS336.

def merge_pair(tokens, pair):
    """The tokens of a word (list[bytes]) with each occurrence of the pair joined, from left to right.

    >>> merge_pair([b"a", b"a", b"a", b"b"], (b"a", b"a"))
    [b'aa', b'a', b'b']
    """
    merged = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def plain_train(counts, num_merges):
    """Learn merges from words and how often each occurs, dict[bytes, int]; returns list[tuple[bytes, bytes]].

    Begin with bytes. Count the pairs of neighbouring tokens over all words. Merge the most frequent pair everywhere.
    Repeat, up to num_merges times. If several pairs are equally frequent, the lexicographically greater one wins.

    >>> plain_train({b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}, 3)
    [(b's', b't'), (b'e', b'st'), (b'o', b'w')]
    """
    tokens_of = {word: [BYTES[byte] for byte in word] for word in counts}
    merges = []
    for _ in range(num_merges):
        pairs = Counter()
        for word, tokens in tokens_of.items():
            for pair in zip(tokens, tokens[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break   # every word is one token
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        tokens_of = {word: merge_pair(tokens, best) for word, tokens in tokens_of.items()}
    return merges


def plain_encode(word, merges):
    """The tokens of a word (bytes), list[bytes]. While some of its pairs are merges: merge the one learnt first.

    >>> plain_encode(b"lowest", [(b"s", b"t"), (b"e", b"st"), (b"o", b"w")])
    [b'l', b'ow', b'est']
    """
    rank = {pair: i for i, pair in enumerate(merges)}
    tokens = [BYTES[byte] for byte in word]
    while known := [pair for pair in zip(tokens, tokens[1:]) if pair in rank]:
        tokens = merge_pair(tokens, min(known, key=rank.get))
    return tokens


# ----------------------------------------------------------------------------------------- 3. pre-tokens at array speed

# The kinds of character that the pattern tells apart are 0 (other), SPACE, 2 (letter) and 3 (digit). SPECIAL and
# SPECIAL + 1 are special tokens, in turn; SPECIAL + 2 is the end of the text.
SPACE, SPECIAL = 1, 4


@cache
def kind_of_code_point():
    """The kind of each code point below 0x40000, as the pattern's own engine sees it: (0x40000,) uint8.

    All beyond are of kind 0, like the last one.
    """
    kinds = np.zeros(0x40000, np.uint8)
    for run in regex.finditer(r"(\s+)|(\p{L}+)|(\p{N}+)", "".join(map(chr, range(0x40000)))):
        kinds[slice(*run.span())] = run.lastindex   # the group that matched: 1 is SPACE, and so on
    return kinds


def kind_of_byte(byte):
    """For each byte of valid UTF-8, the kind of its character. `byte` and the result: arrays of uint8."""
    kinds = kind_of_code_point().take(byte)
    wide = byte[byte > 127]   # the characters beyond ASCII; the first byte of each is 0xC0 or more
    points = np.frombuffer(wide.tobytes().decode().encode("utf-32-le"), np.uint32)
    kinds[byte > 127] = kind_of_code_point().take(points, mode="clip")[np.cumsum(wide >= 0xC0) - 1]
    return kinds


def changes(values):
    """Whether each value of an array differs from the one before it; True for the first.

    >>> changes(np.array([5, 5, 7])).tolist()
    [True, False, True]
    """
    return values != np.concatenate((~values[:1], values[:-1]))   # the first one differs from its own complement


def pretokenise(text, special):
    """Where the words of plain_words(text, special) begin, and their lengths in bytes: two arrays (W,).

    The pattern reads 9 MB/s, this reads 200: it decides at all bytes at once whether a word begins there.
    A bar marks a byte where a word begins, a dot any other.

        text             W e ' v e     2   d o g s
        kind             L L O L L S S D S L L L L    Letter, Other, Space, Digit
        the kind changes | . | | . | . | | | . . .    1
        spaces join      | . | | . | | . | . . . .    2
        contractions     | . | . . | | . | . . . .    3

    >>> text = b"We've  2 dogs"
    >>> [text[place:place + length] for place, length in zip(*pretokenise(text, special_pattern([])))]
    [b'We', b"'ve", b' ', b' 2', b' dogs']
    """
    padded = bytearray(text + b"\0")         # a byte more, of a kind of its own: the end
    byte = np.frombuffer(padded, np.uint8)   # shares its memory with padded
    kinds = kind_of_byte(byte)
    kinds[-1] = SPECIAL + 2
    for i, match in enumerate(special.finditer(text)):
        place = slice(*match.span())
        kinds[place] = SPECIAL + i % 2   # so that two in a row differ
        byte[place] = 0                  # so that no contraction is found there

    # 1. A word begins where the kind changes.
    begins = changes(kinds)

    # 2. White space before a word (not before a special token or the end): its last character joins the word if it is a
    # space, else it is a word by itself.
    last = np.flatnonzero(begins[1:] & (kinds[:-1] == SPACE) & (kinds[1:] < SPECIAL))   # that character's last byte
    begins[last + 1] = byte[last] != ord(" ")
    for _ in range(2):   # go back to that character's first byte: U+00A0 has two, U+3000 has three
        last -= byte[last] & 0xC0 == 0x80
    begins[last] = True

    # 3. Where a word begins with 's, 'll and so on, no word begins at these letters, and one begins after them.
    for match in CONTRACTION.finditer(padded):
        start, stop = match.span()
        if begins[start]:
            begins[start + 1] = False
            begins[stop] = True

    places = np.flatnonzero(begins)
    return places[:-1], np.diff(places)


# -------------------------------------------------------------------------------------- 4. the distinct words of a text
# A text repeats its words: a megabyte of English has 220,000 words, of which 15,000 are distinct. Training counts these
# and encoding looks them up. Making Python objects of all 220,000 first would take twice as long.

def distinct_words(text, special):
    """The distinct words of a text (list[bytes]) and, for each of its words, the index in that list, (W,).

    >>> words, index = distinct_words(b"a dog or a dog", special_pattern([]))
    >>> sorted(words), [words[i] for i in index]
    ([b' a', b' dog', b' or', b'a'], [b'a', b' dog', b' or', b' a', b' dog'])

    Words of 16 bytes or more are listed once for each occurrence, and a few others perhaps more than once. That costs
    only time.
    """
    places, lengths = pretokenise(text, special)
    # Each word becomes 16 bytes, as two numbers: its own bytes, and 0xFF, which UTF-8 never has, for all behind them.
    # (-1 << 8 * n has n zero bytes, then 0xFF. From n = 8 on, it is 0 in numpy.)
    at_each_byte = np.ndarray(len(text), "V16", text + bytes(15), strides=(1,))   # a view: the next 16 bytes of each
    low, high = at_each_byte[places].view("2<i8").T
    low |= -1 << 8 * lengths
    high |= -1 << 8 * np.maximum(lengths - 8, 0)
    # A word of 16 bytes or more gets its place as `low`, so it equals no other of them. It equals no shorter word,
    # either: the 16th byte of these is 0xFF.
    np.copyto(low, places, where=lengths > 15)
    # Sort so that equal words become neighbours. The high 32 bits of each number are half of a hash, the low ones the
    # index of the word: so np.sort does the work of np.argsort in a third of the time.
    hashes = low * 0x1E3779B97F4A7C15 ^ high * 0x42B2AE3D27D4EB4F
    order = np.sort(hashes >> 32 << 32 | np.arange(len(places))) & 0xFFFFFFFF
    # Neighbours are compared exactly. Words with the same half of a hash may alternate: then a word is listed more than
    # once, but never wrongly.
    first = changes(low[order]) | changes(high[order])
    index = np.empty_like(order)
    index[order] = np.cumsum(first) - 1
    chosen = order[first]
    return [text[place:place + n] for place, n in zip(places[chosen].tolist(), lengths[chosen].tolist())], index


# --------------------------------------------------------------------------------------------------------- 5. all cores

def utf8(text):
    """The UTF-8 bytes of a str. Surrogates, which have none, count as U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


def cut_pattern(specials):
    """The compiled pattern of where UTF-8 may be cut without changing a token; it matches the character after the cut.

    A text may be cut where no word goes on: before white space that follows something else; and after an ASCII letter
    or digit, before a visible ASCII character of another kind. PATTERN never looks back, and ahead only from white
    space, so the words on both sides stay as they are. A special token is not cut: in "<|end|>", the second bar would
    be such a place.

    >>> cut_pattern([b"<|end|>"]).sub(rb"/\\g<0>", b"x=31; a  dog's<|end|>")
    b"x/=31/;/ a/  dog/'s/<|end|>"
    """
    # The character after the cut comes first, because the engine skips to it quickly. Then lookbehinds, which end with
    # that character, check what stands before it.
    place = rb"""(?x)
        [\s!-~]  (?: (?<=[A-Za-z][^A-Za-z\s])
                  | (?<=[0-9][^0-9\s])
                  | (?<=\S\s)  # but not behind white space beyond ASCII, whose bytes \S takes for signs
                    (?<!\xc2[\x85\xa0]\s)
                    (?<!\xe1\x9a\x80\s|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]\s|\xe2\x81\x9f\s|\xe3\x80\x80\s) )"""
    # A match inside a special token is refused: for example, one that ends behind b"<|end|" and before b">".
    inside = [b"(?!(?<=%s)%s)" % (re.escape(token[:match.end()]), re.escape(token[match.end():]))
              for token in specials for match in re.finditer(place, token)]
    return re.compile(place + b"".join(inside))


def pieces(text, cut, size, start, stop):
    """Yield the bounds of pieces of bytes start..stop of a text, each up to the first cut after `size` bytes.

    text: bytes, or a file as an mmap.

    >>> text = b"one two three four"
    >>> [text[start:stop] for start, stop in pieces(text, cut_pattern([]), 6, 0, len(text))]
    [b'one two', b' three', b' four']
    """
    while start < stop:
        place = cut.search(text, start + size, stop)
        end = place.start() if place else stop
        yield start, end
        start = end


def mapped(path):
    """A file as an mmap, which reads like bytes: the system loads only the pages that are looked at."""
    if not os.path.getsize(path):
        raise InputError(f"{path} is empty, or no plain file: name a file with text in it")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def keep_freed_memory():
    """Let glibc keep large blocks that are freed, instead of taking new pages from the system for each array. It saves
    a third of the time of distinct_words.
    """
    with suppress(AttributeError, TypeError):   # another C library, with habits of its own
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)    # M_MMAP_MAX: take large blocks from the heap
        libc.mallopt(-1, -1)   # M_TRIM_THRESHOLD: never give its end back


def start_worker(function):
    """Keep the function that this worker applies to every task: it may hold a whole tokenizer, so it is sent once.

    Workers leave Ctrl-C to the parent, and end when the parent does, even if it was killed.
    """
    global task_of_worker
    task_of_worker = function
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()


def run_task(task):
    """What a worker does with each task."""
    return task_of_worker(task)


@contextmanager
def ctrl_c_held_back():
    """Deliver Ctrl-C only after the block: it must not reach a worker before that ignores it."""
    if not hasattr(signal, "pthread_sigmask"):   # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_parallel(function, tasks, num_processes):
    """Yield function(task) of each task of a list, in order, from num_processes (0: one for each core; 1: no workers).

    Tasks go out in batches, so that memory does not grow with their number.
    Raises ChildProcessError if a worker dies.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_processes = min(num_processes or cores, len(tasks), 61)   # Windows cannot wait for more processes
    keep_freed_memory()
    if num_processes < 2:
        yield from map(function, tasks)
        return
    kind_of_code_point()   # now, so that workers that are forked have it already
    try:
        with ProcessPoolExecutor(num_processes, initializer=start_worker, initargs=(function,)) as pool:
            for i in range(0, len(tasks), 16 * num_processes):
                with ctrl_c_held_back():
                    results = pool.map(run_task, tasks[i:i + 16 * num_processes])
                yield from results
    except BrokenExecutor:
        raise ChildProcessError("a worker process died, perhaps for lack of memory: try --num_processes=1") from None


# For the report: the seconds of each phase, the malformed places that were met in each phase, and the time after
# the imports. Encoding includes the validation text.
SECONDS, MALFORMED, BEGIN = Counter(), Counter(), time.perf_counter()


def progress(phase, state=""):
    """Show on a terminal how far a phase has come; the next line that is printed replaces it.

    The time since the last call, whichever phase that was for, is added to this phase.
    """
    SECONDS[phase] += time.perf_counter() - BEGIN - SECONDS.total()
    if __name__ == "__main__" and sys.stdout.isatty():
        print(f"{phase} {state:40}", end="\r", flush=True)


def on_block(function, path, block):
    """function(text) of one block of a file, and the number of malformed places in it. block: (start, stop).

    text: the bytes start..stop as valid UTF-8, with U+FFFD for what was malformed.
    """
    raw = mapped(path)[slice(*block)]
    text = raw.decode(errors="replace").encode()
    return function(text), text.count(b"\xef\xbf\xbd") - raw.count(b"\xef\xbf\xbd")   # U+FFFD


def in_blocks(phase, function, path, cut, start, stop, num_processes):
    """Yield function(text) of each block of bytes start..stop of a file, in order; num_processes: see in_parallel.

    stop None: to the end.
    """
    with mapped(path) as text:
        blocks = [*pieces(text, cut, BLOCK, start, len(text) if stop is None else stop)]
    results = in_parallel(partial(on_block, function, path), blocks, num_processes)
    for done, (result, malformed) in enumerate(results, 1):
        yield result
        MALFORMED[phase] += malformed
        progress(phase, f"{done / len(blocks):.0%}")


# --------------------------------------------------------------------------------------------------- 6. learning merges

class Segmentation:
    """Many words cut into tokens. There is a cell for each byte, and a gap before, between and after the words.

    token[i] is the token that begins at cell i, or -1 in a gap and inside a token. Tokens are numbers: the bytes, then
    one for each merge. pair[i] is the pair that begins at cell i, a token and its right neighbour: left << 32 | right.
    It is negative where no pair begins: at the end of a word, in a gap and inside a token. next[i] and previous[i] are
    the cells where the tokens to the right and left begin; at the ends of a word, the cells of the gaps. Inside a token
    and in gaps they mean nothing. So this is a linked list of tokens, in arrays: many places can be merged at once.
    word[i] is the number of the word, from 1; a gap has that of the word to its right. gaps: the cells of the gaps.
    "low" and "lo" after the merge of o w:

        cell          0    1    2    3    4    5    6    7
        byte               l    o    w         l    o
        token        -1    l   ow   -1   -1    l    o   -1
        pair             l ow                 l o
        next               2    4              6    7
        previous           0    1              4    5
        word          1    1    1    1    2    2    2    3
    """

    def __init__(self, words):
        """words: bytes objects without the byte 0xFF, which UTF-8 never has: it marks the gaps."""
        cells = np.frombuffer(b"\xff" + b"\xff".join(words) + b"\xff", np.uint8)
        gap = cells == 0xFF
        self.token = cells - 256 * gap   # -1 in the gaps
        self.pair = self.token << 32 | np.roll(self.token, -1)
        self.next = np.arange(1, len(cells) + 1, dtype=np.int32)
        self.previous = self.next - 2
        self.word = np.cumsum(gap, dtype=np.int32)
        self.gaps = np.flatnonzero(gap)

    def begins(self):
        """The cells where a token begins."""
        return np.flatnonzero(self.token >= 0)

    def group_by_pair(self, places, weight, floor):
        """Yield (pair, occurs, places) for each pair that begins at these places and occurs more than `floor` times.

        weight[n]: how often word n counts. The places of a pair come in no order.
        Places are grouped by sorting them. Most pairs are rare, so first the counts of all pairs are added up in
        buckets, many pairs in one. Where a bucket has `floor` or less, none of its pairs has more, and its places need
        not be sorted.
        """
        if floor:
            bucket = self.pair[places] % (len(places) | 1)   # odd, so that both tokens of a pair matter
            places = places[(np.bincount(bucket, weight[self.word[places]]) > floor)[bucket]]
            del bucket   # for the memory
        places = places[self.pair[places].argsort()]
        pairs = self.pair[places]
        starts = np.flatnonzero(changes(pairs) & (pairs >= 0))   # the negative ones come first: no pair begins there
        bounds = np.append(starts, len(places))
        occurs = np.add.reduceat(weight[self.word[places]], starts)
        for i in np.flatnonzero(occurs > floor).tolist():
            yield pairs[bounds[i]], occurs[i], places[bounds[i]:bounds[i + 1]]

    def ids_of_words(self, ids):
        """The ids of each word's tokens, a list of bytes objects. ids: an array with the id of each token."""
        begins = self.begins()
        raw = ids[self.token[begins]].tobytes()
        stops = (np.searchsorted(begins, self.gaps) * ids.itemsize).tolist()   # where in raw each gap is
        return [raw[start:stop] for start, stop in zip(stops, stops[1:])]

    def merge(self, new, places):
        """Merge the pairs that begin at `places`, of which none may overlap (see apart). new: one token for all, or one
        for each place.

        Returns where new pairs begin, no cell twice: at `places` and at the left neighbours. At some of these none
        begins: gaps, ends of words, and cells that are now inside a token, as in x y x y.
        """
        before, right = self.previous[places], self.next[places]
        after = self.next[right]   # where the next token begins, or a gap
        self.token[places] = new
        self.token[right] = self.pair[right] = -1
        self.next[places] = after
        self.previous[after] = places
        changed = np.concatenate((places, before))
        self.pair[changed] = self.token[changed] << 32 | self.token[self.next[changed]]
        return changed

    def apart(self, pair, places):
        """The places of a pair that merge_pair would merge: in x x x x, where x x begins three times, the first and the
        third. Only a pair of equal tokens can overlap with itself.
        """
        if pair >> 32 == pair & 0xFFFFFFFF:
            kept = set()
            for place in sorted(places.tolist()):
                if self.previous[place] not in kept:
                    kept.add(place)
            places = np.array([*kept], int)
        return places


def learn_merges(counts, num_merges):
    """plain_train, many pairs at a time, for counts from 1, below 2**53 in all. What replaces its steps:

    - "Count the pairs": the places of a pair are collected when the newer of its two tokens is made, which happens
      everywhere at once. Later merges can only take places away.
    - "Merge the most frequent": the last one of a sorted queue. A count in the queue is an upper bound. When a pair is
      taken from the end, it is counted again. If it has lost places, its true count decides anew.
    - "everywhere": one Segmentation.merge for a batch of pairs. The batch is filled from the end of the queue, down to
      a pair that shares a word with it, or that is merged already. As its pairs share no word, no merge changes the
      places of another. But their order in the list is still open: a pair that the first one makes may come before the
      second, mostly as an equally frequent, lexicographically greater one. (It lies in words of the first one, so
      neither changes the other.) So a merged pair goes back to the end of the queue. When it is taken again, its merge
      is listed, and the pairs that it has made go into the queue. A batch has 45 pairs on average, which makes 32,000
      merges three times as fast.

    Pairs that occur at most `floor` times, the great majority, stay out of the queue, or leave it when they are counted
    again. They come after all others, so they can wait. When the queue is empty, as at the start, the floor falls to a
    quarter, at last to 0, and all pairs are counted. This makes 32,000 merges four times as fast.

    counts is emptied as soon as the arrays have it all, for the memory.
    """
    corpus = Segmentation(counts)
    weight = np.array([0, *counts.values()])   # how often each word occurs; word 0 does not exist
    taken = np.zeros_like(weight)              # for each word, the number of the last batch that merged in it
    counts.clear()
    # In the queue: (count, parts, pair, places); or (count, parts, -1, entries of the pairs it made) for a merged one.
    # Equal bytes are merged alike: no two tokens have the same bytes. So places are never compared.
    vocab, merges, queue, floor = list(BYTES), [], [], weight.sum() // 16 + 1   # any floor will do at first

    def add_pairs(places):
        """Make entries of the pairs that begin at these places: in the queue or, after a merge, in the entry of the
        pair whose new token they contain.
        """
        for pair, occurs, group in corpus.group_by_pair(places, weight, floor):
            left, right = pair >> 32, pair & 0xFFFFFFFF
            (batch[max(left, right)][3] if batch else queue).append((occurs, (vocab[left], vocab[right]), pair, group))

    while len(merges) < num_merges and (queue or floor):
        # The batch: its number, {new token: the entry of its merge}, and the places of each.
        number, batch, batch_places = len(vocab), {}, []
        while queue and queue[-1][2] >= 0:   # down to a merged pair, marked -1
            bound, parts, pair, places = queue.pop()
            places = places[corpus.pair[places] == pair]
            words = corpus.word[places]
            occurs = weight[words].sum()
            if occurs == bound and taken[words].max() < number:
                taken[words] = number
                batch[len(vocab)] = bound, parts, -1, []
                vocab.append(b"".join(parts))
                batch_places.append(corpus.apart(pair, places))
            elif occurs > floor:
                insort(queue, (occurs, parts, pair, places))
                if occurs == bound:
                    break   # it shares a word with the batch
        if batch:
            # np.repeat: the new token for each place
            add_pairs(corpus.merge(np.repeat([*batch], [*map(len, batch_places)]), np.concatenate(batch_places)))
            queue += reversed(batch.values())   # to the end: they are greater than all others
            progress("merging pairs", f"{len(merges):,} of {num_merges:,}")
        elif queue:   # a merged pair is at the end
            _, parts, _, new_pairs = queue.pop()
            merges.append(parts)
            for entry in new_pairs:
                insort(queue, entry)
        else:   # no pair that occurs more than `floor` times is left
            floor //= 4
            add_pairs(corpus.begins())
            queue.sort()
    return merges


# ------------------------------------------------------------------------------- 7. encoding, decoding, files, training

# GPT-2 writes a byte as one visible character: its own in Latin-1 if that is visible, else the next of U+0100, U+0101,
# ... (a space is U+0120).
OTHERS = map(chr, range(0x100, 0x200))
CHARACTERS = [sign if sign.isprintable() and sign != " " else next(OTHERS) for sign in map(chr, range(256))]


def to_visible(token):
    """The visible form of a token's bytes.

    >>> to_visible(b" the") == "\u0120the"
    True
    """
    return token.decode("latin-1").translate(CHARACTERS)


def made_by(merges):
    """The tokens that are bytes or made by a merge, numbered in this order: dict[bytes, int].

    Raises InputError if the merges are out of order.
    """
    numbers = dict(zip(BYTES, range(256)))
    for left, right in merges:
        if not {left, right} <= numbers.keys() or left + right in numbers:
            raise InputError(f"the merge of {left!r} and {right!r} is out of order, or another makes the same token")
        numbers[left + right] = len(numbers)
    return numbers


class Tokenizer:
    """Text to token ids and back, with a trained vocabulary.

    vocab: dict[int, bytes], ids 0..n-1. merges: list[tuple[bytes, bytes]] in the order of training.
    special_tokens: list[str] that are one token each in text to encode. Those that the vocabulary lacks are appended to
    it. If several match, the leftmost wins, then the longest.
    Raises InputError, a ValueError, for a vocabulary and merges that do not fit together.
    """

    cached = np.inf   # bytes of the words in the cache; infinite, so that encode_words begins by making one

    def __init__(self, vocab, merges, special_tokens=None):
        self.merges, self.numbers = list(merges), made_by(merges)
        ids = dict(zip(vocab.values(), vocab))
        if wrong := {*range(len(vocab))} ^ {*ids.values()}:   # in one of the two, but not in both
            raise InputError(f"{len(vocab)} tokens must have the ids 0 to {len(vocab) - 1} and all differ: "
                             f"{min(wrong)} is missing, too large, or belongs to a token that is listed twice")
        if missing := {*self.numbers} - {*ids}:
            raise InputError(f"the vocabulary lacks {min(missing)!r}, which is a byte or made by a merge")
        self.special_tokens = {token: ids.setdefault(utf8(token), len(ids)) for token in special_tokens or ()}
        for token in self.special_tokens:
            require(token.isascii() or {*token} - {*CHARACTERS},
                    f"the special token {token!r} reads like an ordinary one: write it in ASCII (or merges.txt is cut)")
        self.vocab = dict(zip(ids.values(), ids))

        self.dtype = np.dtype("<u2" if len(ids) <= 65536 else "<u4")
        # For each token in the order of `numbers`: its id. For each merge: its pair.
        self.ids = np.fromiter(map(ids.get, self.numbers), self.dtype)
        self.pairs = np.array([self.numbers[left] << 32 | self.numbers[right] for left, right in self.merges] + [NEVER])
        # NEVER, the last one, is greater than any pair, so merge_words always finds an index.
        self.sorted_pairs, self.order = np.unique(self.pairs, return_index=True)
        self.special_ids = {token: ids[token].to_bytes(self.dtype.itemsize, "little")
                            for token in map(utf8, self.special_tokens)}
        self.special, self.cut = special_pattern(self.special_ids), cut_pattern(self.special_ids)

    @classmethod
    def untrained(cls, special_tokens, vocab_size):
        """The tokenizer before its first merge: bytes and special tokens (list[str]).

        Raises UsageError if vocab_size has no room for them.
        """
        tokenizer = cls(dict(enumerate(BYTES)), [], special_tokens)
        least = len(tokenizer.vocab)
        require(vocab_size >= least,
                f"vocab_size={vocab_size}: choose {least} or more, for 256 bytes and {least - 256} special tokens")
        return tokenizer

    @classmethod
    def from_files(cls, vocab_filepath, merges_filepath, special_tokens=None, every_special=False):
        """Load vocab.json and merges.txt as save, Hugging Face or GPT-2 wrote them.

        every_special: treat as special, too, every token that is neither a byte nor made by a merge.
        Raises InputError, naming the files, if they are broken.
        """
        try:
            table = json.loads(Path(vocab_filepath).read_bytes())
            tokens, merges = dict(zip(CHARACTERS, BYTES)), []   # tokens: {visible form: bytes}
            for line in Path(merges_filepath).read_text(encoding="utf-8").split("\n"):
                if line and not line.startswith("#version"):
                    pair = tuple(map(tokens.get, line.split(" ")))
                    if len(pair) != 2 or None in pair:
                        raise ValueError(f"the merge {line!r} is not two tokens, bytes or made before it, and a space")
                    merges.append(pair)
                    tokens[line.replace(" ", "")] = b"".join(pair)
            # A token that is neither a byte nor made by a merge is special, and stands in the file as it is.
            vocab = {token_id: tokens.get(text) or utf8(text) for text, token_id in table.items()}
            specials = sorted({*table} - {*tokens}, key=table.get) if every_special else []
            return cls(vocab, merges, [*(special_tokens or ()), *specials])
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{vocab_filepath} with {merges_filepath}: {error}") from None

    @classmethod
    def from_folder(cls, folder):
        """Load a folder's vocab.json and merges.txt. All tokens that are not bytes or made by merges are special."""
        return cls.from_files(f"{folder}/vocab.json", f"{folder}/merges.txt", every_special=True)

    def file_contents(self):
        """The contents of vocab.json and merges.txt in GPT-2's format, two bytes objects."""
        table = {to_visible(token) if token in self.numbers else token.decode(): token_id
                 for token_id, token in self.vocab.items()}
        lines = "".join(f"{to_visible(left)} {to_visible(right)}\n" for left, right in self.merges)
        return [json.dumps(table, ensure_ascii=False).encode(), ("#version: 0.2\n" + lines).encode()]

    def save(self, folder):
        """Write vocab.json and merges.txt into a folder: see write_together in section 8."""
        write_together(folder, dict(zip(OUTPUTS, self.file_contents())))

    def merge_words(self, corpus):
        """plain_encode for many words at once. corpus: their Segmentation into bytes; it is changed in place.

        Each round merges one pair in each word: the pair of lowest rank, the leftmost if there are several. (The
        definition merges all of these at once. The result is the same: a pair with the new token has a higher rank, see
        made_by, so the other places of the same pair come first.)
        Rank and place stand in one key, so one minimum for each word finds both. An example: three words, and the
        merges 0 (e, s), 1 (es, t), 2 (l, o), 3 (lo, w). A dot is a gap. The rank of a pair is below its left token:

            cells      . l  o w . l  o w e r . n e w e  s t .
            rank         2        2                  0          minima: 2, 2, 0
            round 1    . lo   w . lo   w e r . n e w es   t .
            rank         3        3                  1          minima: 3, 3, 1
            round 2    . low    . low    e r . n e w est    .   no pair has a rank: all three words are done

        A loop in plain Python would take 7 microseconds a word, and a millisecond for a word of 130 letters.
        """
        key = np.full(len(corpus.token), NEVER)    # of the pair that begins at a cell: rank << 32 | cell
        gaps, changed = corpus.gaps, corpus.begins()   # gaps: one before each word not done; at first all
        while len(gaps):
            pairs = corpus.pair[changed]
            ranks = self.order[np.searchsorted(self.sorted_pairs, pairs)]
            key[changed] = np.where(self.pairs[ranks] == pairs, ranks << 32 | changed, NEVER)
            best = np.minimum.reduceat(key, gaps)  # from gap to gap; words in between that are done have only NEVER
            mergeable = best < NEVER
            gaps, best = gaps[mergeable], best[mergeable]
            places = best & 0xFFFFFFFF
            key[corpus.next[places]] = NEVER       # no pair begins at the right part now
            changed = corpus.merge(256 + (best >> 32), places)

    def replay(self, corpus):
        """Like merge_words, for words of hundreds of bytes or more, such as DNA: all merges in the order learnt.

        It takes O(n log n); merge_words, which looks through the word for each merge, O(n^2). But replay tries every
        merge of the vocabulary: some milliseconds, even for short words.
        """
        places_of = {}

        def note(places):
            for pair, _, group in corpus.group_by_pair(places, np.ones_like(corpus.gaps), 0):
                places_of[pair] = group

        note(corpus.begins())
        for new, pair in enumerate(self.pairs.tolist(), 256):
            if pair in places_of:   # what this merge makes contains `new`, so it comes later in this loop: see made_by
                places = places_of.pop(pair)
                note(corpus.merge(new, corpus.apart(pair, places[corpus.pair[places] == pair])))

    def encode_words(self, words):
        """The token ids of each word or special token in a list, as bytes of self.dtype. Only words that are not in the
        cache are merged; special tokens always are in it.
        """
        if self.cached > CACHE:
            self.cache, self.cached = dict(self.special_ids), 0
        new = sorted({*words}.difference(self.cache), key=len)   # so the long ones share few groups
        for i in range(0, len(new), TOGETHER):
            group = new[i:i + TOGETHER]
            corpus = Segmentation(group)
            (self.merge_words if len(group[-1]) <= LONG else self.replay)(corpus)
            self.cache.update(zip(group, corpus.ids_of_words(self.ids)))
        self.cached += sum(map(len, new))
        return [self.cache[word] for word in words]

    def count_words(self, text):
        """The list of distinct_words and how often each entry of it occurs. Special tokens count as words here."""
        words, index = distinct_words(text, self.special)
        return words, np.bincount(index).tolist()

    def encode_bytes(self, text):
        """The token ids of valid UTF-8, as bytes of self.dtype."""
        words, index = distinct_words(text, self.special)
        return b"".join(np.array(self.encode_words(words), object).take(index).tolist())

    def encode(self, text):
        """The token ids of a str, list[int]. Special tokens in it become their ids; lone surrogates count as U+FFFD."""
        raw = utf8(text)
        if len(raw) > 1024:
            ids = [self.encode_bytes(raw[start:stop]) for start, stop in pieces(raw, self.cut, BLOCK, 0, len(raw))]
        else:   # for a few words the pattern is faster than arrays: 3 microseconds instead of 60
            ids = self.encode_words(plain_words(raw, self.special))
        return np.frombuffer(b"".join(ids), self.dtype).tolist()

    def encode_iterable(self, iterable):
        """Yield the ids of the strings in an iterable, as encode gives them for the joined text, lazily.

        Memory follows the longest string, or the longest stretch without a place to cut.
        """
        # text: what is not encoded yet. Beyond `enough` bytes, half of it is encoded, if there is a place to cut.
        text, enough = bytearray(), 32768
        for item in iterable:
            text += utf8(item)
            if len(text) > enough:
                _, stop = next(pieces(text, self.cut, len(text) // 2, 0, len(text)))
                # A special token that ends in the next item may lie across a `stop` near the end. None is longer than
                # the pattern.
                if stop < len(text) - len(self.special.pattern):
                    yield from self.encode(text[:stop].decode())
                    del text[:stop]
                enough = 32768 + len(text) * 3 // 2
        yield from self.encode(text.decode())

    def write_ids(self, text_path, start, stop, bin_path, num_processes):
        """Write the ids of bytes start..stop of a UTF-8 file (None: to its end) to bin_path; return their number."""
        with open(bin_path, "wb") as file:
            file.writelines(in_blocks("encoding", self.encode_bytes, text_path, self.cut, start, stop, num_processes))
            return file.tell() // self.dtype.itemsize

    def encode_file(self, text_path, bin_path, num_processes=0):
        """Encode a UTF-8 file into a file of raw little-endian ids, which is replaced as a whole; return their number.

        uint16 for up to 65,536 tokens in the vocabulary, else uint32. Uses num_processes (0: one for each core) and
        memory that does not grow with the file, if it has places to cut. Malformed bytes count as U+FFFD.
        """
        with replacing(bin_path) as (temporary,):
            return self.write_ids(text_path, 0, None, temporary, num_processes)

    def decode(self, ids):
        """The text of token ids; bytes that are not UTF-8 become U+FFFD. Raises InputError for an unknown id."""
        try:
            return b"".join(map(self.vocab.__getitem__, ids)).decode(errors="replace")
        except KeyError as error:
            raise InputError(f"the vocabulary has {len(self.vocab)} tokens, none with id {error}") from None


def train_bpe(input_path, vocab_size, special_tokens, num_processes=0, stop=None):
    """Train a byte-level BPE tokenizer: the vocabulary, dict[int, bytes], and the merges, list[tuple[bytes, bytes]].

    Ids: the 256 bytes, then the merges in order, then the special tokens (list[str]), which cut the text and are never
    merged. The result is plain_train's, and does not depend on num_processes (0: one for each core). The vocabulary
    stays smaller than vocab_size if the text runs out of pairs. Only the first `stop` bytes of the file count, where
    given. Memory grows with the distinct words, not with the file.
    Raises InputError (a ValueError) for a vocab_size without room for bytes and special tokens, an empty special token
    or an empty file; OSError for a file that cannot be read.
    """
    plain, counts = Tokenizer.untrained(special_tokens, vocab_size), Counter()
    for part in in_blocks("counting words", plain.count_words, input_path, plain.cut, 0, stop, num_processes):
        for word, occurs in zip(*part):
            counts[word] += occurs
    for token in plain.special_ids:
        del counts[token]   # from a Counter, even if it is not there
    merges = learn_merges(counts, vocab_size - len(plain.vocab))
    return dict(enumerate([*made_by(merges), *plain.special_ids])), merges


# --------------------------------------------------------------------- 8. flags, errors and files, for all four scripts

class InputError(ValueError):
    """What the user gave cannot be used: one_line_errors ends the script with status 1."""


class UsageError(InputError):
    """A flag or its value is wrong: one_line_errors ends the script with status 2."""


def require(holds, message):
    """Raise UsageError(message) unless `holds`: for flags whose value has the right type but makes no sense."""
    if not holds:
        raise UsageError(message)


def true_or_false(text):
    """The value of a flag that is True or False; argparse shows the name of this function if it is neither."""
    return ["False", "True"].index(text) == 1


def configure(constants):
    """Override a script's module-level constants from its command line; return them all as a dict.

    constants: the script's globals(), changed in place. Its flags are the lines `name = value  # comment` at the top of
    its source; argparse formats the comments, so none may have a % sign. `--name=value` or `--name value`, or --help.
    Raises UsageError for a wrong flag.
    """
    parser = argparse.ArgumentParser(description=constants["__doc__"], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # argparse itself would print two lines, in each of several processes
    parser.error = lambda message: require(False, f"{message}; --help lists the flags")
    source = Path(constants["__file__"]).read_text(encoding="utf-8")
    for name, comment in re.findall(r"(?m)^([a-z]\w*) = .*?  # (.*)$", source):
        default = constants[name]
        parser.add_argument(f"--{name}", default=default, metavar=str(default), help=comment,
                            type=true_or_false if isinstance(default, bool) else type(default))
    flags = vars(parser.parse_args())
    for name, value in flags.items():
        require(isinstance(value, str) or abs(value) < 2 ** 63,   # which nan fails, too
                f"--{name}={value} is not a finite number below 2**63")
    constants.update(flags)
    return flags


@contextmanager
def one_line_errors():
    """End the script with one line on stderr where the user or the machine did something wrong.

    Status 2 for a UsageError, 1 for what else can fail at run time, 130 for Ctrl-C. If nobody reads the output any
    more, status 1 without a line. Any other exception is a fault of the program, and shows its traceback.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in "stdin", "stdout", "stderr":   # None where the caller has closed it
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w+"))
    sys.stdout.reconfigure(errors="replace")   # a terminal that lacks a character shows a question mark
    try:
        yield
        sys.stdout.flush()
        return
    except BrokenPipeError:   # the reader of our output has left, as `| head` does: there is nobody to tell
        os._exit(1)           # without a last attempt to write
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (OSError, InputError, MemoryError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):   # so torch reports a failed allocation
            raise
        message = str(error) or type(error).__name__
        status = 2 if isinstance(error, UsageError) else 1
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def replacing(*paths):
    """Yield a list of temporary names, one beside each path. They replace the paths when the block ends without error.

    Nobody sees half a file. Of several paths, the first is removed before any other is replaced, and put in place last.
    So if the process is stopped in between, the first one is missing, and nobody takes new and old files for a set.
    After a kill or a power cut, temporary files may stay.
    """
    temporaries = [Path(f"{path}.tmp") for path in paths]
    for path in paths:
        if os.path.isdir(path):
            raise IsADirectoryError(f"{path} is a folder, but a file of this name is to be written: move it away")
    try:
        yield temporaries
        for temporary in temporaries:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())   # the bytes reach the disk before the name does, even in a power cut
        if len(paths) > 1:
            Path(paths[0]).unlink(missing_ok=True)
        for pair in reversed([*zip(temporaries, paths)]):
            os.replace(*pair)
    except OSError as error:
        # a full disk does not say which file it could not take
        if error.errno and not error.filename:
            error.filename = " or ".join(map(str, paths))
        raise
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def write_together(folder, contents):
    """Write the files of a folder, {name: bytes}, as replacing does. Makes the folder if it is not there."""
    os.makedirs(folder, exist_ok=True)
    with replacing(*(f"{folder}/{name}" for name in contents)) as temporaries:
        for temporary, content in zip(temporaries, contents.values()):
            temporary.write_bytes(content)


@contextmanager
def only_run_in(folder):
    """Make `folder`, and hold it for this process until the block ends. Raises BlockingIOError if another run holds it.

    The lock is that of an SQLite database, .lock, which works on every system. The operating system frees it when the
    process ends, for whatever reason. The empty file stays.
    """
    os.makedirs(folder, exist_ok=True)
    try:
        lock = sqlite3.connect(f"{folder}/.lock", timeout=0)
        lock.executescript("PRAGMA journal_mode = MEMORY; BEGIN EXCLUSIVE")   # no file beside .lock
    except sqlite3.DatabaseError as error:
        raise BlockingIOError(
            f"another run is at work in {folder}, or it cannot be locked ({error}): wait, or choose another folder"
        ) from None
    with closing(lock):
        yield


# ----------------------------------------------------------------------------------------------------- the main program

def collect(files, path, end):
    """Write files into one, each with `end` behind it, sorted and then shuffled by a fixed seed; return its path.

    So the end of the file, which is held out for validation, is a fair sample of all of them.
    """
    files = sorted(files)
    random.Random(0).shuffle(files)
    with replacing(path) as (temporary,), open(temporary, "wb") as corpus:
        for name in files:
            try:
                with open(name, "rb") as document:
                    shutil.copyfileobj(document, corpus)
                corpus.write(end)
            except FileNotFoundError:
                print(f"note: {name} was removed after the files were listed: left out", file=sys.stderr)
    progress("collecting")
    return path


def real_files(paths):
    """The files that these paths lead to, a set: each counts once, however many symbolic links lead to it."""
    return {Path(path).resolve() for path in paths if os.path.isfile(path)}


def own_files():
    """The files in data_dir that this or a later run may replace or remove: outputs and their temporary names."""
    return real_files(f"{data_dir}/{name}{end}" for name in (*OUTPUTS, "corpus.txt") for end in ("", ".tmp"))


def find_text(document_end):
    """The file that --data names; or corpus.txt in data_dir, made of the files that match the pattern or, without one,
    of the standard library, but for its tests and site-packages.
    """
    if os.path.isfile(data):
        return data
    root = Path(os.__file__).parent
    library = (module for module in root.rglob("*.py")
               if {"test", "tests", "idle_test", "site-packages"}.isdisjoint(module.relative_to(root).parts))
    files = real_files(glob.glob(data, recursive=True) if data else library) - own_files() - real_files([val_data])
    if not files:
        raise FileNotFoundError(
            f"--data={data!r}: no file has this name or matches this pattern; for a whole folder, write 'folder/**/*'")
    return collect(files, f"{data_dir}/corpus.txt", document_end)


def start_of_held_out(path, tokenizer, document_end):
    """Where the text for validation begins, in the last twentieth of a file, at most 10 MB from its end.

    That is after the first document that ends there with a text behind it or, if there is none, between words.
    """
    with mapped(path) as text:
        place = tokenizer.cut.search(text, len(text) - min(len(text) // 20, 10_000_000))   # in no special token
        require(place, f"--data={path}: no place near the end to cut off text for validation: name a --val_data file")
        for match in tokenizer.special.finditer(text, place.start()):
            if match[0] == document_end and text[match.end():].replace(document_end, b"").strip():   # some text follows
                return match.end()
        return place.start()


def peak_memory():
    """The peak memory of this process and of its largest worker, as a line for the report."""
    try:
        import resource
    except ImportError:
        return "not known on this platform"
    unit = 1e6 if sys.platform == "darwin" else 1e3
    own, worker = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return f"{own:.0f} MB, largest worker process {worker:.0f} MB"


def check_flags():
    """Refuse flags that make no sense or would replace the user's files; return a tokenizer without merges, with the
    special tokens that they name.
    """
    require(data_dir, "--data_dir is empty: name a folder")
    require(num_processes >= 0, f"--num_processes={num_processes}: choose 0 (one for each core) or more")
    if val_data:
        mapped(val_data)   # raises an error if it is not a file with text in it
    own = own_files()
    require(os.path.exists(f"{data_dir}/.lock") or not own,
            f"{min(own, default='')} is not from bpe.py, which would replace it: choose another --data_dir")
    require(not real_files([data, val_data]) & own,
            f"--data={data} or --val_data={val_data} is a file that bpe.py would replace: choose another --data_dir")
    return Tokenizer.untrained(filter(None, special_tokens.split(",")), vocab_size)


def main():
    tokenizer = check_flags()
    with only_run_in(data_dir):
        if tokenizer_dir:
            tokenizer = Tokenizer.from_folder(tokenizer_dir)
        document_end = [*tokenizer.special_ids, b"\n"][0]
        text = find_text(document_end)
        train_stop = os.path.getsize(text) if val_data else start_of_held_out(text, tokenizer, document_end)
        if not tokenizer_dir:
            tokenizer = Tokenizer(*train_bpe(text, vocab_size, tokenizer.special_tokens, num_processes, train_stop),
                                  tokenizer.special_tokens)
        contents, paths = tokenizer.file_contents(), [f"{data_dir}/{name}" for name in OUTPUTS]
        if [Path(path).read_bytes() for path in paths[:2] if os.path.exists(path)] == contents:
            del paths[:2]   # they stay: old ids mean the same; now train_bin is the first
        progress("vocabulary")
        with replacing(*paths) as (*tables, train_bin, val_bin):
            for path, content in zip(tables, contents):
                path.write_bytes(content)
            train_tokens = tokenizer.write_ids(text, 0, train_stop, train_bin, num_processes)
            speed = train_stop / 1e6 / SECONDS["encoding"]   # later, that includes the validation text
            val_text = val_data or text
            val_start = 0 if val_data else train_stop
            val_tokens = tokenizer.write_ids(val_text, val_start, None, val_bin, num_processes)

    val_size = os.path.getsize(val_text) - val_start
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in SECONDS.items())
    longest = ", ".join(f"{token.decode(errors='replace')!r} ({len(token)} bytes)"
                        for token in sorted(tokenizer.vocab.values(), key=len)[-5:])
    print(f"""\
text: {text}, {train_stop / 1e6:.1f} MB to train on, {val_size / 1e6:.1f} MB for validation; \
{MALFORMED["encoding"]} malformed places, read as U+FFFD
seconds: {phases}; {time.perf_counter() - BEGIN:.2f} in all
peak memory: {peak_memory()}
longest tokens: {longest}
bytes per token: {train_stop / train_tokens:.3f} in training, {val_size / val_tokens:.3f} in validation text
encoding: {speed:.1f} MB/s; the Pile (825 GB) would take {825e3 / speed / 3600:.1f} hours
wrote vocab.json ({len(tokenizer.vocab):,} tokens), merges.txt, train.bin ({train_tokens:,} ids, \
{tokenizer.dtype.name}) and val.bin ({val_tokens:,}) into {data_dir}""")
    if not tokenizer_dir and len(tokenizer.vocab) < vocab_size:
        print(f"the text has no more pairs: the vocabulary has {len(tokenizer.vocab)} tokens instead of {vocab_size}")
    if val_tokens < 257:
        print(f"warning: {val_tokens} ids are too few to validate a context of 256: name a longer text with --val_data",
              file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        main()
