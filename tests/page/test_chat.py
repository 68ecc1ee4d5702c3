"""The chat, used as a person uses it: typed, clicked, reloaded, over a house of two devices."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.test_home import House
from tests.server.conftest import serving

import shoal
from shoal.server.app import Options

from .conftest import Tab, opened

pytestmark = pytest.mark.page
LONG = "Write a long story about the sea."
HOSTILE = """# A heading

Text with **bold**, *slanted* and `code <b>`, <img src=x onerror="alert(1)"> and <script>alert(2)</script>.
[a link](https://shoal.example/a) [not one](javascript:alert(3)) https://shoal.example/b.

1. one
2. two
   - inside
   - **too**

> quoted
> on

| a | b |
|---|---|
| 1 | `2` |

---

```python
print("<i>")
```

```
never closed **here**"""
CONVERSATION = {"id": "x", "title": "Kept", "changed": 1, "messages": [{"role": "user", "text": "Hi"}]}


def keep(tab: Tab, *texts: str) -> None:
    """Keeps a conversation with these answers, and loads the page again."""
    answers = [{"role": "assistant", "text": text} for text in texts]
    kept = {**CONVERSATION, "messages": [*CONVERSATION["messages"], *answers]}  # type: ignore[misc]
    tab.page.evaluate("kept => localStorage['shoal.chat.x'] = JSON.stringify(kept)", kept)
    tab.page.evaluate("sessionStorage['shoal.current'] = 'x'")
    tab.page.reload()


def test_an_answer_streams_and_is_that_of_the_api(tab: Tab, house: House) -> None:
    page = tab.opens(house.url)
    tab.sets(temperature=0, max_tokens=160, system="You are a sailor.")
    tab.asks(LONG)
    grows = "!document.querySelector('#stop').hidden && document.querySelector('.answer')?.textContent.length"
    first = tab.until(f"({grows}) || 0")
    assert tab.until(f"({grows}) > {first} && ({grows})") > first, "it is shown as it comes"
    told = tab.answered()
    messages = [{"role": "system", "content": "You are a sailor."}, {"role": "user", "content": LONG}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 160}
    reply = httpx.post(f"{house.url}/v1/chat/completions", json=body, timeout=None, trust_env=False).json()
    assert told == reply["choices"][0]["message"]["content"]
    facts = page.locator(".facts").inner_text()
    assert re.fullmatch(
        r"160 tokens · [\d.]+ tokens/s · first after [\d.]+ s · [\d.]+ s in all · "
        "ended at the limit of tokens",
        facts,
    )
    spoken = page.locator("#spoken p").all_inner_texts()
    assert "".join(spoken[:-1]).replace(" ", "") == re.sub(r"\s", "", told), "each word is read out once"
    assert spoken[-1] == "The answer has ended."


@pytest.mark.parametrize("how", ["Escape", "Stop"])
def test_an_answer_is_stopped_everywhere(tab: Tab, house: House, how: str) -> None:
    page = tab.opens(house.url)
    tab.asks(LONG)
    tab.until("(document.querySelector('.answer')?.textContent.length ?? 0) > 20")
    if how == "Stop":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    told = tab.answered()
    assert len(told) > 20 and "stopped" in page.locator(".facts").inner_text()
    tab.until("fetch('/house').then(reply => reply.json()).then(house => house.running === 0)")
    tab.asks("Hello")
    assert tab.answered() != told and len(tab.conversation()["messages"]) == 4


def test_a_message_is_edited_and_an_answer_made_again(tab: Tab, house: House) -> None:
    page = tab.opens(house.url)
    tab.sets(max_tokens=8, temperature=2)  # so that no answer is made twice
    tab.asks("What is red?")
    tab.answered()
    tab.asks("And blue?")
    before = tab.answered()
    page.get_by_role("button", name="Regenerate").click()
    after = tab.answered()
    assert [one["text"] for one in tab.conversation()["messages"]][::2] == ["What is red?", "And blue?"]
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit your message").fill("What is green?")
    page.get_by_role("button", name="Ask", exact=True).click()
    tab.answered()
    assert [one["text"] for one in tab.conversation()["messages"]][::2] == ["What is green?"]
    page.get_by_role("button", name="Undo").click()
    messages = tab.conversation()["messages"]
    assert [one["text"] for one in messages][::2] == ["What is red?", "And blue?"]
    assert [one["text"] for one in messages][3] == after != before


def test_conversations_outlast_a_reload_and_are_named_exported_and_deleted(
    tab: Tab, house: House, tmp_path: Path
) -> None:
    page = tab.opens(house.url)
    tab.sets(max_tokens=8)
    tab.asks("What is red?")
    first = tab.answered()
    page.get_by_role("button", name="New conversation").first.click()
    tab.asks("What is a fish?")
    second = tab.answered()
    title = page.get_by_label("Title of this conversation")
    title.fill("Fish")
    title.press("Enter")
    page.reload()
    assert title.input_value() == "Fish" and tab.conversation()["messages"][1]["text"] == second
    names = page.locator("#conversations button")
    assert names.all_inner_texts() == ["Fish", "What is red?"]
    names.nth(1).click()
    assert title.input_value() == "What is red?" and tab.conversation()["messages"][1]["text"] == first
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == "What-is-red.md"
    download.value.save_as(tmp_path / "kept.md")
    assert (tmp_path / "kept.md").read_text() == (
        f"# What is red?\n\n## You\n\nWhat is red?\n\n## Answer\n\n{first}\n"
    )
    page.get_by_role("button", name="Delete").click()
    assert names.all_inner_texts() == ["Fish"]
    page.get_by_role("button", name="Undo").click()
    assert sorted(names.all_inner_texts()) == ["Fish", "What is red?"]
    page.get_by_role("button", name="Delete").click()
    page.reload()
    assert names.all_inner_texts() == ["Fish"]


def test_a_reload_in_mid_answer_keeps_what_was_there(tab: Tab, house: House) -> None:
    page = tab.opens(house.url)
    tab.asks(LONG)
    tab.until("(document.querySelector('.answer')?.textContent.length ?? 0) > 20")
    page.reload()
    assert [len(one["text"]) > 20 for one in tab.conversation()["messages"]] == [True, True]
    tab.foreseen = ("ERR_ABORTED", "network error")


def test_the_text_of_a_model_never_becomes_markup(tab: Tab, tiny: shoal.LLM) -> None:
    tab.foreseen = (r"404 .*/house/events",)
    with serving(tiny) as served:
        page = tab.opens(f"http://127.0.0.1:{served.port}")
        keep(tab, HOSTILE)
        answer = page.locator(".answer")
        assert answer.locator("img, script, i, b").count() == 0
        assert '<img src=x onerror="alert(1)"> and <script>' in answer.inner_text()
        assert answer.locator("a").evaluate_all("all => all.map(one => one.href)") == [
            "https://shoal.example/a",
            "https://shoal.example/b",
        ]
        counts = {"h3": 1, "strong": 2, "em": 1, "ol > li": 2, "ol ul > li": 2, "blockquote": 1, "hr": 1}
        counts |= {"th": 2, "td": 2, "pre": 2}
        assert {what: answer.locator(what).count() for what in counts} == counts
        assert answer.locator("pre").all_inner_texts() == ['print("<i>")', "never closed **here**"]
        nasty = [sign * 20000 for sign in ("*", "[", "`", "_", ">", "- ", "|", "#", "https://", "**a", "(")]
        nasty += ["# a" + " " * 20000 + "b", "a | b\n" + "|-" * 10000 + "c"]
        keep(tab, *nasty, "> " * 3000 + "deep", "  - x\n" * 3000)
        assert answer.count() == len(nasty) + 2


def test_a_wrong_key_is_said_and_the_right_one_kept_for_the_tab(tab: Tab, tiny: shoal.LLM) -> None:
    tab.foreseen = ("401", r"404 .*/house/events")
    key = "sesame-sesame-sesame"
    with serving(tiny, Options(keys={sha256(key.encode()).digest(): "ali"})) as guarded:
        page = tab.opens(f"http://127.0.0.1:{guarded.port}")
        field = page.get_by_label("API key")
        field.fill("not the key")
        field.press("Enter")
        page.get_by_text("this API key is not known").wait_for()
        field.fill(key)
        field.press("Enter")
        page.get_by_text("tiny is listening.").wait_for()
        tab.sets(max_tokens=3)
        tab.asks("Hello")
        assert tab.answered()
        page.reload()
        page.locator(".answer").wait_for()
        assert not page.locator("#key-dialog").is_visible()
        assert key not in page.evaluate("JSON.stringify(localStorage)")
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Forget the key").click()
        field.wait_for()


def test_errors_are_said_and_the_question_stays(tab: Tab, tiny: shoal.LLM) -> None:
    tab.foreseen = (r"404 .*/house/events", "400", "ERR_CONNECTION_REFUSED", "Failed to load")
    with serving(tiny) as served:
        page = tab.opens(f"http://127.0.0.1:{served.port}")
        page.get_by_text("tiny is listening.").wait_for()
        tab.asks("word " * 400)
        problem = page.locator("#messages .problem")
        problem.filter(has_text="context").wait_for()
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Edit your message").fill("Hello")
        page.keyboard.press("Control+Enter")
        tab.answered()
        assert problem.all_inner_texts() == [] and len(tab.conversation()["messages"]) == 2
    tab.asks("Are you there?")
    problem.filter(has_text="The connection to the server was lost").wait_for()
    page.get_by_role("button", name="Ask again").wait_for()
    assert tab.conversation()["messages"][-1]["text"] == "Are you there?"


def test_all_is_reached_by_the_keyboard(chromium: Any, tiny: shoal.LLM) -> None:
    """From the top: the skip link, the views, and all that can be done; on a phone, the shelf as well."""
    with serving(tiny) as served:
        url = f"http://127.0.0.1:{served.port}"
        for width, expected in (
            (1280, ["New conversation", "What is this?", "Title of this conversation", "Export", "Delete"]),
            (360, ["All", "Title of this conversation", "Export", "Delete"]),
        ):
            with opened(chromium, (width, 740)) as tab:
                tab.foreseen = (r"404 .*/house/events",)
                page = tab.opens(url)
                tab.sets(max_tokens=2)
                tab.asks("What is this?")
                tab.answered()
                page.reload()
                page.locator(".facts").wait_for()
                names = []
                for _ in range(40):
                    page.keyboard.press("Tab")
                    name = page.evaluate(NAME)
                    if name is None:
                        break
                    names.append(name)
                    shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                    ringed = page.evaluate("document.activeElement.matches('.writing textarea')")
                    assert shown != "none" or ringed, f"the focus is seen on {name}"
                start = ["Skip to the content", "Chat", "House", "Theme: auto"]
                acts = ["Edit", "Copy", "Copy", "Regenerate", "Your message", "Send", "Settings"]
                assert names == [*start, *expected, *acts]
                if width == 360:
                    page.get_by_role("button", name="All").press("Enter")
                    assert page.evaluate(NAME) == "New conversation"
                    page.keyboard.press("Escape")
                    assert page.evaluate(NAME) == "All"


NAME = """(() => { const it = document.activeElement;
return it === document.body ? null : it.getAttribute("aria-label") ?? it.textContent.trim(); })()"""
