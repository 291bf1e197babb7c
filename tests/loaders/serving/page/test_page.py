"""The chat page in a browser, with the demo model behind it."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CAPITAL = "What is the capital of France?"
STORY = "Write a long story about a sailor."
# Markup that would run if anything took it for HTML.
EVIL = (
    '<img src="x" onerror="window.hacked = 1"><script>window.hacked = 1</script> [a](javascript:alert%281%29)'
)
# Add parameters to every request, so that the model must write a given text.
FORCE = """
const real = window.fetch;
window.fetch = (path, options = {}) => {
  if (options.body) options.body = JSON.stringify({ ...JSON.parse(options.body), choice: [arguments[0]] });
  return real(path, options);
};
"""
ANSWER = "article.assistant .body"


def is_idle(page: Any) -> bool:
    return bool(page.count("#send"))


def models(page: Any) -> list[str]:
    return list(page.run("return [...document.getElementById('model').options].map((o) => o.value)"))


def send(page: Any, text: str) -> str:
    """Send a message, and return the answer once it is complete."""
    page.type("#input", f"{text}{{Enter}}")
    page.wait(lambda: page.count(ANSWER), "an answer")
    page.wait(lambda: is_idle(page), "the end of the answer")
    return str(page.text(ANSWER))


def change(page: Any, **settings: object) -> None:
    """Change the settings of the conversation in the dialog."""
    page.click("#open-settings")
    for name, value in settings.items():
        page.type(f"#{name}", str(value), clear=True)
    page.click('#settings [value="save"]')


def kept(page: Any) -> list[dict[str, Any]]:
    """Return the conversations that the browser keeps."""
    script = "return Object.keys(localStorage).filter((k) => k.startsWith('precast.chat.')).map((k) => localStorage[k])"
    return [json.loads(text) for text in page.run(script)]


def keep(page: Any, *messages: dict[str, Any]) -> None:
    """Put a conversation into the browser, and show it."""
    value = {"id": "given", "title": "Given", "updated": 1, "model": "demo", "system": "", "sampling": {}}
    text = json.dumps(value | {"messages": messages})
    page.run("localStorage.clear(); localStorage['precast.chat.given'] = arguments[0]", text)
    page.reload()
    page.wait(lambda: page.count("article") == len(messages) and models(page), "the messages")


@pytest.fixture
def page(browser: Any, demo_server: Any) -> Iterator[Any]:
    """Return a browser that shows the page without conversations; its console must stay clean."""
    browser.resize(1200, 800)
    browser.open(f"{demo_server.url}/")
    browser.run("localStorage.clear()")
    browser.reload()
    browser.wait(lambda: models(browser) == ["demo", "tools"], "the models")
    browser.console()
    yield browser
    assert browser.console() == []


# --- chats --------------------------------------------------------------------------------------------------


def test_an_answer_arrives_in_pieces(page: Any) -> None:
    page.run(
        "window.lengths = new Set(); new MutationObserver(() => "
        "window.lengths.add(document.querySelector('article.assistant .body')?.textContent.length))"
        ".observe(document.getElementById('messages'), {childList: true, subtree: true, characterData: true})"
    )
    assert send(page, CAPITAL) == "The capital of France is Paris."
    assert page.run("return window.lengths.size") > 3
    figures = page.text(".figures")
    assert re.fullmatch(
        r"first token [\d.]+ s · (?:.* in the queue · )?\d.* tokens/s · 8 tokens · prompt 37, \d+ cached",
        figures,
    )
    assert page.text("h1") == page.text("#conversations button") == CAPITAL
    assert page.text("#status") == "The answer is complete."
    page.wait(lambda: page.text("#load") == "idle", "the load")


def test_shift_enter_breaks_a_line(page: Any) -> None:
    page.type("#input", "one{Shift}{Enter}\ue000two")
    assert page.run("return document.getElementById('input').value") == "one\ntwo"
    assert page.count("article") == 0


def test_escape_stops_the_answer(page: Any, demo_server: Any) -> None:
    page.type("#input", f"{STORY}{{Enter}}")
    page.wait(lambda: len(page.text(ANSWER)) > 20, "the first words")
    page.press("Escape")
    page.wait(lambda: is_idle(page), "the end of the answer")
    assert page.text(".note") == "Stopped."
    assert kept(page)[0]["messages"][1]["finish"] == "stopped"
    demo_server.wait_for(lambda: demo_server.running() == 0)
    assert page.run("return document.activeElement.id") == "input"


def test_settings_regenerating_and_editing(page: Any) -> None:
    change(page, system="You are a pirate.", **{"setting-max_tokens": 5})
    send(page, STORY)
    assert " · 5 tokens · " in page.text(".figures")
    assert page.text(".note") == "The answer reached the limit of tokens or of the context."
    change(page, **{"setting-max_tokens": 3})
    page.click("article.assistant footer button:last-child")
    page.wait(lambda: " · 3 tokens · " in page.text(".figures"), "another answer")
    # The prompt is the same, so the model reads only its end again.
    cached = re.search(r"prompt (\d+), (\d+) cached", page.text(".figures"))
    assert cached
    assert int(cached[2]) > int(cached[1]) / 2
    send(page, "And then?")
    assert page.count("article") == 4
    page.click("article.user footer button:nth-of-type(2)")
    page.type(".editor textarea", f"{CAPITAL}{{Enter}}", clear=True)
    page.wait(lambda: page.count("article") == 2 and is_idle(page), "an answer to the new text")
    (conversation,) = kept(page)
    assert [m["content"] for m in conversation["messages"]] == [CAPITAL, page.text(ANSWER)]
    assert (conversation["system"], conversation["sampling"]) == ("You are a pirate.", {"max_tokens": 3})
    page.click("article.assistant footer button:nth-of-type(2)")
    page.type(".editor textarea", "**Paris**", clear=True)
    page.click(".editor button:last-child")
    assert page.run("return document.querySelector('article.assistant strong').textContent") == "Paris"
    assert kept(page)[0]["messages"][1]["content"] == "**Paris**"


def test_an_error_of_the_server_is_shown_and_the_message_can_be_changed(page: Any) -> None:
    page.run("document.getElementById('input').value = 'word '.repeat(4000)")
    page.type("#input", "end{Enter}")
    page.wait(lambda: page.count(".note.error"), "the error")
    assert "2,048" in page.text(".note.error") or "2048" in page.text(".note.error")
    assert page.text("article.assistant footer button:last-child") == "Try again"
    page.click("article.user footer button:nth-of-type(2)")
    page.type(".editor textarea", f"{CAPITAL}{{Enter}}", clear=True)
    page.wait(lambda: page.text(ANSWER) == "The capital of France is Paris.", "an answer")
    assert page.count(".note.error") == 0
    page.console()  # the browser reports the status 400


def test_a_lost_connection_is_shown(page: Any) -> None:
    page.run("window.fetch = () => Promise.reject(new TypeError('lost'))")
    send(page, CAPITAL)
    assert page.text(".note.error") == "The server cannot be reached; check that it runs."


# --- conversations ------------------------------------------------------------------------------------------


def test_conversations_stay_and_can_be_renamed_exported_and_deleted(page: Any, tmp_path: Path) -> None:
    change(page, **{"setting-max_tokens": 2})
    send(page, CAPITAL)
    page.click("#new")
    send(page, "Another one")
    page.reload()
    page.wait(
        lambda: page.count("#conversations button") == 2 and page.count("article") == 2, "both conversations"
    )
    assert page.text("article.user .body") == "Another one"
    page.click('[popovertarget="menu"]')
    page.click("#rename")
    page.type("#answer", "My title{Enter}", clear=True)
    page.wait(lambda: page.text("h1") == "My title", "the new title")
    page.devtools("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click('[popovertarget="menu"]')
    page.click("#export")
    file = tmp_path / "My-title.json"
    page.wait(file.exists, "the file")
    exported = json.loads(file.read_text())
    assert exported in kept(page)
    assert (exported["title"], exported["messages"][0]["content"]) == ("My title", "Another one")
    page.click('[popovertarget="menu"]')
    page.click("#delete")
    page.press("Escape")
    assert len(kept(page)) == 2
    page.click('[popovertarget="menu"]')
    page.click("#delete")
    page.click("#agree")
    page.wait(lambda: len(kept(page)) == 1, "the deletion")
    page.reload()
    page.wait(lambda: page.text("article.user .body") == CAPITAL, "the other conversation")


def test_other_tabs_and_damaged_entries(page: Any) -> None:
    keep(page, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})
    assert page.text(".note") == "The page was closed before the answer was complete."
    page.run(
        "localStorage['precast.chat.a'] = '{'; localStorage['precast.chat.b'] = '{\"id\": 3}';"
        "const value = JSON.parse(localStorage['precast.chat.given']); value.messages[1].content = 'three';"
        "localStorage['precast.chat.given'] = JSON.stringify(value);"
        "for (const key of ['a', 'b', 'given'])"
        " dispatchEvent(new StorageEvent('storage', {key: `precast.chat.${key}`}));"
    )
    assert page.text(ANSWER) == "three"
    assert page.count("#conversations button") == 1


# --- safety -------------------------------------------------------------------------------------------------


def test_markup_of_the_model_stays_text(page: Any) -> None:
    page.run(FORCE, EVIL)
    assert send(page, "Write HTML") == EVIL
    assert page.run("return document.querySelectorAll('article :is(img, script, a)').length") == 0
    page.reload()
    page.wait(lambda: page.text(ANSWER) == EVIL, "the answer")
    assert page.run("return window.hacked ?? null") is None


ATTEMPTS = """
const violated = [];
addEventListener("securitypolicyviolation", (event) => violated.push(event.effectiveDirective));
try { document.body.innerHTML = "<b>x</b>"; } catch { }
try { setTimeout("window.hacked = 1"); } catch { }
const image = new Image();
image.src = "http://localhost:1/x.png";
document.body.setAttribute("style", "color: red");
await fetch("http://localhost:1/").catch(() => {});
await new Promise((resolve) => setTimeout(resolve, 200));
return violated;
"""


def test_the_policy_stops_markup_scripts_and_other_servers(page: Any) -> None:
    violated = page.run(f"return (async () => {{ {ATTEMPTS} }})()")
    wanted = {"require-trusted-types-for", "img-src", "style-src-attr", "connect-src"}
    assert set(violated) == wanted
    assert violated.count("require-trusted-types-for") == 2
    assert page.run("return window.hacked ?? null") is None
    assert len(page.console()) >= len(violated)  # so a clean console means that there is no violation


@pytest.fixture(scope="module")
def key_server(
    start_server: Callable[..., Any], tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Return a server that needs a key, of a model whose template announces reasoning."""
    return start_server(
        with_reasoning(tiny_artifact, tmp_path_factory.mktemp("thinker") / "thinker"),
        environment={"PRECAST_API_KEYS": "sesame"},
    )


def with_reasoning(artifact: Path, root: Path) -> Path:
    import hashlib
    import shutil

    shutil.copytree(artifact, root)
    manifest = json.loads((root / "manifest.json").read_text())
    data = (root / "chat_template.jinja").read_bytes() + b"{# <think> #}"
    (root / "chat_template.jinja").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"]["chat_template.jinja"].update(entry)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def test_a_key_is_asked_for_and_reasoning_is_folded(browser: Any, key_server: Any) -> None:
    browser.open(f"{key_server.url}/")
    browser.wait(lambda: "Incorrect API key" in browser.text("#question-text"), "the question")
    browser.type("#answer", "wrong{Enter}")
    browser.wait(lambda: browser.count("#answer"), "the question again")
    browser.type("#answer", "sesame{Enter}", clear=True)
    browser.wait(lambda: models(browser) == ["thinker"], "the models")
    browser.run(FORCE, "<think>a fox</think>the dog")
    assert send(browser, "the cat") == "the dog"
    assert browser.text("details .thoughts") == "a fox"
    assert browser.count("details .thoughts") == 0
    browser.click("details summary")
    assert browser.count("details .thoughts") == 1
    assert browser.run("return Object.values(localStorage).join().includes('sesame')") is False
    browser.console()  # the browser reports the status 401


# --- looks and access ---------------------------------------------------------------------------------------

WIDE = (
    f"{'x' * 300}\n\n```\n{'y' * 300}\n```\n\n|{' wide column |' * 12}\n|{'---|' * 12}\n\n- - - {'z' * 200}"
)


def test_a_phone_needs_no_horizontal_scrolling(page: Any) -> None:
    page.resize(320, 640)
    keep(
        page, {"role": "user", "content": "w" * 300}, {"role": "assistant", "content": WIDE, "finish": "stop"}
    )
    parts = ("html", "#log", "main", "header", "#composer")

    def overflow(*selectors: str) -> list[str]:
        script = (
            "return arguments[0].filter((s) => { const e = document.querySelector(s);"
            " return e.scrollWidth > e.clientWidth || e.getBoundingClientRect().right > 320 })"
        )
        return list(page.run(script, selectors))

    assert overflow(*parts) == []
    page.click("#open-menu")
    assert overflow("html", "#sidebar") == []
    page.press("Escape")
    assert page.count("#sidebar button") == page.run(
        "return document.querySelectorAll('#sidebar button').length"
    )
    assert page.run("return getComputedStyle(document.getElementById('sidebar')).visibility") == "hidden"
    page.click("#open-settings")
    assert overflow("html", "#settings") == []
    page.press("Escape")


def test_dark_mode_follows_the_system(page: Any) -> None:
    def lightness() -> list[float]:
        script = (
            "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
            ".map((c) => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0))"
        )
        return list(page.run(script))

    try:
        for scheme in ("light", "dark"):
            page.devtools(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
            )
            background, text = lightness()
            assert (background > text) == (scheme == "light")
    finally:
        page.devtools("Emulation.setEmulatedMedia", features=[])


def test_every_control_has_a_name_and_the_keyboard_reaches_it(page: Any) -> None:
    content = "```\ncode\n```"
    keep(
        page, {"role": "user", "content": "one"}, {"role": "assistant", "content": content, "finish": "stop"}
    )
    names = page.run(
        "return [...document.querySelectorAll('button, input, select, textarea, a, [tabindex=\"0\"]')]"
        ".filter((e) => !['aria-hidden', 'aria-label', 'aria-labelledby'].some((name) => e.hasAttribute(name)))"
        ".filter((e) => !e.textContent.trim() && !e.labels?.length)"
        ".map((e) => e.outerHTML)"
    )
    assert names == []
    found = []
    script = "const e = document.activeElement; return e.id || e.ariaLabel || e.textContent"
    for _ in range(17):
        page.press("Tab")
        found.append(page.run(f"if (document.activeElement === document.body) return 'end'; {script}"))
    # The focus begins in the message, after which Send is disabled.
    assert found == [
        "model", "open-settings", "end", "Skip to the message", "new", "Given", "export-all", "open-key",
        "This conversation", "Copy the message", "Edit", "Copy code", "Code: text",
        "Copy the message", "Edit", "Regenerate", "input",
    ]  # fmt: skip
