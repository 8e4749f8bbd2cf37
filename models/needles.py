"""Needle tasks: facts hidden in text, and questions about them.

A needle in a haystack is one statement with a random value, `the code of tamoki is 48213`, at a given depth of a text,
and at the end of the text the question for it. A model has found it when its greedy continuation is the value, every
digit of it. `needle` makes such prompts to the byte; `recall_sequence` and `pair_sequence` make what a model learns
the skill from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError

TEMPLATES = (b"the code of %s is ", b"the number for %s: ", b"%s = ", b"the pass key of %s was ")
DIGITS = 5
CONSONANTS, VOWELS, SYLLABLES = b"bcdfghjklmnprstvwz", b"aeiou", 3

IGNORED, TEXT, ANSWER = 0, 1, 2
"""What a byte of a training sequence is: random and not to be foreseen, text, or known from what stands before it."""

Pieces = list[tuple[bytes, int]]
Sequence = tuple[NDArray[np.uint8], NDArray[np.int8]]


@dataclass(frozen=True)
class Needle:
    """One task.

    Attributes:
        prompt: haystack, statements and question; the next bytes should be `answer`.
        answer: the value's digits.
        position: offset of the statement in the prompt.
        statement: what stands there.
    """

    prompt: bytes
    answer: bytes
    position: int
    statement: bytes


def needle(text: bytes, length: int, depth: float, generator: np.random.Generator, *, distractors: int = 0) -> Needle:
    """Hide a fact at a depth of a piece of `text`, and ask for it.

    Args:
        text: what haystacks are cut from; longer than `length`.
        length: bytes of the prompt, exactly.
        depth: 0 puts the statement first, 1 right before the question; between them it divides the haystack so.
        generator: draws the haystack, names, values and phrasing.
        distractors: further facts of the same phrasing with other names, at random places.

    Raises:
        InputError: a depth outside 0..1, or a text or length that is too short for the facts.
    """
    if not 0 <= depth <= 1:
        raise InputError(f"the depth of a needle is in 0..1; got {depth}")
    names = draw_names(generator, 1 + distractors)
    template = TEMPLATES[generator.integers(len(TEMPLATES))]
    values = [draw_value(generator) for _ in names]
    statements = [statement(template, name, value) for name, value in zip(names, values, strict=True)]
    asked = question(template, names[0])
    room = length - len(asked) - sum(map(len, statements))
    if room < 0 or len(text) <= room:
        raise InputError(
            f"a needle task of {length} bytes with {distractors} distractors needs {length - room} bytes for facts and "
            f"question and more than {max(room, 0)} bytes of text; there are {len(text)} bytes of text"
        )
    haystack = draw_text(text, room, generator)
    places = [round(depth * room), *generator.integers(0, room + 1, distractors)]
    prompt, previous, position = b"", 0, 0
    # Of facts at one place the needle comes first at depths in the first half, else last: 0 and 1 stay exact.
    for index in sorted(range(len(places)), key=lambda i: (places[i], (i > 0) == (depth < 0.5))):
        prompt += haystack[previous : places[index]]
        previous = places[index]
        if index == 0:
            position = len(prompt)
        prompt += statements[index]
    return Needle(prompt + haystack[previous:] + asked, values[0], position, statements[0])


def recall_sequence(
    text: bytes,
    length: int,
    facts: int,
    questions: int,
    templates: int,
    generator: np.random.Generator,
    *,
    alike: float = 0.0,
) -> Sequence:
    """`facts` facts at random places of a text, then questions for some of them, answered.

    Args:
        text: longer than `length`.
        length: bytes of the sequence.
        facts: how many.
        questions: for how many of them.
        templates: phrasings to draw from, at most `len(TEMPLATES)`.
        generator: draws all this.
        alike: how often all facts are phrased alike, so that only names tell them apart.

    Returns:
        bytes uint8 `[length]`, and for each what it is, int8 `[length]`. Where all this is longer, its beginning is
        missing.
    """
    names = [draw_name(generator) for _ in range(facts)]
    values = [draw_value(generator) for _ in range(facts)]
    phrasing = _phrasing(facts, templates, alike, generator)
    asked = [(question(phrasing[i], names[i]), values[i]) for i in generator.permutation(facts)[:questions]]
    stated = [statement(*fact) for fact in zip(phrasing, names, values, strict=True)]
    room = length - sum(len(ask) + DIGITS + 2 for ask, _ in asked) - sum(map(len, stated))
    haystack = draw_text(text, room, generator) if room > 0 else b""
    places = np.sort(generator.integers(0, room + 1, facts)) if room > 0 else np.zeros(facts, dtype=np.int64)
    pieces: Pieces = []
    previous = 0
    for place, fact in zip(places, stated, strict=True):
        cut = len(fact) - DIGITS - 2
        pieces += [(haystack[previous:place], TEXT), (fact[:cut], TEXT), (fact[cut:-2], IGNORED), (fact[-2:], TEXT)]
        previous = place
    pieces.append((haystack[previous:], TEXT))
    for ask, value in asked:
        pieces += [(ask, TEXT), (value, ANSWER), (b".\n", TEXT)]
    return _joined(pieces, slice(-length, None))


def pair_sequence(
    text: bytes, length: int, pool: int, templates: int, generator: np.random.Generator, *, alike: float = 0.0
) -> Sequence:
    """Facts from a pool of so many, stated again and again, with a little text between: many answers in few bytes.

    Args:
        text, length, templates, generator, alike: as for `recall_sequence`.
        pool: how many facts.

    Returns:
        As `recall_sequence`; what is too long is missing at the end.
    """
    names = [draw_name(generator) for _ in range(pool)]
    values = [draw_value(generator) for _ in range(pool)]
    phrasing = _phrasing(pool, templates, alike, generator)
    seen: set[int] = set()
    pieces: Pieces = []
    written = 0
    while written < length:
        index = int(generator.integers(pool))
        known = index in seen
        seen.add(index)
        new = [
            (b"\n" + phrasing[index] % names[index], TEXT if known else IGNORED),
            (values[index], ANSWER if known else IGNORED),
            (b".", TEXT),
        ]
        if generator.random() < 0.15:
            new.append((b"\n" + draw_text(text, int(generator.integers(8, 80)), generator), TEXT))
        pieces += new
        written += sum(len(piece) for piece, _ in new)
    return _joined(pieces, slice(length))


def copy_sequence(text: bytes, length: int, generator: np.random.Generator) -> Sequence:
    """Strings of text, letters or digits, each followed by a little text and then by itself: what kindles copying.

    Returns:
        As `recall_sequence`; what is too long is missing at the end.
    """
    size = int(generator.integers(16, min(96, length // 3)))
    alphabet = int(generator.integers(3))
    pieces: Pieces = []
    written = 0
    while written < length:
        if alphabet == 0:
            string = draw_text(text, size, generator)
        else:
            low, high = ((97, 123), (48, 58))[alphabet - 1]
            string = bytes(generator.integers(low, high, size).astype(np.uint8))
        between = draw_text(text, int(generator.integers(4, 64)), generator)
        new = [
            (string, IGNORED if alphabet else TEXT),
            (b"\n", TEXT),
            (between, TEXT),
            (string[:8], IGNORED),  # nothing yet says that the string comes again
            (string[8:], ANSWER),
            (b"\n", TEXT),
        ]
        pieces += new
        written += sum(len(piece) for piece, _ in new)
    return _joined(pieces, slice(length))


def statement(template: bytes, name: bytes, value: bytes) -> bytes:
    """A fact on a line of its own."""
    return b"\n" + template % name + value + b".\n"


def question(template: bytes, name: bytes) -> bytes:
    """The question for a fact, and the beginning of its answer up to the value."""
    return b"\nQuestion: " + (template % name).rstrip(b" ") + b"?\nAnswer: " + template % name


def draw_name(generator: np.random.Generator) -> bytes:
    """Three syllables: 729,000 names."""
    return bytes(letters[generator.integers(len(letters))] for letters in (CONSONANTS, VOWELS) * SYLLABLES)


def draw_names(generator: np.random.Generator, count: int) -> list[bytes]:
    """So many different names."""
    names: dict[bytes, None] = {}
    while len(names) < count:
        names[draw_name(generator)] = None
    return list(names)


def draw_value(generator: np.random.Generator) -> bytes:
    """Five digits."""
    return b"%05d" % generator.integers(10**DIGITS)


def draw_text(text: bytes, length: int, generator: np.random.Generator) -> bytes:
    """A piece of the text, from anywhere."""
    start = int(generator.integers(len(text) - length))
    return text[start : start + length]


def _phrasing(count: int, templates: int, alike: float, generator: np.random.Generator) -> list[bytes]:
    if alike and generator.random() < alike:
        return [TEMPLATES[generator.integers(templates)]] * count
    return [TEMPLATES[generator.integers(templates)] for _ in range(count)]


def _joined(pieces: Pieces, part: slice) -> Sequence:
    data = np.frombuffer(b"".join(piece for piece, _ in pieces), dtype=np.uint8)[part]
    kinds = np.concatenate([np.full(len(piece), kind, dtype=np.int8) for piece, kind in pieces])[part]
    return data, kinds
