"""chrF and ROUGE-L: figures that sacrebleu 2.6.0 and rouge-score 0.1.2 gave for the same texts."""

from __future__ import annotations

import pytest
from bench.metrics import chrf, rouge_l


def test_chrf() -> None:
    wanted = ["Saisissez un nombre entier.", "Cette date n'est pas valide."]
    assert chrf(["Entrez un nombre entier.", "La date est fausse"], wanted) == pytest.approx(
        43.17193906392961
    )
    assert chrf(["a b", "No"], ["ab c", "Oui"]) == pytest.approx(31.818181818181813)
    assert chrf(wanted, wanted) == pytest.approx(100)
    assert chrf(["", "x"], wanted) == 0.0


def test_rouge_l() -> None:
    made, wanted = "The cat sat on the mat", "On the mat, a black cat sat quietly."
    assert rouge_l(made, wanted) == rouge_l(wanted, made) == pytest.approx(0.42857142857142855)
    assert rouge_l(made, made.upper() + "!") == 1.0
    assert rouge_l("", made) == rouge_l("dogs", made) == 0.0
