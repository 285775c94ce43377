"""
Byte-level byte-pair encoding (BPE): train a tokenizer on a text file, encode the text with it, and say how well it
does.

    $ python bpe.py --data=TinyStories.txt --vocab_size=10000
    $ python bpe.py --data=owt.txt --tokenizer_dir=data --data_dir=data_owt   # encode by another's tokenizer

writes vocab.json and merges.txt (GPT-2's format), train.bin and val.bin (raw token ids) into data_dir, and
reports seconds for each phase, peak memory, the longest tokens, bytes per token and MB/s. Without --data the
corpus is the source of Python's standard library. How it works, in the order of this file:

1. Pre-tokenisation cuts the text into words (GPT-2's pattern: " we", "'ve", " 2026", "!"),
   inside which all the rest happens.
2. Training counts the distinct words, takes the 256 bytes for the first tokens, and merges the most frequent
   pair of neighbouring tokens into a new one, again and again (Sennrich et al. 2016, "Neural Machine Translation
   of Rare Words with Subword Units").
3. Encoding replays the merges on new text, the first learnt first; decoding joins the bytes of the tokens.

All three work on numpy arrays, many places at a time. The plain loops that they replace stand in test_all.py,
which holds both against each other. Needs numpy and regex; imports neither torch nor another file of this project.
"""
import ast
import difflib
import heapq
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import tokenize
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C while packages load ends the script without a traceback; one_line_errors takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import regex

data = ""                          # UTF-8 text to train on and encode; empty: the source of Python's standard library
val_data = ""                      # text for validation; empty: the last documents of data (a twentieth, 10 MB at most)
vocab_size = 4096                  # tokens in all: 256 bytes, the merges, the special tokens
special_tokens = "<|endoftext|>"   # strings that are one token each and cut the text, separated by commas
data_dir = "data"                  # folder for vocab.json, merges.txt, train.bin and val.bin
tokenizer_dir = ""                 # encode with this folder's tokenizer and special tokens; empty: train one
num_processes = 0                  # worker processes; 0: one for each core

# GPT-2's pre-tokens: a contraction's tail; or letters, digits or other signs, with the blank before them; or white
# space, but for its last character before a word: if that is a blank it joins the word, else it is a token of its own.
PATTERN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
OUTPUTS = "vocab.json", "merges.txt", "train.bin", "val.bin"
END = "<|endoftext|>"              # ends each document of the default corpus
CACHE = 1 << 18                    # words whose token ids a tokenizer remembers in a dict, 40 MB or so
SLOT_BITS = 18                     # 2**18 words more in a table of numbers, 9 MB
NEVER = 2 ** 31 - 1                # the rank of a pair that no merge joins
LONG = 128                         # bytes of a word up to which words are merged many at a time
BLOCK = 1 << 22                    # bytes of text that a worker process takes at a time
# bytes of text in one pass of the array code: its arrays then fit the cache, twice as fast as 4 MB
SLICE = 1 << 19


# -------------------------------------------------------------------------------------------------- 1. pre-tokenisation

def utf8(text):
    """The UTF-8 bytes of a str. Surrogates, which have none, count as U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


# the kinds of character that the pattern tells apart, and those of a special token
SPACE, LETTER, DIGIT, OTHER, SPECIAL = range(5)


@cache
def kind_of_code_point():
    """The kind of each code point below 0x40000, as the pattern's own engine sees it: (0x40000,) uint8.

    All beyond are OTHER.
    """
    kinds = np.full(0x40000, OTHER, np.uint8)
    for kind, signs in (SPACE, r"\s+"), (LETTER, r"\p{L}+"), (DIGIT, r"\p{N}+"):
        for run in regex.finditer(signs, "".join(map(chr, range(0x40000)))):
            kinds[run.start():run.end()] = kind
    return kinds


def kind_of_byte(text):
    """The kind of the character that each byte belongs to. text: valid UTF-8. Returns (len(text),) uint8."""
    byte = np.frombuffer(text, np.uint8)
    kinds = kind_of_code_point()[:256][byte]
    if not text.isascii():
        points = np.frombuffer(text.translate(None, bytes(range(128))).decode().encode("utf-32-le"), np.uint32)
        sizes = 2 + (points > 0x7FF) + (points > 0xFFFF)  # bytes of each character in UTF-8
        kinds[byte > 127] = np.repeat(kind_of_code_point()[np.minimum(points, 0x3FFFF)], sizes)
    return kinds


def pretokenise(text, special=None):
    """Cut text into pre-tokens and special tokens, without gaps:
    their places, their lengths, and whether each is special; three arrays (W,).

    text: valid UTF-8 bytes. special: compiled pattern of the special tokens, or None.
    The plain version, PATTERN.findall on the text between the special tokens, reads 9 MB/s, this one 300.
    It asks of all places at once whether a token begins there: it does where the kind of character changes,
    except at a blank before a word and in contractions.
    """
    byte = np.frombuffer(text + b"\0\0", np.uint8)  # two more, so that looking ahead stays inside
    kinds = np.append(kind_of_byte(text), np.uint8([SPECIAL, SPECIAL]))
    spans = [match.span() for match in special.finditer(text)] if special else []
    for start, stop in spans:
        kinds[start:stop] = SPECIAL
    begins = np.ones(len(byte), bool)
    np.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
    begins[[start for start, _ in spans]] = True

    # White space before a word: a blank at its end joins the word, any other character there is a token of its own.
    last_space = begins[1:] & (kinds[:-1] == SPACE) & (kinds[1:] != SPECIAL)
    last_blank = last_space & (byte[:-1] == ord(" "))
    begins[1:] ^= last_blank
    begins[:-1] |= last_blank
    lone = np.flatnonzero(last_space ^ last_blank)
    while len(lone):  # back to the first byte of the character: U+00A0, U+3000 and their like have two or three
        inside = byte[lone] & 0xC0 == 0x80
        begins[lone[~inside]] = True
        lone = lone[inside] - 1

    # Where a token begins with 's 'd 'm 't 'll 've or 're, none begins at its letters, and one begins after them.
    quote = np.flatnonzero(begins & (byte == ord("'")) & (kinds != SPECIAL))
    one, two = (np.where(kinds[quote + ahead] == LETTER, byte[quote + ahead], 0) for ahead in (1, 2))
    short = np.isin(one, list(b"sdmt"))
    long = (one == ord("l")) & (two == ord("l")) | np.isin(one, list(b"vr")) & (two == ord("e"))
    for contraction, size in (quote[short], 2), (quote[long], 3):
        begins[contraction + 1] = False
        begins[contraction + size] = True
    places = np.flatnonzero(begins[:len(text)])
    return places, np.diff(places, append=len(text)), kinds[places] == SPECIAL


def special_pattern(specials):
    """The compiled pattern that finds special tokens (UTF-8) in bytes, the longest where several match;
    None where there are none.

    Raises ValueError for an empty one.
    """
    if b"" in specials:
        raise ValueError("a special token is empty text, which matches everywhere: leave it out")
    return re.compile(b"|".join(map(re.escape, sorted(specials, key=len, reverse=True)))) if specials else None


def cut_pattern(specials):
    """The compiled pattern of the places where UTF-8 can be cut without changing a token:
    it matches the character after the cut.

    In a pre-token white space follows nothing but white space, and an ASCII letter or digit is followed by its
    own kind only: so a cut is safe before white space after something else, and before another ASCII sign after
    such a letter or digit. A special token may hold both: no cut goes through what could be one.
    """
    wide = [chr(point).encode() for point in np.flatnonzero(kind_of_code_point() == SPACE).tolist() if point > 127]
    # The character comes first, for the engine skips to it quickly; what must stand before it is looked at afterwards.
    # White space beyond ASCII ends in a byte that \S matches.
    not_wide = b"".join(rb"(?<!%s\s)" % space for space in wide)
    between = rb"[\s!-~](?:(?<=\S\s)" + not_wide + rb"|(?<=[A-Za-z][^A-Za-z\s])|(?<=[0-9][^0-9\s]))"
    inside = {(token[:match.end()], token[match.end():]) for token in specials for match in re.finditer(between, token)}
    return re.compile(between + b"".join(b"(?!(?<=%s)%s)" % (re.escape(head), re.escape(tail))
                                         for head, tail in sorted(inside)))


def slices(text, cut):
    """Cut bytes into slices of SLICE bytes or a little more, at places that `cut` allows."""
    start = 0
    while start < len(text):
        place = cut.search(text, start + SLICE)
        stop = place.start() if place else len(text)
        yield text[start:stop]
        start = stop


def blocks(path, cut, longest, start, stop):
    """Cut bytes start..stop of a file into (path, start, stop) of BLOCK bytes or a little more.

    longest: bytes of the longest special token.
    """
    margin = max(longest, 4)  # as far as the cut pattern looks back and ahead
    with open(path, "rb") as file:
        while start < stop:
            end, reach = start + BLOCK, 1 << 12
            # look for a place in a window behind the wanted end, in one twice as long if there is none
            while end < stop:
                file.seek(end - margin)
                place = cut.search(file.read(margin + reach + margin), margin)
                if place and place.start() <= margin + reach:
                    end += place.start() - margin
                    break
                if end + reach >= stop:
                    end = stop
                reach *= 2
            yield path, start, min(end, stop)
            start = end


def read_utf8(path, start, stop):
    """Bytes start..stop of a file as valid UTF-8, with U+FFFD for what was malformed,
    and how many of these there were.
    """
    with open(path, "rb") as file:
        file.seek(start)
        text = file.read(stop - start)
    try:
        text.decode()
        return text, 0
    except UnicodeDecodeError:
        whole = text.decode(errors="replace").encode()
        return whole, whole.count("\ufffd".encode()) - text.count("\ufffd".encode())


# ----------------------------------------------------------------------------------------------------- words as numbers

# A word of up to 15 bytes is a column of two uint64: its bytes, then zeros, then its length in the last byte. So words
# are compared, sorted and counted as numbers, without a Python object each. The few longer ones stay bytes objects.
SHORT = 15
# Masks by length, (2, SHORT + 1).
KEEP = np.array([[2 ** (8 * min(n, 8)) - 1 for n in range(SHORT + 1)],
                 [2 ** (8 * max(n - 8, 0)) - 1 for n in range(SHORT + 1)]], np.uint64)


def pack(text, places, lengths):
    """The words of `lengths` (W,) up to 15 at `places` (W,) of a bytes object, as numbers: (2, W) uint64."""
    padded = text + bytes(16)
    eight = np.ndarray(len(text) + 9, "<u8", padded, strides=(1,))  # the eight bytes from each place on
    low, high = KEEP
    return np.stack((eight[places] & low[lengths],
                     eight[places + 8] & high[lengths] | lengths.astype(np.uint64) << np.uint64(56)))


def unpack(words):
    """The reverse of pack: the bytes of words (2, W), (W, 16) uint8, and how many of the 16 belong to each, (W,)."""
    cells = np.ascontiguousarray(words.T, "<u8").view(np.uint8)
    return cells, cells[:, SHORT].astype(np.intp)


def hash_words(words):
    """A 64-bit hash of each word, (W,) uint64, mixed well in its upper bits."""
    return words[0] * np.uint64(0x9E3779B97F4A7C15) ^ words[1] * np.uint64(0xC2B2AE3D27D4EB4F)


def bring_together(words):
    """Sort words (2, W) so that equal ones are neighbours:
    returns the order (W,), and where in it each run of equal words starts.

    The order is that of a hash, whose lowest bits give way to the word's index: sorting such numbers takes
    a fifth of the time of np.argsort. Neighbours are then compared exactly, so that words whose hashes
    collide cost a longer result, never a wrong one.
    """
    bits = np.uint64(words.shape[1].bit_length())
    keys = np.sort(hash_words(words) >> bits << bits | np.arange(words.shape[1], dtype=np.uint64))
    order = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.intp)
    low, high = words[0][order], words[1][order]
    differs = np.ones(len(order), bool)
    differs[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return order, np.flatnonzero(differs)


def add_up(parts):
    """Join several (words (2, W), counts (W,)) into one,
    with the counts of equal words added up (but for words whose hashes collide).
    """
    words, counts = map(np.hstack, zip(*parts))
    order, starts = bring_together(words)
    return words[:, order[starts]], np.add.reduceat(counts[order], starts)


# ----------------------------------------------------------------------------------------------------- worker processes

def start_worker(function):
    """Make `function` a worker's task: it, with a whole tokenizer perhaps, is sent once and not with every task.

    Ctrl-C is the parent's to answer; a worker whose parent is gone, killed perhaps, goes too.
    """
    global task_of_worker
    task_of_worker = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: multiprocessing.connection.wait([parent]) and os._exit(1), daemon=True).start()


def run_task(task):
    """What a worker does with each task."""
    return task_of_worker(task)


@contextmanager
def ctrl_c_held_back():
    """Deliver Ctrl-C only after the block:
    a process that starts inside it inherits this, and is not caught half made.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_parallel(function, tasks, num_processes):
    """Yield function(task) of each task of a list, in its order,
    computed by num_processes (0: one for each core; 1: this one).

    No more than two results for each process wait to be fetched, so memory does not grow with the tasks.
    Raises RuntimeError if a worker dies.
    """
    cores = len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    # Windows cannot wait for more, and one parent feeds no more
    num_processes = min(num_processes or cores, len(tasks), 61)
    if num_processes < 2:
        yield from map(function, tasks)
        return
    try:
        with ProcessPoolExecutor(num_processes, initializer=start_worker, initargs=(function,)) as pool:
            waiting = deque()
            for task in tasks:
                with ctrl_c_held_back():
                    waiting.append(pool.submit(run_task, task))
                if len(waiting) > 2 * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError("a worker process died, perhaps for lack of memory: try --num_processes=1") from None


# ---------------------------------------------------------------------------------------------------------- 2. training
# All distinct words stand in one array of numbers: a cell for each byte,
# and a cell of -1 before, between and after the words.

def count_block(special, cut, block):
    """Count the words of one block of a file:
    distinct short words (2, D), their counts (D,), and a Counter of the long words.
    """
    text, _ = read_utf8(*block)
    parts, longs = [(np.empty((2, 0), np.uint64), np.empty(0, np.int64))], Counter()
    for piece in slices(text, cut):
        places, lengths, is_special = pretokenise(piece, special)
        short, long = (lengths <= SHORT) & ~is_special, (lengths > SHORT) & ~is_special
        words = pack(piece, places[short], lengths[short])
        order, starts = bring_together(words)
        parts.append((words[:, order[starts]], np.diff(starts, append=len(order))))
        longs.update(piece[place:place + length]
                     for place, length in zip(places[long].tolist(), lengths[long].tolist()))
    return *add_up(parts), longs


def count_words(path, specials, stop, num_processes, tell):
    """The distinct words in the first `stop` bytes of a file:
    their cells, (N,) int32, and how often each word occurs, (W,).
    """
    special, cut = special_pattern(specials), cut_pattern(specials)
    parts, held, fresh, longs, done = [], 0, 0, Counter(), 0
    tasks = list(blocks(path, cut, max(map(len, specials), default=0), 0, stop))
    for (*part, long), (_, start, end) in zip(in_parallel(partial(count_block, special, cut), tasks, num_processes),
                                              tasks):
        parts.append(part)
        longs.update(long)
        fresh += part[1].size
        if fresh > held + (1 << 20):  # add up when more have come than are held: memory follows the distinct words
            parts, fresh = [add_up(parts)], 0
            held = parts[0][1].size
        done += end - start
        tell("counting words", done, stop)
    words, counts = add_up(parts)
    cells, lengths = unpack(words)
    cells = cells.astype(np.int16)
    cells[np.arange(len(cells)), lengths] = -1
    cells = cells[np.arange(16) <= lengths[:, None]]  # row by row, each up to its -1
    tail = np.frombuffer(b"".join(word + b"\0" for word in longs), np.uint8).astype(np.int16)
    tail[np.cumsum([len(word) + 1 for word in longs], dtype=np.intp) - 1] = -1
    return (np.concatenate(([-1], cells, tail), dtype=np.int32),
            np.concatenate((counts, np.array(list(longs.values()), np.int64))))


class Segmentation:
    """Words cut into tokens:
    first[i] is the token that begins at cell i, or -1, and last[i] the token that ends there, where one does.

    With the lengths of the tokens both neighbours of a token are one look-up away: a merge needs no list of
    links, and all its places are done at once.
    """

    def __init__(self, cells, lengths):
        """cells: (N,) int32, a token or -1 each. lengths: (tokens,) bytes of each token."""
        self.first, self.last, self.lengths = cells, cells.copy(), lengths

    def pairs(self):
        """All pairs of neighbouring tokens, as numbers left << 32 | right,
        and the places where their left tokens begin; (P,) int64 each.
        """
        places = np.flatnonzero(self.first >= 0)
        left = self.first[places].astype(np.int64)
        right = self.first[places + self.lengths[left]]
        held = right >= 0
        return left[held] << 32 | right[held], places[held]

    def still_there(self, left, right, places):
        """Those of the places at which the pair left, right still stands."""
        places = places[self.first[places] == left]
        return places[self.first[places + self.lengths[left]] == right]

    def merge(self, left, right, new, places):
        """Put the token `new` in place of the pair left, right at these places.

        Returns the pairs that come into being, as pairs() does.
        """
        # in a row of equal tokens, only every second pair can be merged: count from where the row begins
        if left == right:
            places = np.sort(places)
            index = np.arange(len(places))
            row = np.maximum.accumulate(np.where(np.diff(places, prepend=-1) != self.lengths[left], index, 0))
            places = places[(index - row) % 2 == 0]
        ends = places + self.lengths[new]
        self.first[places + self.lengths[left]] = -1
        self.first[places] = new
        self.last[ends - 1] = new
        before, after = self.last[places - 1], self.first[ends]
        # of two new tokens side by side, the left one tells their pair
        has_before, has_after = (before >= 0) & (before != new), after >= 0
        before, after = before[has_before].astype(np.int64), after[has_after].astype(np.int64)
        return (np.concatenate((before << 32 | new, after | new << 32)),
                np.concatenate((places[has_before] - self.lengths[before], places[has_after])))


def group_pairs(pairs, places):
    """Sort places by the pairs that stand there:
    returns the distinct pairs, where the places of each start, and the places.
    """
    order = pairs.argsort()
    pairs = pairs[order]
    differs = np.ones(len(pairs), bool)
    np.not_equal(pairs[1:], pairs[:-1], out=differs[1:])
    starts = differs.nonzero()[0]
    return pairs[starts], starts, places[order]


def train_bpe(input_path, vocab_size, special_tokens, num_processes=0, stop=None, tell=lambda phase, done, total: None):
    """Train a byte-level BPE tokenizer:
    returns the vocabulary, dict[int, bytes], and the merges in order, list[tuple[bytes, bytes]].

    Ids: the 256 bytes, then the merges, then the special tokens (list[str]), which cut the text and are never
    merged. Each step merges the most frequent pair of neighbouring tokens, of equals the one whose byte strings are
    lexicographically greater. The result does not depend on num_processes (0: one for each core). The vocabulary
    stays smaller than vocab_size when the text runs out of pairs. Only the first `stop` bytes of the file count,
    where given; tell(phase, done, total) is called as the work goes on. Memory follows the distinct words.
    Raises ValueError for a vocab_size without room for bytes and special tokens, an empty special token, or an
    empty file; OSError for a file that cannot be read.
    """
    specials = list(dict.fromkeys(utf8(token) for token in special_tokens))
    if vocab_size < 256 + len(specials):
        raise ValueError(f"vocab_size {vocab_size} is too small: "
                         f"256 bytes and {len(specials)} special tokens need {256 + len(specials)}")
    stop = os.path.getsize(input_path) if stop is None else stop
    if stop == 0:
        raise ValueError(f"{input_path} is empty: there is nothing to train on")

    cells, counts = count_words(input_path, specials, stop, num_processes, tell)
    vocab = [bytes([byte]) for byte in range(256)]
    specials = [token for token in specials if token not in vocab]
    # each merge takes away a token at least: there can be no more
    target = min(vocab_size - len(specials), 256 + len(cells))
    merges, heap = [], []
    corpus = Segmentation(cells, np.ones(target, np.intp))
    word_of = np.cumsum(corpus.first < 0, dtype=np.int32) - 1  # (N,) the number of the word that each cell belongs to
    # Strings that sort in the opposite order of the tokens' bytes; the mark at their end puts "ab" before "a".
    descending = [chr(255 - byte) + "\u0100" for byte in range(256)]

    def watch(pairs, places, floor):
        """Put the pairs that occur `floor` times or more on the heap
        (0: an eighth as often as the most frequent one, or more); return floor.
        """
        pairs, starts, places = group_pairs(pairs, places)
        occur = np.add.reduceat(counts[word_of[places]], starts)
        floor = floor or max(1, int(occur.max(initial=0)) // 8)
        often = (occur >= floor).nonzero()[0]
        for i, pair, n in zip(often.tolist(), pairs[often].tolist(), occur[often].tolist()):
            left, right = divmod(pair, 1 << 32)
            end = starts[i + 1] if i + 1 < len(starts) else len(places)
            heapq.heappush(heap, (-n, descending[left], descending[right], left, right, places[starts[i]:end]))
        return floor

    # Once a pair has come into being its count can only fall. So a count on the heap is an upper bound
    # that is made true when it comes to the top, instead of after every merge that takes a place away;
    # and rare pairs, the great majority, need no watching until the frequent ones are used up: leaving
    # them out makes 10,000 merges 1.7 times as fast.
    while len(vocab) < target:
        if not heap:
            floor = watch(*corpus.pairs(), 0)
            if not heap:
                break  # every word is one token
        bound, _, _, left, right, places = heapq.heappop(heap)
        places = corpus.still_there(left, right, places)
        occurs = int(counts[word_of[places]].sum())
        if occurs < -bound:
            if occurs >= floor:
                heapq.heappush(heap, (-occurs, descending[left], descending[right], left, right, places))
            continue
        new = len(vocab)
        merges.append((vocab[left], vocab[right]))
        vocab.append(vocab[left] + vocab[right])
        descending.append(descending[left][:-1] + descending[right])
        corpus.lengths[new] = len(vocab[new])
        watch(*corpus.merge(left, right, new, places), floor)
        tell("merging pairs", len(merges), target - 256)
    return dict(enumerate(vocab + specials)), merges


# --------------------------------------------------------------------------------------------- 3. encoding and decoding

def first_slot(hashes):
    """The slot of the word table for a word of this hash."""
    return (hashes >> np.uint64(64 - SLOT_BITS)).astype(np.intp)


def second_slot(hashes):
    """The slot for it if another word was there first."""
    return first_slot(hashes * np.uint64(0xD6E8FEB86659FD93))


class WordTable:
    """The token ids of short words, looked up for many words at once: a cache in arrays, of fixed size.

    A word stands in one of two slots that its hash names, or nowhere; its ids lie in a pool that all words
    share. With this table one core encodes text of known words at 80 MB/s, with a dict of bytes objects at 41.
    """

    def __init__(self, dtype):
        """dtype: of the token ids."""
        self.dtype = dtype
        self.clear()

    def clear(self):
        """Forget all words, and where their ids were."""
        self.pool = np.empty(0, self.dtype)
        # a word's two numbers (none is all zeros), then begin and size of its ids in the pool
        self.slots = np.zeros((1 << SLOT_BITS, 4), np.int64)

    def find(self, words):
        """Where the ids of words (2, W) begin in the pool and how many they are, (2, W),
        and whether the word is known at all, (W,).
        """
        hashes, wanted = hash_words(words), words.view(np.int64)
        rows = self.slots.take(first_slot(hashes), axis=0)  # take copies whole rows, seven times as fast as slots[...]
        known = (rows[:, 0] == wanted[0]) & (rows[:, 1] == wanted[1])
        others = np.flatnonzero(~known)
        second = self.slots.take(second_slot(hashes[others]), axis=0)
        rows[others], known[others] = second, (second[:, :2] == wanted[:, others].T).all(axis=1)
        return rows[:, 2:].T, known

    def add(self, ids, sizes):
        """Put the ids of some words, `sizes` (W,) each, into the pool:
        returns where they begin and how many they are, (2, W).
        """
        begins = np.cumsum(sizes) - sizes + len(self.pool)
        self.pool = np.concatenate((self.pool, ids))
        return np.stack((begins, sizes))

    def put(self, words, places):
        """Make words (2, W) known:
        each in its first slot if that is free, else in its second, and what stood there is forgotten.
        """
        hashes = hash_words(words)
        slot = first_slot(hashes)
        taken = self.slots[slot, 3] > 0
        slot[taken] = second_slot(hashes[taken])
        self.slots[slot] = np.stack((*words.view(np.int64), *places), axis=1)

    def gather(self, begins, sizes):
        """The ids at all these places of the pool, one after another."""
        ends = np.cumsum(sizes)
        return self.pool[np.arange(sizes.sum()) + np.repeat(begins - (ends - sizes), sizes)]


# GPT-2 writes a byte as one visible character: itself where it is one in Latin-1,
# else the next of U+0100, U+0101 and so on (a blank is U+0120).
VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
CHARACTER = [chr(byte) if byte in VISIBLE else chr(256 + sum(b not in VISIBLE for b in range(byte)))
             for byte in range(256)]
BYTE = {ord(character): byte for byte, character in enumerate(CHARACTER)}


def shown(token):
    """The visible form of a token's bytes: shown(b" the") is "\u0120the"."""
    return "".join(CHARACTER[byte] for byte in token)


@contextmanager
def replacing(path):
    """Yield a temporary name beside `path`, which takes its place when the block ends well:
    nobody ever sees half a file.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            # the bytes reach the disk before the name does: a power cut leaves the old file or the new one
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it could not take
        raise
    finally:
        temporary.unlink(missing_ok=True)


class Tokenizer:
    """Text to token ids and back, with a trained vocabulary.

    vocab: dict[int, bytes], ids 0..n-1. merges: list[tuple[bytes, bytes]] in the order of training.
    special_tokens: list[str] that are one token each in text to encode; those that the vocabulary lacks are
    appended to it. Where several match, the leftmost wins, then the longest.
    Raises ValueError for a vocabulary and merges that do not fit together.
    """

    def __init__(self, vocab, merges, special_tokens=None):
        self.vocab, self.merges = dict(vocab), list(merges)
        if sorted(self.vocab) != list(range(len(self.vocab))):
            raise ValueError(f"the {len(self.vocab)} token ids are not 0 to {len(self.vocab) - 1}, each once")
        ids = {token: number for number, token in self.vocab.items()}
        if len(ids) < len(self.vocab):
            raise ValueError(f"{len(self.vocab)} token ids stand for {len(ids)} different tokens: one stands twice")
        for token in special_tokens or ():
            if utf8(token) not in ids:
                self.vocab[len(ids)] = utf8(token)
                ids[utf8(token)] = len(ids)
        self.special_tokens = {token: ids[utf8(token)] for token in special_tokens or ()}
        made, used = {bytes([byte]) for byte in range(256)}, set()
        if missing := made - ids.keys():
            raise ValueError(f"the vocabulary lacks the byte {min(missing)!r} and could not encode every text")
        for left, right in self.merges:
            if left not in made or right not in made or left + right not in ids:
                raise ValueError(f"the merge of {left!r} and {right!r} does not fit the vocabulary: "
                                 "each part must be a byte or made by an earlier merge, and the whole must have an id")
            if left + right in used:
                raise ValueError(f"{left!r} and {right!r} make a token that an earlier merge joins already: "
                                 "which goes first is not defined")
            made.add(left + right)
            used |= {left, right}
        self.byte_ids = np.array([ids[bytes([byte])] for byte in range(256)])
        self.triples = [(ids[left], ids[right], ids[left + right]) for left, right in self.merges]
        if len(set(self.triples)) < len(self.triples):
            raise ValueError(f"{len(self.triples) - len(set(self.triples))} merges stand twice")
        left, right, self.merged = np.array(self.triples, np.int64).reshape(-1, 3).T
        # a last one that no pair has: looking up never falls off the end
        keys = np.append(left << 32 | right, 2 ** 63 - 1)
        order, ranks = np.argsort(keys), np.append(np.arange(len(self.triples)), NEVER)
        self.keys, self.ranks = keys[order], ranks[order]
        # A hash table of pairs and ranks: most of them, each in the slot that its hash names.
        # -2 is no pair, not even one with a cell of -1.
        self.slots = np.full((4 << len(keys).bit_length(), 2), -2)
        self.slots[self.slot(keys)] = np.stack((keys, ranks), axis=1)
        self.rank_of_bytes = self.rank(self.byte_ids[:, None] << 32 | self.byte_ids).astype(np.int32)  # (256, 256)
        self.lengths = np.array([len(self.vocab[number]) for number in range(len(self.vocab))])
        self.dtype = np.dtype("<u2" if len(self.vocab) <= 65536 else "<u4")
        self.special_ids = {utf8(token): self.dtype.type(number).tobytes()
                            for token, number in self.special_tokens.items()}
        self.special, self.cut = special_pattern(list(self.special_ids)), cut_pattern(list(self.special_ids))
        self.longest_special = max(map(len, self.special_ids), default=0)
        self.table = WordTable(self.dtype)
        self.cache = dict(self.special_ids)  # word: its token ids, as bytes of self.dtype

    def slot(self, pairs):
        """The slot of each pair in the table of ranks."""
        return (pairs.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
                >> np.uint64(65 - len(self.slots).bit_length())).astype(np.intp)

    def rank(self, pairs):
        """The rank, which is the place in the order of merges, of pairs of ids (int64, left << 32 | right);
        NEVER where no merge joins them.
        """
        there, ranks = np.moveaxis(self.slots.take(self.slot(pairs), axis=0), -1, 0)
        ranks = np.where(there == pairs, ranks, NEVER)
        # another pair has the slot: search, which for all pairs takes twice as long
        unsure = np.nonzero((there != pairs) & (there >= 0))
        found = np.searchsorted(self.keys, pairs[unsure])
        ranks[unsure] = np.where(self.keys[found] == pairs[unsure], self.ranks[found], NEVER)
        return ranks

    @classmethod
    def from_files(cls, vocab_filepath, merges_filepath, special_tokens=None, every_special=False):
        """Load vocab.json and merges.txt as save, Hugging Face or GPT-2 wrote them.
        Raises ValueError, naming the file, if they are broken.

        every_special: treat as special, too, every token that is neither a byte nor made by a merge.
        """
        try:
            pairs = json.loads(Path(vocab_filepath).read_text(encoding="utf-8"), object_pairs_hook=list)
            table = {text: number for text, number in pairs if isinstance(text, str) and type(number) is int}
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{vocab_filepath} is no JSON object of tokens and their ids: {error}") from None
        if len(set(table.values())) < len(pairs):
            raise ValueError(f"{vocab_filepath} has a token or an id twice, or an id that is no whole number")
        try:
            lines = Path(merges_filepath).read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{merges_filepath} is not UTF-8: {error}") from None
        merges, made, allowed = [], set(CHARACTER), {*CHARACTER, " "}
        for number, line in enumerate(lines, 1):
            if line.strip() and not (number == 1 and line.startswith("#version")):
                parts = line.rstrip("\r").split(" ")
                if len(parts) != 2 or not allowed.issuperset(line.rstrip("\r")):
                    raise ValueError(f"{merges_filepath}, line {number}: "
                                     f"{line!r} is not two tokens with a blank between them")
                merges.append(tuple(part.translate(BYTE).encode("latin-1") for part in parts))
                made.add("".join(parts))
        # What is neither a byte nor made by a merge is a special token, and stands in the file as it is.
        vocab = {number: text.translate(BYTE).encode("latin-1") if text in made else utf8(text)
                 for text, number in table.items()}
        specials = [text for text in table if text not in made] if every_special else []
        try:
            return cls(vocab, merges, [*(special_tokens or ()), *specials])
        except ValueError as error:
            raise ValueError(f"{vocab_filepath} with {merges_filepath}: {error}") from None

    @classmethod
    def from_folder(cls, folder):
        """Load a folder's vocab.json and merges.txt,
        and treat as special every token that is neither a byte nor made by a merge.
        """
        return cls.from_files(Path(folder) / "vocab.json", Path(folder) / "merges.txt", every_special=True)

    def save(self, folder):
        """Write vocab.json and merges.txt into a folder, in GPT-2's format; each file is replaced as a whole."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        ordinary = {bytes([byte]) for byte in range(256)} | {left + right for left, right in self.merges}
        table = {shown(token) if token in ordinary else token.decode(): number
                 for number, token in sorted(self.vocab.items())}
        if len(table) < len(self.vocab):
            clash = next(token.decode() for token in self.vocab.values()
                         if token not in ordinary and token.decode() in map(shown, ordinary))
            raise ValueError(f"the special token {clash!r} is how vocab.json writes an ordinary token: choose another")
        lines = "".join(f"{shown(left)} {shown(right)}\n" for left, right in self.merges)
        with replacing(Path(folder) / "vocab.json") as vocab_json, replacing(Path(folder) / "merges.txt") as merges_txt:
            vocab_json.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
            merges_txt.write_text("#version: 0.2\n" + lines, encoding="utf-8", newline="\n")

    def ids_of_words(self, words):
        """The token ids of each pre-token or special token in a list, as bytes of self.dtype;
        from the cache where it has them.
        """
        missing = [word for word in words if word not in self.cache]
        if not missing:
            return [self.cache[word] for word in words]
        missing, found = list(dict.fromkeys(missing)), {}
        # each round of merge_words pays for its longest word
        for shortest, longest in (1, 16), (17, 32), (33, 64), (65, LONG):
            group = [word for word in missing if shortest <= len(word) <= longest]
            matrix = np.frombuffer(b"".join(word.ljust(longest) for word in group), np.uint8).reshape(-1, longest)
            ids, sizes = self.merge_words(matrix, np.array([len(word) for word in group], np.intp))
            found.update((word, part.tobytes()) for word, part in zip(group, np.split(ids, np.cumsum(sizes))))
        # not cached: they may be megabytes
        long = {word: self.merge_long(word) for word in missing if len(word) > LONG}
        encoded = [self.cache.get(word) or found.get(word) or long[word] for word in words]
        if len(self.cache) + len(found) > CACHE:
            self.cache = dict(self.special_ids)
        self.cache.update(found)
        return encoded

    def merge_words(self, words, lengths):
        """The token ids of W words, one word after another, and how many each has:
        in a round, every word's pair of lowest rank is merged.

        words: (W, n) uint8, their bytes and then anything. lengths: (W,), up to LONG. One word after another in
        plain Python takes 10 microseconds a word, this 1.
        """
        W, n = words.shape
        columns = np.ascontiguousarray(words.T)  # (n, W)
        inside = np.arange(n)[:, None] < lengths
        # A column a word, with cells as in Segmentation. key: rank << 8 | row of the pair whose left token
        # begins there, so that the least key of a column is its pair of lowest rank, and of equals the first.
        cells, key = np.full((n + 2, W), -1, np.int32), np.full((n + 2, W), NEVER, np.int64)
        cells[1:-1] = np.where(inside, self.byte_ids[columns], -1)
        key[1:-2] = np.where(inside[1:], self.rank_of_bytes[columns[:-1], columns[1:]], NEVER)
        key = key << 8 | np.arange(n + 2)[:, None]
        # flat: the cell below is W further
        first, last, flat_key, size = cells.ravel(), cells.ravel().copy(), key.ravel(), self.lengths * W
        while True:
            least = key.min(axis=0)
            word = np.flatnonzero(least < NEVER << 8)
            if not len(word):
                break
            new, row = self.merged[least[word] >> 8], least[word] & 255
            place = row * W + word
            middle, end = place + size[first[place]], place + size[new]
            first[middle], flat_key[middle] = -1, NEVER << 8
            first[place] = last[end - W] = new
            before, after = last[place - W], first[end]
            flat_key[place] = self.rank(new << 32 | after) << 8 | row
            held = np.flatnonzero(before >= 0)
            before = before[held].astype(np.int64)
            flat_key[place[held] - size[before]] = (self.rank(before << 32 | new[held]) << 8
                                                    | (row[held] - self.lengths[before]))
        return cells.T[cells.T >= 0].astype(self.dtype), (cells >= 0).sum(axis=0)

    def merge_long(self, word):
        """The token ids of a word of any length, as bytes:
        rank by rank, all places of a pair at once, O(n log n) where round by round is O(n^2).
        """
        text = Segmentation(np.array([-1, *self.byte_ids[list(word)], -1], np.int32), self.lengths)
        heap, places_of = [], {}

        def watch(pairs, places):
            pairs, starts, places = group_pairs(pairs, places)
            for rank, group in zip(self.rank(pairs).tolist(), np.split(places, starts[1:])):
                if rank < NEVER:
                    if rank not in places_of:
                        heapq.heappush(heap, rank)
                    places_of.setdefault(rank, []).append(group)

        watch(*text.pairs())
        while heap:
            rank = heapq.heappop(heap)
            left, right, new = self.triples[rank]
            watch(*text.merge(left, right, new, text.still_there(left, right, np.concatenate(places_of.pop(rank)))))
        return text.first[text.first >= 0].astype(self.dtype).tobytes()

    def encode(self, text):
        """The token ids of a str, list[int]. Special tokens in it become their ids; lone surrogates count as U+FFFD."""
        raw = utf8(text)
        if len(raw) > 4096:
            return self.encode_bytes(raw).tolist()
        # For a few words the pattern itself is faster than setting up arrays: 5 microseconds instead of 200.
        words, start = [], 0
        for match in self.special.finditer(raw) if self.special else ():
            words += [word.encode() for word in PATTERN.findall(raw[start:match.start()].decode())] + [match[0]]
            start = match.end()
        words += [word.encode() for word in PATTERN.findall(raw[start:].decode())]
        return np.frombuffer(b"".join(self.ids_of_words(words)), self.dtype).tolist()

    def encode_bytes(self, text):
        """The token ids of valid UTF-8, (tokens,) of self.dtype."""
        ids, rest = [np.empty(0, self.dtype)], slices(text, self.cut)
        # Eight slices share one merge of new words; the very first goes alone,
        # for it teaches the table most words of the rest.
        while some := list(islice(rest, 8 if len(self.table.pool) else 1)):
            ids += self.encode_slices(some)
        return np.concatenate(ids)

    def encode_slices(self, texts):
        """The token ids of each of some slices:
        words are looked up in the table, and what it lacks is merged, that of all slices in one go.
        """
        if len(self.table.pool) > 8 << SLOT_BITS:
            self.table.clear()
        # One entry a slice. found: where each word's ids begin in the table's pool and how many they are,
        # (2, words). new: the index of each word that the table lacks, and these words packed. others: the same
        # for long words and special tokens, as bytes.
        found, new, others = [], [], []
        for text in texts:
            places, lengths, is_special = pretokenise(text, self.special)
            is_short = (lengths <= SHORT) & ~is_special
            short, other = np.flatnonzero(is_short), np.flatnonzero(~is_short)
            words, where = pack(text, places[short], lengths[short]), np.empty((2, len(places)), np.intp)
            where[:, short], known = self.table.find(words)
            found.append(where)
            new.append((short[~known], words[:, ~known]))
            others.append((other, [text[place:place + length]
                                   for place, length in zip(places[other].tolist(), lengths[other].tolist())]))

        # Merge each distinct new short word once, and hand the place of its ids to all its occurrences.
        words = np.hstack([words for _, words in new])
        order, starts = bring_together(words)
        distinct = words[:, order[starts]]
        learnt = self.table.add(*self.merge_words(*unpack(distinct)))
        self.table.put(distinct, learnt)
        of_new = np.empty((2, len(order)), np.intp)
        of_new[:, order] = np.repeat(learnt, np.diff(starts, append=len(order)), axis=1)
        encoded = self.ids_of_words([word for _, words in others for word in words])
        of_others = self.table.add(np.frombuffer(b"".join(encoded), self.dtype),
                                   np.array([len(ids) for ids in encoded], np.intp) // self.dtype.itemsize)
        for where, (at, _), (others_at, _) in zip(found, new, others):  # each slice takes the next columns of both
            where[:, at], of_new = np.split(of_new, [len(at)], axis=1)
            where[:, others_at], of_others = np.split(of_others, [len(others_at)], axis=1)
        return [self.table.gather(*where) for where in found]

    def encode_iterable(self, iterable):
        """Yield the ids of the strings in an iterable, as encode gives them for the joined text, lazily:
        memory follows the longest string.
        """
        text, tried = bytearray(), 0
        for item in iterable:
            text += utf8(item)
            if len(text) - tried > 8192:
                # near the end: little stays behind
                place = self.cut.search(text, max(tried, len(text) - self.longest_special - 4096))
                # else a special token could still come to lie across it
                if place and place.start() + self.longest_special <= len(text):
                    yield from self.encode_bytes(bytes(text[:place.start()])).tolist()
                    del text[:place.start()]
                    tried = 0
                else:
                    tried = len(text) - self.longest_special
        yield from self.encode_bytes(bytes(text)).tolist()

    def encode_block(self, block):
        """The ids of one block of a file, as bytes of self.dtype, and how many malformed places it had."""
        text, malformed = read_utf8(*block)
        return self.encode_bytes(text).tobytes(), malformed

    def encode_file(self, text_path, bin_path, num_processes=0, start=0, stop=None,
                    tell=lambda phase, done, total, malformed: None):
        """Encode a UTF-8 file (bytes start..stop of it, where given) into a file of raw little-endian ids;
        return their number.

        uint16 up to 65,536 tokens in the vocabulary, else uint32. Uses num_processes (0: one for each core) and
        memory that does not grow with the file; malformed bytes count as U+FFFD.
        tell(phase, done, total, malformed) is called as the work goes on. bin_path is replaced as a whole.
        """
        stop, done, written = os.path.getsize(text_path) if stop is None else stop, 0, 0
        tasks = list(blocks(text_path, self.cut, self.longest_special, start, stop))
        with replacing(bin_path) as path, open(path, "wb") as file:
            for (ids, malformed), (_, begin, end) in zip(in_parallel(self.encode_block, tasks, num_processes), tasks):
                file.write(ids)
                written += len(ids)
                done += end - begin
                tell(f"encoding {Path(text_path).name}", done, stop - start, malformed)
        return written // self.dtype.itemsize

    def decode(self, ids):
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id that the vocabulary lacks.
        """
        try:
            return b"".join([self.vocab[number] for number in ids]).decode(errors="replace")
        except KeyError as error:
            raise ValueError(f"the vocabulary has {len(self.vocab)} tokens, none with id {error}") from None


# ------------------------------------------------------------------------------- the command line, for all four scripts

class InputError(ValueError):
    """What the user gave cannot be used."""


class UsageError(InputError):
    """A flag or its value is wrong: one_line_errors ends the script with status 2."""


def flags_of(script):
    """The flags of a script: {name: (default, comment)},
    read from the block of constants at its top (lower-case names, one literal a line).
    """
    source = Path(script).read_text(encoding="utf-8")
    comments = {token.start[0]: token.string.lstrip("# ")
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    return {node.targets[0].id: (ast.literal_eval(node.value), comments.get(node.lineno, ""))
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.islower()}


def parse_value(name, text, default):
    """The text behind --name as a value of the default's type. Raises UsageError, naming the type that is wanted."""
    try:
        if isinstance(default, bool):
            return {"True": True, "False": False}[text]
        value = type(default)(text)
        if isinstance(value, str) or abs(value) < 2 ** 63 and math.isfinite(value):
            return value
    except (KeyError, ValueError):
        pass
    wanted = {bool: "True or False", int: "a whole number below 2**63",
              float: "a finite number below 2**63"}[type(default)]
    raise UsageError(f"--{name}={text!r}: wants {wanted}, as in --{name}={default}")


def configure(constants, arguments=None):
    """Override a script's module-level constants from its command line (`--name=value` or `--name value`)
    and return them all as a dict.

    constants: the script's globals(), changed in place. arguments: the command line, sys.argv[1:] where None.
    `--help` prints the constants with their comments and exits. Raises UsageError for an unknown name, a name
    given twice, and a value missing or of the wrong type.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags = flags_of(constants["__file__"])
    if "--help" in arguments or "-h" in arguments:
        width = max(len(f"--{name}={default}") for name, (default, _) in flags.items())
        print((constants["__doc__"] or "").strip(), "\n\nFlags, with their defaults:", sep="")
        print("\n".join(f"  {f'--{name}={default}':<{width}}  {comment}" for name, (default, comment) in flags.items()))
        sys.exit(0)
    given = {}
    while arguments:
        word = arguments.pop(0)
        name, equals, text = word[2:].partition("=")
        if not word.startswith("--") or name not in flags:
            near = difflib.get_close_matches(name if word.startswith("--") else word, flags, n=1, cutoff=0)[0]
            raise UsageError(f"{word!r} is no flag; the nearest is --{near} (--help lists them all)")
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise UsageError(f"--{name} wants a value, as in --{name}={flags[name][0]}")
            text = arguments.pop(0)
        if name in given:
            raise UsageError(f"--{name} is given twice: {given[name]!r} and {text!r}")
        given[name] = parse_value(name, text, flags[name][0])
    constants.update(given)
    return {name: constants[name] for name in flags}


def require(holds, message):
    """Raise UsageError(message) unless `holds`: for flags whose value has the right type but makes no sense."""
    if not holds:
        raise UsageError(message)


@contextmanager
def one_line_errors():
    """End the script on an error with one line on stderr:
    status 2 for a UsageError, 1 for a failure at run time, 130 for Ctrl-C.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the caller has closed it
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as `| head` does: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except OSError as error:
        message, status = f"{error.filename}: {error.strerror}" if error.filename else str(error), 1
    except (ValueError, RuntimeError, MemoryError, FloatingPointError) as error:
        message, status = str(error) or type(error).__name__, 2 if isinstance(error, UsageError) else 1
    else:
        return
    print(f"{Path(sys.argv[0]).name}: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


@contextmanager
def only_run_in(folder):
    """Make `folder`, and hold it for this process until the block ends. Raises BlockingIOError if another run holds it.

    The lock is the operating system's, so it ends with its process, however that dies;
    the empty file .lock stays behind.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "a") as file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # what flock and what locking raise for a lock that is held
            raise BlockingIOError(f"another run is at work in {folder}: "
                                  "wait for it, or choose another folder") from None
        yield


# ----------------------------------------------------------------------------------------------------- the main program

class Report:
    """Seconds for each phase of the work, malformed places,
    and on a terminal a line that says how far the present phase is.
    """

    def __init__(self):
        self.seconds, self.malformed, self.phase, self.since, self.shown = {}, 0, None, time.perf_counter(), 0.0

    def __call__(self, phase, done, total, malformed=0):
        """Note that `done` of `total` units of a phase are done: bytes, merges, or the one of a phase in one piece."""
        now, self.malformed = time.perf_counter(), self.malformed + malformed
        if phase != self.phase:
            self.phase, self.begin = phase, self.since
        self.since, self.seconds[phase] = now, now - self.begin
        if sys.stdout.isatty() and now - self.shown > 0.1:
            self.shown, left = now, (total - done) * self.seconds[phase] / done
            speed = (f" {done / 1e6 / self.seconds[phase]:.0f} MB/s"
                     if phase.startswith(("counting", "encoding")) else "")
            line = f"{done / total:4.0%}{speed} {left:.0f} s left, {phase}"
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Take the line off the terminal."""
        if sys.stdout.isatty():
            print("\r" + " " * (shutil.get_terminal_size().columns - 1), end="\r", flush=True)


def standard_library(path):
    """Write the source of Python's standard library into one file:
    modules in sorted order, tests and site-packages left out, END after each.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(module.relative_to(root).as_posix() for module in root.rglob("*.py"))
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        for module in modules:
            if not {"test", "tests", "idle_test", "site-packages"} & set(module.split("/")):
                file.write((root / module).read_text(encoding="utf-8", errors="replace") + END)


def start_of_held_out(path, specials):
    """Where the last documents of a file begin, a twentieth of it but 10 MB at most:
    after a special token or, if there is none, between two words.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.seek(size - min(size // 20, 10_000_000))
        tail = file.read()
    special, last = special_pattern(specials), len(tail.rstrip())
    ends = (match.end() for match in special.finditer(tail) if match.end() < last) if special else iter(())
    place = next(ends, None) or next((match.start() for match in cut_pattern(specials).finditer(tail)), None)
    if place is None:
        raise ValueError(f"{path}: found no place near the end to hold out text for validation; "
                         "name a file with --val_data")
    return start + place


def peak_memory():
    """The peak memory of this process and of its largest worker, as a line for the report."""
    try:
        import resource
    except ImportError:
        return "not known on this platform"
    unit = 1e6 if sys.platform == "darwin" else 1e3
    own, worker = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return f"{own:.0f} MB, largest worker process {worker:.0f} MB"


def main():
    for name, path in ("data", data), ("val_data", val_data):
        if path and not os.path.isfile(path):
            raise FileNotFoundError(f"--{name}={path!r} is {'a folder' if os.path.isdir(path) else 'not there'}: "
                                    "wants a text file")
        if path and not os.path.getsize(path):
            raise ValueError(f"--{name}={path!r} is empty")
        require(not path or Path(path).resolve().parent != Path(data_dir).resolve() or Path(path).name not in OUTPUTS,
                f"--{name}={path!r} is a file that this run would replace: choose another --data_dir")
    require(data_dir, "--data_dir is empty: name a folder")
    require(num_processes >= 0, f"--num_processes={num_processes}: wants 0, for one for each core, or more")
    specials = list(dict.fromkeys(token for token in special_tokens.split(",") if token))
    for token in specials:
        require(len(utf8(token)) > 1 and (token.isascii() or not set(token) <= set(CHARACTER)),
                f"--special_tokens: {token!r} reads like the bytes of an ordinary token in vocab.json: choose another")
    require(vocab_size >= 256 + len(specials),
            f"--vocab_size={vocab_size}: wants {256 + len(specials)} at least, "
            f"for 256 bytes and {len(specials)} special tokens")
    folder, report, began = Path(data_dir), Report(), time.perf_counter()

    with only_run_in(folder), report:
        for name in (*OUTPUTS, "stdlib.txt"):
            for left_over in folder.glob(f"{name}.tmp*"):
                left_over.unlink()  # by a killed run
        text = Path(data or folder / "stdlib.txt")
        if not data:
            standard_library(text)
            report("collecting the standard library", 1, 1)
        size = os.path.getsize(text)
        if tokenizer_dir:
            tokenizer = Tokenizer.from_folder(tokenizer_dir)
            specials = list(tokenizer.special_tokens)
            report("loading the tokenizer", 1, 1)
        train_stop = size if val_data else start_of_held_out(text, [utf8(token) for token in specials])
        if not tokenizer_dir:
            vocab, merges = train_bpe(text, vocab_size, specials, num_processes, train_stop, report)
            tokenizer = Tokenizer(vocab, merges, specials)
        with replacing(folder / "train.bin") as train_bin, replacing(folder / "val.bin") as val_bin:
            train_tokens = tokenizer.encode_file(text, train_bin, num_processes, 0, train_stop, report)
            encoded_in = report.seconds[report.phase]
            if val_data:
                val_tokens = tokenizer.encode_file(val_data, val_bin, num_processes, tell=report)
            else:
                val_tokens = tokenizer.encode_file(text, val_bin, num_processes, train_stop, size, report)
            tokenizer.save(folder)  # now all four files are there, and take their places together

    val_size = os.path.getsize(val_data) if val_data else size - train_stop
    speed = train_stop / 1e6 / encoded_in
    print(f"text: {text}, {train_stop / 1e6:.1f} MB to train on, {val_size / 1e6:.1f} MB for validation"
          + (f"; {report.malformed} malformed places, read as U+FFFD" if report.malformed else ""))
    if not tokenizer_dir and len(tokenizer.vocab) < vocab_size:
        print("the text has no more pairs to merge: "
              f"the vocabulary ends at {len(tokenizer.vocab)} tokens, short of {vocab_size}")
    print("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in report.seconds.items())
          + f"; {time.perf_counter() - began:.2f} in all")
    print(f"peak memory: {peak_memory()}")
    longest = sorted(tokenizer.vocab.values(), key=len, reverse=True)[:5]
    print("longest tokens: "
          + ", ".join(f"{token.decode(errors='replace')!r} ({len(token)} bytes)" for token in longest))
    print(f"bytes per token: {train_stop / train_tokens:.3f} in training, "
          f"{val_size / val_tokens:.3f} in validation text")
    print(f"encoding: {speed:.1f} MB/s; the Pile (825 GB) would take {825e3 / speed / 3600:.1f} hours")
    print(f"wrote vocab.json ({len(tokenizer.vocab):,} tokens), merges.txt, "
          f"train.bin ({train_tokens:,} ids, {tokenizer.dtype.name}) and val.bin ({val_tokens:,}) into {folder}")


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        main()
