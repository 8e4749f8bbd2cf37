"""Needle tasks: exact lengths and depths, answers where they should be, nothing cut off."""

from __future__ import annotations

import re

import numpy as np
import pytest

from edgekit.errors import InputError
from edgekit.models.needles import (
    ANSWER,
    DIGITS,
    IGNORED,
    TEMPLATES,
    TEXT,
    copy_sequence,
    draw_names,
    needle,
    pair_sequence,
    recall_sequence,
    statement,
)

HAYSTACK = b"There is nothing to be found here, and no digits either.\n" * 200
LENGTH = 1000


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("length", [200, 513, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("distractors", [0, 3], ids=["alone", "with distractors"])
def test_needle_has_its_length_and_depth(length, depth, distractors):
    if distractors and length == 200:
        length = 300
    for seed in range(5):
        task = needle(HAYSTACK, length, depth, generator(seed), distractors=distractors)
        assert len(task.prompt) == length
        assert task.prompt[task.position : task.position + len(task.statement)] == task.statement
        before = task.prompt[: task.position]
        behind = task.prompt[task.position + len(task.statement) : task.prompt.rindex(b"\nQuestion: ")]
        facts = rb"\n[a-z =:]*\d{5}\.\n"
        hay = [len(re.sub(facts, b"", part)) for part in (before, behind)]
        assert hay[0] == round(depth * sum(hay))


@pytest.mark.parametrize("distractors", [0, 5])
def test_depths_0_and_1_are_first_and_last(distractors):
    for seed in range(20):
        first = needle(HAYSTACK, LENGTH, 0.0, generator(seed), distractors=distractors)
        last = needle(HAYSTACK, LENGTH, 1.0, generator(seed), distractors=distractors)
        assert first.position == 0
        assert last.prompt[last.position + len(last.statement) :].startswith(b"\nQuestion: ")


def test_question_asks_for_the_needle_alone():
    for seed in range(20):
        task = needle(HAYSTACK, LENGTH, 0.4, generator(seed), distractors=4)
        asked = task.prompt[task.prompt.rindex(b"Answer: ") + len(b"Answer: ") :]
        assert re.fullmatch(rb"\d{5}", task.answer)
        assert task.statement == b"\n" + asked + task.answer + b".\n"
        # The rest of the prompt has the answer's beginning in no other fact.
        assert task.prompt.count(b"\n" + asked) == 1


def test_needles_are_reproducible_and_differ():
    first, again, other = (needle(HAYSTACK, LENGTH, 0.5, generator(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.answer != other.answer
    assert first.statement != other.statement


@pytest.mark.parametrize("depth", [-0.1, 1.01, float("nan")])
def test_depth_outside_is_refused(depth):
    with pytest.raises(InputError, match=r"in 0\.\.1"):
        needle(HAYSTACK, LENGTH, depth, generator())


def test_too_short_prompts_and_texts_are_refused():
    with pytest.raises(InputError, match="40 bytes with 0 distractors needs"):
        needle(HAYSTACK, 40, 0.5, generator())
    with pytest.raises(InputError, match="there are 100 bytes of text"):
        needle(HAYSTACK[:100], LENGTH, 0.5, generator())


@pytest.mark.parametrize("alike", [0.0, 1.0], ids=["mixed", "alike"])
def test_recall_answers_what_was_stated(alike):
    for seed in range(10):
        ids, kinds = recall_sequence(HAYSTACK, LENGTH, 5, 3, len(TEMPLATES), generator(seed), alike=alike)
        data = ids.tobytes()
        assert ids.shape == kinds.shape == (LENGTH,)
        assert (kinds == ANSWER).sum() == 3 * DIGITS
        assert (kinds == IGNORED).sum() == 5 * DIGITS
        asked = re.findall(rb"Answer: ([^\d]*)(\d{5})\.\n", data)
        assert len(asked) == 3
        for words, value in asked:
            assert data.count(b"\n" + words + value + b".\n") == 1
            assert data.index(b"\n" + words + value) < data.index(b"\nQuestion: ")
        used = {template for template in TEMPLATES for words, _ in asked if _fits(template, words)}
        assert not alike or len(used) == 1
        for at in re.finditer(rb"Answer: [^\d]*(\d{5})", data):
            assert set(kinds[at.start(1) : at.end(1)]) == {ANSWER}


def test_recall_that_is_too_long_keeps_its_end():
    ids, kinds = recall_sequence(HAYSTACK, 100, 6, 4, 2, generator())
    assert ids.shape == kinds.shape == (100,)
    assert ids.tobytes().endswith(b".\n")
    assert kinds[-2 - DIGITS : -2].tolist() == [ANSWER] * DIGITS


@pytest.mark.parametrize("alike", [0.0, 1.0], ids=["mixed", "alike"])
def test_pairs_are_answers_from_their_second_time_on(alike):
    ids, kinds = pair_sequence(HAYSTACK, LENGTH, 4, len(TEMPLATES), generator(3), alike=alike)
    assert ids.shape == kinds.shape == (LENGTH,)
    seen: dict[bytes, bytes] = {}
    for at in re.finditer(rb"\n([a-z =:]+)(\d{5})\.", ids.tobytes()):
        words, value = at.groups()
        assert seen.get(words, value) == value
        assert set(kinds[at.start(2) : at.end(2)]) == {ANSWER if words in seen else IGNORED}
        seen[words] = value
    assert len(seen) == 4


@pytest.mark.parametrize("seed", range(6))
def test_copies_follow_their_originals(seed):
    ids, kinds = copy_sequence(HAYSTACK, LENGTH, generator(seed))
    assert ids.shape == kinds.shape == (LENGTH,)
    data = ids.tobytes()
    starts = [index for index in range(1, LENGTH) if kinds[index] == ANSWER and kinds[index - 1] != ANSWER]
    assert starts
    for start in starts:
        end = next((index for index in range(start, LENGTH) if kinds[index] != ANSWER), LENGTH)
        assert data.index(data[start - 8 : end]) < start - 8


def test_names_differ():
    names = draw_names(generator(), 500)
    assert len(set(names)) == 500
    assert all(re.fullmatch(rb"([bcdfghjklmnprstvwz][aeiou]){3}", name) for name in names)


@pytest.mark.parametrize("template", TEMPLATES)
def test_statement_is_a_line_of_its_own(template):
    assert re.fullmatch(rb"\n[^\n]*tamoki[^\n]*01234\.\n", statement(template, b"tamoki", b"01234"))
    assert TEXT not in (ANSWER, IGNORED)


def _fits(template, words):
    before, behind = template.split(b"%s")
    return words.startswith(before) and words.endswith(behind) and len(words) == len(template) + 4
