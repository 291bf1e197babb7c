"""Random Jinja programs from a small grammar, as attacks by an untrusted chat template."""

# ruff: noqa: E501 - word lists and templates are easier to read on one line
from random import Random

_NAMES = "messages tools documents bos_token eos_token m loop namespace range dict cycler joiner lipsum self ns x y".split()
_ATTRIBUTES = (
    "__class__ __mro__ __subclasses__ __globals__ __init__ __dict__ __builtins__ __import__ __code__ func_globals gi_frame"
    " f_back f_globals mro format format_map join replace items keys values append pop upper encode index0 previtem depth0"
    " _fail_with_undefined_error environment call eval_ctx name"
).split()
_FILTERS = (
    "tojson length list join('x') string int float trim upper first last map('upper') map(attribute='__class__') select sort unique"
    " groupby('role') batch(3) slice(3) center(99999999) indent(9999) replace('a','b'*99) attr('__class__') format(1) pprint"
    " random reverse round(9) sum safe escape urlize wordwrap(1) xmlattr filesizeformat truncate(5) default('x') dictsort"
    " tojson(indent=9999) striptags wordcount items abs min max"
).split(" ")
_LITERALS = (
    "0 1 -1 2 3 64 1000 99999999 9223372036854775807 10**9 1e308 '' 'a' 'role' 'content' 'aaaa' '%s' '%999999999d' '{0.__class__}'"
    " '{:>999999999}' true false none [] {} [1,2,3] {'a':1} messages[0] messages[0]['content'] '\\ud800' '\\0'"
).split(" ")
_OPERATORS = "+ - * / // % ** ~ == != < > and or in is".split()
_STATEMENTS = (
    "output output output text for for if set set_block macro call filter raw break continue raise strftime"
    " include generation block recursive namespace"
).split()
_LOOPS = (
    "messages",
    "range(3)",
    "range(9)",
    "range(99999999)",
    "'abc'",
    "messages[0].items()",
    "[1,2]*9",
    "range(300)",
)


def program(random: Random) -> str:
    """Return a random template. Most compile; some loop, grow, or follow chains of attributes."""
    if random.random() < 0.02:
        return random.choice(("(", "{{", "{%")) * random.choice((10, 500, 100_000))
    made = "".join(_statement(random, 3) for _ in range(random.randrange(1, 5)))
    if random.random() < 0.1:
        at = random.randrange(len(made) + 1)
        made = (
            made[:at]
            + random.choice(("{{", "}}", "%}", "{%", "\0", "'", "\ud800", "#}", "{#", "é" * 9))
            + made[at:]
        )
    return made


def expression(random: Random, depth: int) -> str:
    """Return a random expression, nested at most `depth` deep."""
    if depth <= 0 or random.random() < 0.2:
        return random.choice((*_NAMES, *_LITERALS))
    inner = expression(random, depth - 1)
    match random.randrange(8):
        case 0:
            return f"({inner} {random.choice(_OPERATORS)} {expression(random, depth - 1)})"
        case 1:
            return f"{_base(inner)}.{random.choice(_ATTRIBUTES)}"
        case 2:
            return f"{_base(inner)}['{random.choice(_ATTRIBUTES)}']"
        case 3:
            return f"({inner})|{random.choice(_FILTERS)}"
        case 4:
            return f"{_base(inner)}.{random.choice(_ATTRIBUTES)}({expression(random, depth - 1)})"
        case 5:
            return f"{_base(inner)}[{expression(random, 0)}:{expression(random, 0)}]"
        case 6:
            return f"({inner} if {expression(random, depth - 1)} else {expression(random, 0)})"
        case _:
            return f"{random.choice(_NAMES)}({inner})"


def _base(inner: str) -> str:
    return inner if inner.isidentifier() else f"({inner})"


def _body(random: Random, depth: int) -> str:
    return "".join(_statement(random, depth - 1) for _ in range(random.randrange(1, 3)))


def _statement(random: Random, depth: int) -> str:  # noqa: C901  # a case for each statement
    kind = random.choice(_STATEMENTS) if depth > 0 else "output"
    value, name = expression(random, 3), random.choice("mxy")
    match kind:
        case "text":
            return random.choice(("hello ", "\n", "x" * 5000, "<|im_start|>", "é\U0001f600"))
        case "for":
            over = random.choice(_LOOPS) if random.random() < 0.8 else value
            condition = f" if {expression(random, 1)}" if random.random() < 0.2 else ""
            return f"{{% for {name} in {over}{condition} %}}{_body(random, depth)}{{% endfor %}}"
        case "recursive":
            return f"{{% for {name} in messages recursive %}}{{{{ loop(messages) }}}}{_body(random, depth)}{{% endfor %}}"
        case "if":
            return f"{{% if {value} %}}{_body(random, depth)}{{% else %}}{_body(random, depth)}{{% endif %}}"
        case "set":
            return f"{{% set {name} = {value} %}}" + (
                f"{{% set {name} = {name} + {name} %}}" * random.choice((0, 0, 40))
            )
        case "namespace":
            return f"{{% set ns = namespace(x={value}) %}}{{% for m in range(40) %}}{{% set ns.x = ns.x ~ ns.x %}}{{% endfor %}}"
        case "set_block":
            return f"{{% set {name} %}}{_body(random, depth)}{{% endset %}}"
        case "macro":
            return f"{{% macro {name}(a, b=1) %}}{_body(random, depth)}{{{{ {name}(a) if a else '' }}}}{{% endmacro %}}{{{{ {name}({value}) }}}}"
        case "call":
            return f"{{% call {name}() %}}{_body(random, depth)}{{% endcall %}}"
        case "filter":
            return f"{{% filter {random.choice(_FILTERS)} %}}{_body(random, depth)}{{% endfilter %}}"
        case "raw":
            return f"{{% raw %}}{{{{ {value} }}}}{{% endraw %}}"
        case "break" | "continue":
            return f"{{% for m in range(3) %}}{{% {kind} %}}{{% endfor %}}"
        case "raise":
            return f"{{{{ raise_exception({value}) }}}}"
        case "strftime":
            return f"{{{{ strftime_now({random.choice(('%Y', chr(39) + '%d %b' + chr(39), value))}) }}}}"
        case "include":
            return random.choice(
                (
                    "{% include '/etc/passwd' %}",
                    "{% extends 'x' %}",
                    "{% import 'os' as os %}",
                    "{% from 'os' import path %}",
                )
            )
        case "generation":
            return f"{{% generation %}}{_body(random, depth)}{{% endgeneration %}}"
        case "block":
            return f"{{% block {name} %}}{_body(random, depth)}{{% endblock %}}"
        case _:
            return f"{{{{ {value} }}}}"
