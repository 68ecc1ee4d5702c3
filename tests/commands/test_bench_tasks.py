"""The parts of bench.tasks that decide its figures."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from bench.tasks import Row, choices, folds, headed, likeliest, resampled, right, words
from bench.texts import phrases, reviews

from shoal.results import Score


def test_the_likeliest_for_each_token() -> None:
    class Long:
        def score(self, texts: Sequence[str], *, prompt: str) -> list[Score]:
            assert prompt == "p"
            return [Score((1,) * n, (value,) * n) for n, value in ((2, -3.0), (9, -2.0), (1, -2.5))]

    assert likeliest(cast("Any", Long()), "p", ["a", "b", "c"]) == 1


def test_choices_are_alike_in_length() -> None:
    assert choices("ab", ["abcdef", "ab", "xyz", "x", "abcde", "wxyz"]) == ["ab", "xyz", "x", "wxyz"]


def test_folds_never_see_the_row_that_they_judge() -> None:
    generator = np.random.default_rng(1)
    labels = generator.random(100) < 0.5
    noise = generator.standard_normal((100, 300))
    assert 0.3 < np.mean(folds(noise, labels)) < 0.7  # as many columns as it likes, and still no better
    noise[:, 5] += 30 * labels
    assert np.mean(folds(noise, labels)) > 0.95


def test_words() -> None:
    assert words(["a bad film", "A film!"]).tolist() == [[1, 1, 1], [1, 0, 1]]


def test_a_headline_is_a_sentence_of_its_own() -> None:
    rest = "It was big. It was far. Nobody saw the U.S. coast."
    head = "A shoal of nine fish was seen near the coast."
    assert headed(f"{head} {rest}") == (head, rest)
    assert headed(f"Short. {rest}") is None
    assert headed(f"{head} It was big.") is None


def test_errors_of_figures() -> None:
    row = right("task", "method", [True] * 75 + [False] * 25, 3.4)
    assert row.cells() == ("task", "method", "right", "75.0 % ± 4.3", "100", "3")
    assert Row("task", "method", "chrF", 21.44, 0.0, 50).cells()[3] == "21.4"
    values = np.random.default_rng(1).standard_normal(400)
    error = resampled(lambda indices: float(np.mean(values[list(indices)])), 400)
    assert error == pytest.approx(values.std() / math.sqrt(400), rel=0.2)


def wheel(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as made:
        for name, data in members.items():
            made.writestr(name, data)


CATALOGUE = """# A comment.
msgid ""
msgstr "Language: fr\\n"

#, python-format
msgid "Delete %(name)s now"
msgstr "Supprimer %(name)s"

msgid ""
"Enter a "
"number."
msgstr ""
"Saisissez un « \\"nombre\\" »."

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d jour"
msgstr[1] "%d jours"

msgid "Yes"
msgstr ""

msgid "Enter a date."
msgstr "Saisissez une date."
"""


def test_phrases_of_a_catalogue(tmp_path: Path) -> None:
    data = CATALOGUE.encode()
    place = "django/contrib/admin/locale/{}/LC_MESSAGES/django.po"
    wheel(tmp_path / "Django-5.2-py3-none-any.whl", {place.format("fr"): data, place.format("de"): b"junk"})
    assert phrases(tmp_path, "fr") == [
        ("Enter a number.", 'Saisissez un « "nombre" ».'),
        ("Enter a date.", "Saisissez une date."),
    ]


def test_reviews(tmp_path: Path) -> None:
    data = "__label__neg dull , clich\xe9d .\n__label__pos a joy . \n".encode("cp1252")
    wheel(tmp_path / "gensim-4.4.0-cp311.whl", {"gensim/test/test_data/pang_lee_polarity.cor": data})
    assert reviews(tmp_path) == [("neg", "dull , clichéd ."), ("pos", "a joy .")]
