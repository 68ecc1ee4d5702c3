"""Which of a repository's GGUF files a choice means."""

from __future__ import annotations

import pytest

from shoal.engine.errors import DownloadError
from shoal.hub import choose_gguf

NAMES = [
    "README.md",
    "Tiny-1B.Q4_0.gguf",
    "Tiny-1B-Q4_K.gguf",
    "Tiny-1B-Q4_K_M.gguf",
    "Tiny-1B-UD-Q4_K_XL.gguf",
    "tiny_1b_q8_0.gguf",
    "Tiny-1B-IQ4_NL.gguf",
    "Tiny-1B-BF16.gguf",
    "F16/Tiny-1B-00001-of-00002.gguf",
    "F16/Tiny-1B-00002-of-00002.gguf",
    "Q6_K/Tiny-1B-Q6_K-00001-of-00002.gguf",
    "Q6_K/Tiny-1B-Q6_K-00002-of-00002.gguf",
    "mmproj-Tiny-1B-Q8_0.gguf",
]


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ("Q4_0", ["Tiny-1B.Q4_0.gguf"]),
        ("q4_k", ["Tiny-1B-Q4_K.gguf"]),
        ("Q4_K_M", ["Tiny-1B-Q4_K_M.gguf"]),
        ("Q4_K_XL", ["Tiny-1B-UD-Q4_K_XL.gguf"]),
        ("UD-Q4_K_XL", ["Tiny-1B-UD-Q4_K_XL.gguf"]),
        ("Q8_0", ["tiny_1b_q8_0.gguf"]),
        ("iq4_nl", ["Tiny-1B-IQ4_NL.gguf"]),
        ("BF16", ["Tiny-1B-BF16.gguf"]),
        ("F16", [f"F16/Tiny-1B-0000{i}-of-00002.gguf" for i in (1, 2)]),
        ("Q6_K", [f"Q6_K/Tiny-1B-Q6_K-0000{i}-of-00002.gguf" for i in (1, 2)]),
        ("Tiny-1B-Q6_K.gguf", [f"Q6_K/Tiny-1B-Q6_K-0000{i}-of-00002.gguf" for i in (1, 2)]),
        ("Tiny-1B-00002-of-00002.gguf", [f"F16/Tiny-1B-0000{i}-of-00002.gguf" for i in (1, 2)]),
        ("F16/Tiny-1B-00001-of-00002.gguf", [f"F16/Tiny-1B-0000{i}-of-00002.gguf" for i in (1, 2)]),
        ("tiny-1b-q4_k_m", ["Tiny-1B-Q4_K_M.gguf"]),
    ],
)
def test_a_file_by_its_name_or_type(choice: str, found: list[str]) -> None:
    assert choose_gguf("org/tiny", NAMES, choice) == found


@pytest.mark.parametrize(
    "choice", ["", "Q4", "4_0", "Q5_K_M", "Tiny", "mmproj", "*", "Q4_.", "../Tiny-1B.Q4_0"]
)
def test_none_or_several_are_listed(choice: str) -> None:
    with pytest.raises(DownloadError) as error:
        choose_gguf("org/tiny", NAMES, choice)
    assert "name one, as in hf:org/tiny:F16/Tiny-1B-00001-of-00002.gguf" in str(error.value)
    assert "Q6_K/Tiny-1B-Q6_K-00001-of-00002.gguf (2 parts), Tiny-1B-BF16.gguf, " in str(error.value)
    assert "mmproj-" not in str(error.value)


def test_a_name_that_leads_out_of_a_repository_is_none() -> None:
    with pytest.raises(DownloadError, match="nor a GGUF file"):
        choose_gguf("org/tiny", ["../a.gguf", "/b.gguf", "c/../../d.gguf", "README.md"], "")


def test_a_part_that_a_repository_lacks_is_named() -> None:
    with pytest.raises(DownloadError, match=r"a-00003-of-00003\.gguf is not among them"):
        choose_gguf("org/tiny", ["a-00001-of-00003.gguf", "a-00002-of-00003.gguf"], "")
