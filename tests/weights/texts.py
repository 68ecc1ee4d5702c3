"""Varied texts, always the same ones: scripts, emoji, white space, numbers, code, and mixtures of all."""

from __future__ import annotations

import random

_WORDS = {
    "latin": "the ferry was late Äpfel naïve façade jalapeño Straße İstanbul ﬁne cœur tiếng Việt łódź",
    "cyrillic": "сегодня хорошая погода Ёлка їжак ћирилица қазақ",
    "greek": "καλημέρα κόσμε Ὀδυσσεύς ἐν ἀρχῇ",
    "arabic": "مرحبا بالعالم اَلْعَرَبِيَّةُ ۱۲۳ لا",
    "hebrew": "שלום עולם בְּרֵאשִׁית",
    "devanagari": "नमस्ते दुनिया क्षत्रिय १२३ ॐ",
    "bengali": "আমার সোনার বাংলা",
    "tamil": "வணக்கம் உலகம்",
    "thai": "สวัสดีชาวโลก ภาษาไทย",
    "georgian": "გამარჯობა მსოფლიო",
    "amharic": "ሰላም ልዑል",
    "chinese": "今天下雨 你好世界 繁體字 𠜎𠜱𠝹 ，。！",
    "japanese": "こんにちは世界 カタカナ ﾊﾝｶｸ 々〆〤",
    "korean": "안녕하세요 세계 각 ㄱㄴㄷ",
    "combining": "e\u0301 a\u0308\u0323 n\u0303 Z\u0351\u036b\u0343 \u0130 ǅ",
    "emoji": "😀 👍🏽 👩‍👩‍👧‍👦 🇳🇴🇯🇵 ❤️ 🏴\U000e0067\U000e0062\U000e007f 1️⃣ ☃ 🫠",
    "symbols": "∀x∈ℝ: ⌈x⌉ ≠ −∞ ½ ² № € ₿ → ⟨ψ|φ⟩ ╔══╗ █▓▒░ “quoted” ‘it’s’ … – — † ™",
    "contractions": "I'm you're he'll we've she'd it's DON'T WE'RE o'clock 'tis rock'n'roll ain’t",
    "numbers": "0 7 42 1932 3.14159 1,000,000 1e-9 0xFF 12:34:56 2024-02-29 +47 22 33 44 55 ٤٢ Ⅻ 50% $9.99",
    "code": "def f(x): return {'a':x[1:]} // /* */ <b>&amp;</b> a!=b && c||d x+=1; #include <a.h> -> => ::",
    "urls": "https://example.org/a?b=c&d=%20#x mailto:a.b@c.de C:\\dir\\f.txt ~/.cache ../.. @name #tag",
    "special": "<|im_start|> <|im_end|> <|endoftext|> <s> </s> <unk> <0x0A> [INST] <|im_start <repo_name>",
    "control": "\x00 \x01 \x1b[0m \x7f \u200b \u200d \ufeff \u202e \u00ad \ufffd \ue000 \U0010ffff",
}
_SPACES = [
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\t\t",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u2028",
    "",
]
_CODE = [
    "for (int i = 0; i < n; i++) {\n\tif (!a[i])\n\t\tcontinue;\n    s += a[i] * 2.5f;\n}\n",
    "class A(B):\n    def __init__(self, *args: int) -> None:\n        self.x = [i**2 for i in args]\n\n\n",
    '{\n  "name": "x",\n  "values": [1, 2.0, null, true],\n  "nested": {"a": "\\u00e9\\n"}\n}',
    "SELECT a.id, COUNT(*) FROM t AS a\nWHERE a.x >= 10 AND b LIKE '%z%'\nGROUP BY 1;",
    "#!/bin/sh\nset -eu\nfor f in *.txt; do\n  grep -n 'foo' \"$f\" | sed 's/a/b/g' > /dev/null\ndone\n",
    "| a | b |\n|---|---|\n| 1 | **x** |\n\n* item\n  1. sub\n\n```\ncode\n```\n",
    "\\begin{equation}\n  E = mc^2 \\quad \\forall x \\in \\mathbb{R}\n\\end{equation}",
    "fn main() -> Result<(), Box<dyn Error>> {\n    let v: Vec<u8> = vec![0u8; 1024];\n    Ok(())\n}\n",
]


def texts(count: int, seed: int = 0) -> list[str]:
    """`count` texts of up to some hundred characters; the same for the same arguments."""
    rng = random.Random(seed)
    kinds = {name: words.split(" ") for name, words in _WORDS.items()}
    result = ["", " ", "\n", "a", " a", "a ", "  a", "\u00e9", "😀", "\ud7ff"]
    while len(result) < count:
        if rng.random() < 0.15:
            snippet = rng.choice(_CODE)
            cut = rng.randrange(len(snippet))
            text = snippet[cut:] + snippet[: rng.randrange(len(snippet))]
        else:
            chosen = rng.sample(sorted(kinds), rng.choice([1, 1, 2, 3, len(kinds)]))
            parts = []
            for _ in range(rng.randrange(1, 25)):
                word = rng.choice(kinds[rng.choice(chosen)])
                if rng.random() < 0.1:  # a piece of it, so that words are cut in odd places
                    word = word[: rng.randrange(len(word) + 1)]
                parts += [word, rng.choice(_SPACES) if rng.random() < 0.3 else " "]
            text = "".join(parts)
        if rng.random() < 0.1:
            text = text.upper()
        result.append(text)
    return result[:count]
