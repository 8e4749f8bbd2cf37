"""The corpus: the same text each time, and nothing of the validation part in the training part."""

from __future__ import annotations

import pytest

from edgekit.errors import UnknownNameError
from edgekit.models import corpus
from edgekit.models.corpus import PARTS, SHORTEST_DOCSTRING, held_out, load_corpus


def test_corpus_is_deterministic():
    first = {part: load_corpus(part) for part in PARTS}
    corpus._parts.cache_clear()  # as in another process
    for part, before in first.items():
        again = load_corpus(part)
        assert again is not before
        assert again == before


def test_documents_are_sorted_text():
    for part in PARTS:
        loaded = load_corpus(part)
        assert list(loaded.names) == sorted(set(loaded.names))
        assert len(loaded.names) == len(loaded.documents)
        assert loaded.bytes == sum(len(document) for document in loaded.documents)
        for document in loaded.documents:
            assert len(document) >= SHORTEST_DOCSTRING
            document.decode()
            assert 0 not in document


def test_there_is_enough_text():
    assert load_corpus("train").bytes > 1_000_000
    assert load_corpus("validation").bytes > 8 * 8193


def test_modules_and_topics_are_both_there():
    train = load_corpus("train")
    by_name = dict(zip(train.names, train.documents, strict=True))
    assert by_name["json.__init__"].startswith(b"JSON (JavaScript Object Notation)")
    assert any(name.startswith("topic:") for name in train.names)
    assert any(name.startswith("topic:") for name in load_corpus("validation").names)
    assert not any("test" in name.split(".") for name in train.names)


def test_split_goes_by_document():
    names = {part: set(load_corpus(part).names) for part in PARTS}
    assert not names["train"] & names["validation"]
    assert not any(held_out(name) for name in names["train"])
    assert all(held_out(name) for name in names["validation"])


def test_no_docstring_of_the_validation_part_is_trained_on():
    found = dict((*corpus._modules(), *corpus._topics()))
    trained = {text for name, texts in found.items() if not held_out(name) for text in texts}
    shared = {text for name, texts in found.items() if held_out(name) for text in texts if text in trained}
    assert shared, "some docstrings are in several modules, so the rule is needed"
    documents = load_corpus("validation").documents
    pieces = {piece for name, texts in found.items() if held_out(name) for piece in texts if piece not in trained}
    for text in shared:
        alone = [document for document in documents if text.encode() in document]
        # A shared docstring may still be a part of a longer one of its own.
        assert all(any(text in piece for piece in pieces if piece.encode() in document) for document in alone)


def test_unknown_part_is_refused():
    with pytest.raises(UnknownNameError, match="part of the corpus"):
        load_corpus("test")


def test_files_that_are_no_python_are_skipped(tmp_path):
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    text = "A docstring that is long enough."
    good.write_text(f'"""{text}"""\ndef f():\n    """{text}"""\ndef g():\n    """Too short."""\n')
    bad.write_text("def {{ name }}(): pass\n")
    assert corpus._docstrings(good) == [text]
    assert corpus._docstrings(bad) == []
