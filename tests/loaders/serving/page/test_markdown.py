"""The page's renderer of Markdown: elements, text that stays text, pieces, and hostile texts."""

from collections.abc import Iterator
from typing import Any

import pytest

# The bare structure: tags with their text, without attributes but for links and lists.
RENDER = """
const [texts] = arguments;
const { show } = await import("/page/markdown.js");
const body = document.createElement("div");
for (const text of texts) show(body, text);
for (const node of body.querySelectorAll(".code-head")) node.remove();
for (const node of body.querySelectorAll("*")) {
  for (const { name } of [...node.attributes]) if (!["href", "start"].includes(name)) node.removeAttribute(name);
}
return body.innerHTML;
"""
LINK = '<a href="https://a.b/c">'
BASIC = [
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# a #\n###### b", "<h3>a</h3><h6>b</h6>"),
    ("#tag", "<p>#tag</p>"),
    ("**a** __b__ *c* _d_ ~~e~~", "<p><strong>a</strong> <strong>b</strong> <em>c</em> <em>d</em> <del>e</del></p>"),
    ("***a*** **b *c***", "<p><strong><em>a</em></strong> <strong>b <em>c</em></strong></p>"),
    ("2 * 3 * 4, snake_case_name, a ** b", "<p>2 * 3 * 4, snake_case_name, a ** b</p>"),
    (r"\*a\* \_ \\", r"<p>*a* _ \</p>"),
    ("`a*b*` ``c`d`` `open", "<p><code>a*b*</code> <code>c`d</code> `open</p>"),
    ("a\n---\nb\n***", "<p>a</p><hr><p>b</p><hr>"),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("- a\n- b\n  c", "<ul><li><span>a</span></li><li><span>b<br>c</span></li></ul>"),
    ("- a\n  - b", "<ul><li><span>a</span><ul><li><span>b</span></li></ul></li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li><span>a</span></li><li><span>b</span></li></ol>'),
    ("1. a\n\n   b\n\n2. c", "<ol><li><p>a</p><p>b</p></li><li><span>c</span></li></ol>"),
    ("- a\n\n  b", "<ul><li><p>a</p><p>b</p></li></ul>"),
    ("- a\n\nb", "<ul><li><span>a</span></li></ul><p>b</p>"),
    ("```py\n<b>\n\n# x\n```\nafter", "<div><pre><code>&lt;b&gt;\n\n# x</code></pre></div><p>after</p>"),
    ("~~~\nopen", "<div><pre><code>open</code></pre></div>"),
    ("- x\n  ```\n  a\n    b\n  ```", "<ul><li><span>x</span><div><pre><code>a\n  b</code></pre></div></li></ul>"),
    (
        "a\n|b|c|\n|-|:-:|\n|`d`|e\\|f|x|",
        (
            "<p>a</p><div><table><thead><tr><th>b</th><th>c</th></tr></thead>"
            "<tbody><tr><td><code>d</code></td><td>e|f</td></tr></tbody></table></div>"
        ),
    ),
    ("a | b\nc", "<p>a | b<br>c</p>"),
]  # fmt: skip
LINKS = [
    ("[x](https://a.b/c)", f"<p>{LINK}x</a></p>"),
    ('[*x*](https://a.b/c "t") [y](https://a.b/d_(e))', f'<p>{LINK}<em>x</em></a> <a href="https://a.b/d_(e)">y</a></p>'),
    ("![x](https://a.b/c)", f"<p>{LINK}x</a></p>"),
    ("see https://a.b/c. <https://a.b/c>", f"<p>see {LINK}https://a.b/c</a>. {LINK}https://a.b/c</a></p>"),
    ("[https://a.b/c](https://a.b/c)", f"<p>{LINK}https://a.b/c</a></p>"),
    ("[x](javascript:alert(1)) [y](/health)", "<p>[x](javascript:alert(1)) [y](/health)</p>"),
    ("<javascript:a> [z](data:text/html,a)", "<p>&lt;javascript:a&gt; [z](data:text/html,a)</p>"),
    ('[x](https://a.b/"onclick="alert(1))', '<p><a href="https://a.b/&quot;onclick=&quot;alert(1)">x</a></p>'),
    ("<img src=x onerror=alert(1)> &lt;b&gt;", "<p>&lt;img src=x onerror=alert(1)&gt; &amp;lt;b&amp;gt;</p>"),
]  # fmt: skip
# Each makes a careless parser slow, or overflows its stack.
HOSTILE = ["*a ", "_a", "***a", "**a __b ", "`a``b```", "\\", "[", "[a](https://", "![](https://a(", "<https://", "h",
           "https://", "> ", "- ", "1. ", "|-", "|a\n|-\n", "#", "# ", "~~~\n", "\t", "\n", "a\n", "a\n\n"]  # fmt: skip


@pytest.fixture(scope="module")
def page(browser: Any, tiny_server: Any) -> Iterator[Any]:
    browser.open(f"{tiny_server.url}/")
    browser.console()
    yield browser
    assert browser.console() == []


def render(page: Any, *texts: str) -> str:
    """Return the HTML after the texts have been shown one after the other."""
    return str(page.run(f"return (async (...arguments) => {{ {RENDER} }})(...arguments)", texts))


@pytest.mark.parametrize(("text", "html"), BASIC + LINKS)
def test_markdown_becomes_elements(page: Any, text: str, html: str) -> None:
    assert render(page, text) == html


def test_a_text_in_pieces_looks_as_the_whole(page: Any) -> None:
    text = "\n\n".join(text for text, _ in BASIC + LINKS)
    pieces = [text[:end] for end in range(1, len(text), 3)]
    assert render(page, *pieces, text) == render(page, text)


def test_finished_blocks_stay(page: Any) -> None:
    script = """
    const { show } = await import("/page/markdown.js");
    const body = document.createElement("div");
    show(body, "one\\n\\n```\\na");
    const before = [...body.children];
    show(body, "one\\n\\n```\\na\\nb\\n```\\n\\nthree");
    return [body.children[0] === before[0], body.children[1] === before[1], body.querySelector("code").textContent];
    """
    assert page.run(f"return (async () => {{ {script} }})()") == [True, True, "a\nb"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_texts_are_rendered_within_the_browser_s_limit(page: Any, piece: str) -> None:
    """WebDriver ends a script after 30 s; a time that grows with the square of the length takes longer."""
    assert len(render(page, piece * (200_000 // len(piece)))) > 0 or piece.isspace()
