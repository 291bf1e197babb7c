"""All operations of the chat sandbox: time and memory are limited, and results equal those of jinja2."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import jinja2.defaults
import pytest
from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext
from jinja2.tests import TESTS
from markupsafe import Markup

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.text.chat_filters import ALLOWED_FILTERS, ALLOWED_TESTS
from precast.loaders.text.chat_methods import ATTRIBUTES, METHODS
from precast.loaders.text.chat_sandbox import FUNCTIONS
from precast.loaders.text.chat_template import ChatTemplate, Limits

MESSAGES = [{"role": "user", "content": "hi"}]
CHILD = Path(__file__).with_name("template_child.py")


def render(source: str, **limits) -> str:
    return ChatTemplate(source, bos_token=None, eos_token=None, limits=Limits(**limits)).render(MESSAGES)


# The set of operations


def test_every_filter_test_and_function_of_jinja2_is_allowed_or_refused_by_name() -> None:
    refused = "batch center filesizeformat forceescape pprint random slice striptags urlize wordwrap xmlattr".split()
    assert sorted(FILTERS) == sorted([*ALLOWED_FILTERS, *refused])
    assert sorted(TESTS) == sorted(ALLOWED_TESTS)
    ours = {"raise_exception", "strftime_now"}
    assert {*jinja2.defaults.DEFAULT_NAMESPACE} == {*FUNCTIONS} - ours | {"lipsum"}


VALUES = {
    str: "'a'",
    Markup: "('a'|safe)",
    int: "1 ",
    float: "1.5",
    bool: "true",
    list: "[1]",
    tuple: "(1,)",
    dict: "{'a': 1}",
    range: "range(3)",
    type({}.items()): "{'a': 1}.items()",
    type({}.keys()): "{'a': 1}.keys()",
    type({}.values()): "{'a': 1}.values()",
    type(None): "none",
    type("".join): "''.join",
    type(lambda: None): "range",
    LoopContext: "loop",
}


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_every_attribute_of_a_value_is_allowed_or_refused_by_name(kind: type) -> None:
    allowed = ATTRIBUTES.get(kind, frozenset())
    assert allowed.issuperset(METHODS.get(kind, ()))
    assert all(
        hasattr(kind, name) or kind is LoopContext for name in allowed - {"is_integer"}
    )  # Python 3.12 added it
    for name in dir(kind):
        if name in allowed:
            continue
        for read in (f"x.{name}", f"x['{name}']", f"x|attr('{name}')"):
            source = (
                f"{{% for i in 'a' %}}{{% set x = {VALUES[kind]} %}}{{% set y = ({read}).z %}}{{% endfor %}}"
            )
            with pytest.raises(PrecastError, match=f"access to attribute '{name}' of .* is unsafe"):
                render(source)


# Cost


def child(what: str, *args: str) -> dict:
    """Run cases in a child process with limited memory. If a case hangs, the child prints the case's name and ends."""
    run = subprocess.run(
        [sys.executable, str(CHILD), what, *args], capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", ["text", "structure", "compile", "random"])
def test_time_and_memory_stay_below_the_limits(part: str) -> None:
    found = child(part)
    assert found["cases"] > {"text": 200, "structure": 800, "compile": 30, "random": 300}[part]
    assert found["unknown"] == []
    # Limits in CPU time. A case is compiled and rendered, and each of the two may take 2 seconds.
    assert found["slow"] == []
    assert found["grown"] < 256e6, found


def test_ctrl_c_ends_a_template_at_once() -> None:
    found = child("interrupt")
    assert found["interrupted"] == found["cases"]
    assert found["slow"] == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ '%999999999d' is odd }}", "TypeError: odd expects a number, not 'str'"),
        ("{{ ('%9999d' * 9) is divisibleby(3) }}", "TypeError: divisibleby expects a number, not 'str'"),
        ("{{ {'a': 1}.keys() - {'a': 1}.keys() }}", "TypeError: unsupported operand .*"),
        ("{{ {(1, 2): 3} }}", "a key of type tuple is not allowed"),
        ("{{ dict([[10 ** 30, 1]]) }}", "a key of type int is not allowed"),
        ("{{ range(10 ** 30) }}", "OverflowError: Range too big"),
        ("{{ ('f' * 5000) | int(base=16) }}", "a number grew beyond 4096 bits"),
        ("{% set ns = namespace(_x=1) %}", "a namespace accepts no name that begins with an underscore.*"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "a namespace accepts no name that begins with.*"),
        ("{{ messages | map(attribute='a.' * 20) | list }}", "an attribute has too many parts"),
        ("{{ range('a'|length, *'bc') }}", "TypeError: .*"),
        ("{{ messages[[1]].x }}", "list object has no element of type list"),
        ("{{ messages[5].x }}", "list object has no element 5"),
        ("{{ {}['x' * 9999].y }}", "'dict object' has no attribute 'x{200}…'"),
        ("{{ 5() }}", "TypeError: 'int' object is not callable"),
        ("{{ messages[0].pop('role') }}", "access to attribute 'pop' of 'dict' object is unsafe"),
    ],
)
def test_expensive_operations_without_a_use_are_refused(source: str, reason: str) -> None:
    with pytest.raises(PrecastError, match=rf"^The chat template failed at line 1: {reason}; correct it, "):
        render(source)


def test_the_weight_of_a_shared_list_counts_each_occurrence() -> None:
    source = "{% set ns = namespace(x=['a']) %}{% for i in range(LEVELS) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    assert render(source.replace("LEVELS", "17") + "{{ ns.x == ns.x }}") == "True"
    with pytest.raises(PrecastError, match=r"a nested list has more than 2,000,000 items"):
        render(source.replace("LEVELS", "40"))


def test_a_deep_list_is_refused() -> None:
    source = "{% set ns = namespace(x=0) %}{% for i in range(LEVELS) %}{% set ns.x = [ns.x] %}{% endfor %}"
    assert render(source.replace("LEVELS", "90") + "{{ ns.x | string | length }}") == "181"
    with pytest.raises(PrecastError, match=r"it nested lists more than 100 deep"):
        render(source.replace("LEVELS", "5000"))


def test_a_template_with_many_names_and_conditions_is_refused() -> None:
    source = "".join(f"{{% if a %}}{{% set a{n}=1 %}}{{% endif %}}" for n in range(2500))
    with pytest.raises(PrecastError, match="it has too many names for its conditions and loops"):
        ChatTemplate(source, bos_token=None, eos_token=None, limits=Limits(seconds=60))


def test_a_slow_template_is_probed_with_few_steps() -> None:
    source = "{{ messages[0].content }}{% for i in range(99999) %}{% set a = i * 2 %}{% endfor %}"
    template = ChatTemplate(source, bos_token=None, eos_token=None, limits=Limits(seconds=60))
    assert template.render(MESSAGES) == "hi"
    with pytest.raises(PrecastError, match="took more than 500,000 steps"):
        ChatTemplate(source, bos_token=None, eos_token=None, limits=Limits().for_probe()).render(MESSAGES)


def test_an_error_keeps_no_value_of_the_template_alive() -> None:
    with pytest.raises(PrecastError) as raised:
        render("{% set x = 'a' * 9999 %}{{ x.y.z }}")
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None


# Results

SMALL = (
    "'aßŉ b' 'a,b\\n\\tc' ' x ' '7' '' 'TITLE_case' ['b','A','b'] [1,3,2] (1,2) [] {'b':1,'a':[2]} 3 -2.5 true none"
    " nothing range(4) messages ('<b>'|safe) [[2,1],[0]] 'a%sb'"
).split(" ")
SMALL = ["'aßŉ b'", "' x '", *[value for value in SMALL if value.count("'") % 2 == 0 and value]]
FILTER_ARGS = {
    "attr": "('role')",
    "default": "('d', true)",
    "groupby": "(0)",
    "map": "('string')",
    "replace": "('b', 'cc')",
    "select": "('defined')",
    "reject": "('none')",
    "selectattr": "('role')",
    "rejectattr": "('role')",
    "format": "(1)",
    "truncate": "(3)",
    "trim": "('b')",
    "int": "(9)",
}
METHOD_ARGS = ("", "'b'", "'b', 'c'", "9", "['x', 'y']", "none, 1", "' b'")


def expressions() -> list[str]:
    made = []
    for value in SMALL:
        for name in ALLOWED_FILTERS:
            called = f"({value})|{name}{FILTER_ARGS.get(name, '')}"
            lazy = name in (
                "items",
                "map",
                "reject",
                "rejectattr",
                "reverse",
                "select",
                "selectattr",
                "unique",
            )
            made.append(f"{called}|list" if lazy else called)
        made += [
            f"({value}) is {name}" for name in ALLOWED_TESTS if name.isalpha() and name not in _TAKES_ONE
        ]
        made += [f"({value}) is {name} 3" for name in _TAKES_ONE if name != "in"]
        made += [f"({value}) {operator} {other}" for operator in "+-*/%~" for other in ("2", "'b'", "[1]")]
        made += [f"({value}) {operator} 'b'" for operator in ("==", "<", "in", "not in")]
        made += [f"{other} in ({value})" for other in ("'b'", "3", "none")]
        made += [f"({value})[{index}]" for index in ("0", "-1", "1:", "::-1", "'b'")]
    return made


_TAKES_ONE = (
    "divisibleby",
    "eq",
    "equalto",
    "ne",
    "gt",
    "greaterthan",
    "ge",
    "lt",
    "lessthan",
    "le",
    "sameas",
    "in",
)


def method_calls() -> list[str]:
    owners = {str: ("'a,b bß'", "'Ab\\nc '"), list: ("['b', 1]",), dict: ("{'b': 1}",), tuple: ("('b', 1)",)}
    owners |= {int: ("5",), float: ("2.5",), range: ("range(3)",), Markup: ("('<b>'|safe)",)}
    return [
        f"({owner}).{name}({args})"
        for kind, values in owners.items()
        for owner in values
        for name in (*METHODS[kind], *(("format",) if kind is str else ()))
        for args in METHOD_ARGS
        if hasattr(kind, name)
    ]


# Operations that precast refuses, although jinja2 prints an address or a Python type's name, or accepts the type. In
# jinja2 too, a slice of a value without items fails, except if both are constants.
REFUSED = (
    "cannot become text|is not allowed|expects|unsafe|sum adds numbers only|too large|unhashable type: 'slice'"
    "|is not subscriptable"
)


@pytest.mark.parametrize("make", [expressions, method_calls])
def test_the_result_of_an_expression_equals_that_of_transformers(make) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    compared = 0
    for expression in make():
        source = f"{{{{ {expression} }}}}"
        try:
            theirs = utils._compile_jinja_template(source).render(messages=deepcopy(MESSAGES))
        except Exception:
            theirs = None
        try:
            ours, refusal = render(source), ""
        except PrecastError as error:
            ours, refusal = None, str(error)
        if refusal:
            assert theirs is None or re.search(REFUSED, refusal), (source, theirs, refusal)
            continue
        assert ours == theirs, source
        compared += 1
    assert compared > 200
