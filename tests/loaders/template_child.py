"""Run templates that try to hang or to exhaust memory. `test_chat_sandbox` starts this script.

Usage: `template_child.py PART`. The last line of the output is a JSON object. If a case hangs, the process ends with a
traceback, after the name of the case.
"""

# ruff: noqa: E501 - templates are easier to read on one line

import faulthandler
import importlib.util
import json
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.text.chat_filters import ALLOWED_FILTERS, ALLOWED_TESTS
from precast.loaders.text.chat_methods import METHODS
from precast.loaders.text.chat_template import ChatTemplate, Limits

HANG = 120.0
SLOW = 4.0
"""Seconds of CPU time: the limit of a compilation plus that of a rendering."""
SHARED = "{% set ns = namespace(x=VALUE) %}{% for i in range(LEVELS) %}{% set ns.x = PAIR %}{% endfor %}{% set x = ns.x %}"


def shared(value: str, pair: str, levels: int) -> str:
    return SHARED.replace("VALUE", value).replace("PAIR", pair).replace("LEVELS", str(levels))


TEXTS = {
    "ascii": "'ab' * 8000000",
    "letters": "'a' * 30000000",
    "cjk": "'中' * 12000000",
    "growing": "'ŉß' * 1500000",
    "spaces": "' \\n' * 600000",
    "escapes": "'\\x00&%{' * 400000",
}
STRUCTURES = {
    "list 17": shared("['a']", "[ns.x, ns.x]", 17),
    "list 40": shared("['a']", "[ns.x, ns.x]", 40),
    "tuple 17": shared("('a',)", "(ns.x, ns.x)", 17),
    "tuple 60": shared("('a',)", "(ns.x, ns.x)", 60),
    "dict 16": shared("{'a': 1}", "{'a': ns.x, 'b': ns.x}", 16),
    "dict 50": shared("{'a': 1}", "dict(a=ns.x, b=ns.x)", 50),
    "deep": shared("[]", "[ns.x]", 99),
    "deeper": shared("()", "(ns.x,)", 100000),
    "itself": "{% set x = namespace() %}{% set x.x = [x, x] %}",
    "range": "{% set x = range(99999) %}",
    "colliding": "{% set x = range(0, 2305843009213693951 * 2, 2305843009213693951) | list * 300 %}",
    "number": "{% set x = 2 ** 4095 %}",
    "literal": "{% set x = 0x" + "f" * 3000 + " %}",
    "lazy": "{% set x = range(99999) | map('string') %}",
    "characters": "{% set x = ('中' * 50000) | list %}",
    "long list": "{% set x = [messages] * 50000 %}",
    "chain": "{% set ns = namespace(x='ab') %}{% for i in range(2000) %}{% set ns.x = ns.x | map('string') %}{% endfor %}{% set x = ns.x %}",
    "method": "{% set x = ''.join %}",
    "undefined": "{% set x = nothing %}",
    "macro": "{% macro x(a) %}{{ varargs }}{{ kwargs }}{{ x(varargs, kwargs, varargs) }}{% endmacro %}",
}
_ARGUMENTS = ("", "(x)", "(x, x)", "(9000000)", "('a', x)", "(attribute='a')")
_OPERATIONS = (
    *(
        "{{ x }}",
        "{% set y = x ~ x %}",
        "{% set y = x + x %}",
        "{% set y = x * 9999 %}",
        "{% set y = x * x %}",
    ),
    *(
        "{% set y = x - x %}",
        "{% set y = x // 3 %}",
        "{% set y = x % x %}",
        "{% set y = x ** x %}",
        "{% set y = -x %}",
    ),
    *("{% set y = x == z %}", "{% set y = x != x %}", "{% set y = x < z %}", "{% set y = x < z < x %}"),
    *("{% set y = x in [z, x] %}", "{% set y = x in z %}", "{% set y = 'q' in x %}", "{% set y = x in {} %}"),
    *(
        "{% set y = x[x] %}",
        "{% set y = {}[x] %}",
        "{{ {}[x].y }}",
        "{{ messages[x].y }}",
        "{% set y = {x: 1} %}",
    ),
    *(
        "{% set y = x[::-1] %}",
        "{% set y = x[1:] %}",
        "{% set y = x[x:] %}",
        "{{ x.y.z }}",
        "{{ x|attr(x) }}",
    ),
    *(
        "{% set y = '%s%s' % (x, x) %}",
        "{% set y = '%r' % x %}",
        "{% set y = '%(a)s' % x %}",
        "{% set y = '%d' % x %}",
    ),
    *(
        "{% set y = '{}{!r}'.format(x, x) %}",
        "{% set y = '{0.x}{0[0]}'.format(x) %}",
        "{% set y = '{:{}}'.format(x, x) %}",
    ),
    *("{% set y = ''.join(x) %}", "{% set y = 'b'.join([x, x]) %}", "{% set y = ('b'|safe).join([x, x]) %}"),
    *("{% set y = [1].index(x) %}", "{% set y = [x, z].count(z) %}", "{% set y = {'a': x}.get(x) %}"),
    *(
        "{% set y = dict(x) %}",
        "{% set y = dict(a=x, b=x) %}",
        "{% set y = namespace(x) %}",
        "{% set y = cycler(x, x).next() %}",
    ),
    *("{{ joiner(x)() }}", "{% set y = range(x) %}", "{{ strftime_now(x) }}", "{{ raise_exception(x) }}"),
    *(
        "{{ x(x) }}",
        "{{ x(*x) }}",
        "{{ x(**x) }}",
        "{{ range(*x) }}",
        "{{ dict(**x) }}",
        "{% set y = x|tojson(indent=x) %}",
    ),
    *("{% set y = x|tojson(separators=(x, x)) %}", "{% set y = x|tojson(ensure_ascii=true, indent=16) %}"),
    *("{% for a in x %}{% set y = loop.length %}{{ loop.changed(x) }}{{ loop.cycle(x) }}{% endfor %}",),
    *(
        "{% for a in x recursive %}{{ loop(a) }}{% endfor %}",
        "{% for a, b in x %}{% endfor %}",
        "{% set a, b = x %}",
    ),
    *(
        "{% for a in x if a == x %}{% endfor %}",
        "{% for a in x %}{{ a }}{% else %}{% endfor %}",
        "{% if x %}{% endif %}",
    ),
    *(
        "{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(x, x, a=x) }}{{ f(*x) }}",
        "{% filter upper %}{{ x }}{% endfilter %}",
    ),
    *("{% macro g(n) %}{{ caller(x) }}{% endmacro %}{% call(a) g(1) %}{{ a }}{{ a == x }}{% endcall %}",),
    *("{% set y %}{{ x }}{{ x }}{% endset %}{% set y = y ~ y %}", "{% set y = x|sort(attribute='a,b') %}"),
)


def filters() -> Iterator[str]:
    for name in ALLOWED_FILTERS:
        for arguments in _ARGUMENTS:
            lazy = name in (
                "map",
                "select",
                "reject",
                "selectattr",
                "rejectattr",
                "unique",
                "items",
                "reverse",
            )
            yield f"{{% set y = x|{name}{arguments}{'|list' if lazy else ''} %}}"
    yield from (
        f"{{% set y = x|map('{name}')|list %}}" for name in ("upper", "tojson", "list", "int", "default")
    )


def tests() -> Iterator[str]:
    for name in ALLOWED_TESTS:
        if name.isalpha():
            yield f"{{% set y = x is {name} %}}"
            yield f"{{% set y = x is {name} z %}}"
            yield f"{{% set y = [x]|select('{name}', z)|list %}}"


def methods(kinds: tuple[type, ...], arguments: tuple[str, ...]) -> Iterator[str]:
    names = {name for kind in kinds for name in METHODS[kind]}
    for name in sorted(names):
        yield from (f"{{% set y = x.{name}{given} %}}" for given in arguments)


def text_cases() -> Iterator[tuple[str, str]]:
    half = ("(x[:n])", "(x[:n] ~ 'q')", "('q' ~ x[:n])", "('a', x[:9999])", "(9000000)", "()")
    for kind, value in TEXTS.items():
        before = f"{{% set x = {value} %}}{{% set z = x ~ 'q' %}}{{% set n = x|length // 2 %}}"
        # Try all arguments on one kind of text, and each method without arguments on all other kinds.
        operations = [*methods((str,), half if kind == "ascii" else ("()",))]
        operations += [f"{{% set y = x|{name} %}}" for name in ALLOWED_FILTERS]
        operations += [*_OPERATIONS] if kind in ("ascii", "escapes") else []
        for operation in operations:
            yield f"{kind}: {operation}", before + operation


def structure_cases() -> Iterator[tuple[str, str]]:
    kinds = tuple(kind for kind in METHODS if kind.__module__ == "builtins" and kind is not str)
    operations = [*_OPERATIONS, *filters(), *tests(), *methods(kinds, ("()", "(z)", "(z, 1)"))]
    for number, operation in enumerate(operations):
        for index, (kind, value) in enumerate(STRUCTURES.items()):
            # Each operator is tried on a third of the values; each filter, test and method on one or two values.
            if (number + index) % (3 if number < len(_OPERATIONS) else 14) == 0:
                # An equal value that is another object.
                again = value.replace("set x =", "set z =").replace("macro x", "macro z")
                yield f"{kind}: {operation}", value + again + operation


def compile_cases() -> Iterator[tuple[str, str]]:
    many = 60_000
    for opened, closed in (
        ("(", ")"),
        ("[", "]"),
        ("{% if a %}", "{% endif %}"),
        ("{% for a in b %}", "{% endfor %}"),
    ):
        for depth in (15, 90, 5000):
            inside = "1" if opened in "([" else ""
            text = opened * depth + inside + closed * depth
            yield f"{depth} {opened}", "{{ " + text + " }}" if inside else text * (90 // depth + 1)
    for chained in ("+1", ".b", "|e", "()", "~1", "<1", " and 1", "[1:2]", ",1", " if a else 1"):
        yield f"chain {chained}", "{{ 1" + chained * 9000 + " }}"
        yield f"short chain {chained}", "{{ 1" + chained * 150 + " }}"
    for repeated in (
        *(
            "{{a}}",
            "{{a.b(c)}}",
            "{% if a %}{% endif %}",
            "{% for a in b %}{{loop.index}}{% endfor %}",
            "{##}",
            "    {%- set a=1 -%}\n",
        ),
        *(
            "{% macro a(b) %}{{b}}{% endmacro %}",
            "{% call a() %}{% endcall %}",
            "{% raw %}{% endraw %}",
            "{{ 'a' }}",
            "{",
            "}}",
            "\n{%",
        ),
    ):
        yield f"repeat {repeated}", (repeated * many)[: (1 << 17) // len(repeated) * len(repeated)]
        yield f"repeat less {repeated}", repeated * 2000
    for text in (
        "'" + "a" * many,
        "'" + "\\\\" * many,
        "1" * many,
        "0x" + "f" * many,
        "1_" * many,
        "é" * many,
        " " * many,
    ):
        yield f"token {text[:3]}", "{{ " + text + " }}"
    yield "elif", "{% if a %}" + "{% elif a %}x" * 3000 + "{% endif %}"
    yield "names", "".join(f"{{% if a %}}{{% set a{n}=1 %}}{{% endif %}}" for n in range(2500))
    yield "arguments", "{{ f(" + ",".join(f"a{n}=1" for n in range(6000)) + ") }}"


def random_cases() -> Iterator[tuple[str, str]]:
    path = Path(__file__).parents[1] / "fuzz" / "templates.py"
    spec = importlib.util.spec_from_file_location("templates", path)
    assert spec is not None
    assert spec.loader is not None
    templates = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(templates)
    for seed in range(400):
        yield f"seed {seed}", templates.program(Random(seed))


PARTS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "text": text_cases,
    "structure": structure_cases,
    "compile": compile_cases,
    "random": random_cases,
}


def peak() -> int:
    """Return the peak resident memory in bytes; `ru_maxrss` would include the parent's memory from before the exec."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def run(source: str, limits: Limits | None = None) -> str | None:
    """Compile and render a template; return an error other than PrecastError, or None."""
    try:
        template = ChatTemplate(source, bos_token="<s>", eos_token=None, limits=limits)
        template.render([{"role": "user", "content": "hi"}])
    except PrecastError:
        return None
    except MemoryError:
        return "MemoryError"
    return None


def run_all(cases: Iterator[tuple[str, str]]) -> dict:
    start, count, slow, unknown = peak(), 0, [], []
    for name, source in cases:
        count += 1
        print(name[:200], flush=True)
        faulthandler.dump_traceback_later(HANG, exit=True)
        before = time.thread_time()
        error = run(source)
        taken = time.thread_time() - before
        faulthandler.cancel_dump_traceback_later()
        if error:
            unknown.append(f"{name}: {error}")
        if taken > SLOW:
            slow.append(f"{name}: {taken:.1f} s")
    return {"cases": count, "slow": slow, "unknown": unknown, "grown": peak() - start}


INTERRUPTED = (
    "{% for i in range(99999) %}{% endfor %}",
    "{% set y = ('ŉß' * 2000000).title() %}",
    "{% set y = ('a' * 20000000).find('a' * 9000000 ~ 'b') %}",
    "{% set y = range(60000)|sort %}",
    "{% set y = (x|list) == (x|list) %}",
    "{% set y = '%s' % x %}",
)


def interrupt() -> dict:
    """Press Ctrl-C while a template with very high limits runs."""
    limits = Limits(seconds=100, steps=10**12, allocated=10**13)
    interrupted, slow = 0, []
    for source in INTERRUPTED:
        print(source, flush=True)
        faulthandler.dump_traceback_later(HANG, exit=True)
        endless = "{% set x = 'ab' * 300000 %}{% for j in range(9999) %}" + source + "{% endfor %}"
        pressed: list[float] = []
        timer = threading.Timer(1.0, press, (pressed,))
        timer.start()
        try:
            run(endless, limits)
            timer.join()
        except KeyboardInterrupt:
            interrupted += 1
            if time.thread_time() - pressed[0] > 1.0:
                slow.append(source)
        timer.join()
        faulthandler.cancel_dump_traceback_later()
    return {"cases": len(INTERRUPTED), "interrupted": interrupted, "slow": slow}


def press(pressed: list[float]) -> None:
    # CPU time of the main thread, which runs the template.
    pressed.append(time.clock_gettime(time.pthread_getcpuclockid(threading.main_thread().ident or 0)))
    signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    result = interrupt() if sys.argv[1] == "interrupt" else run_all(PARTS[sys.argv[1]]())
    print(json.dumps(result))
