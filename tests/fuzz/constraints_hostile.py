"""Hostile constraints: schemas, expressions and grammars that demand excessive time, memory or stack.

`python constraints_hostile.py SEED COUNT` tries them in this process, and prints a line of JSON for each: the case, its
outcome, its time in seconds, and the process's peak memory so far.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Case = dict[str, Any]
STEPS = 25
VOCABULARY = 4_000
END = 0


def cases(seed: int, count: int) -> Iterator[tuple[str, Case]]:
    """Yield named parameters, the families in turn."""
    random = Random(seed)
    for index in range(count):
        family = FAMILIES[(seed + index) % len(FAMILIES)]
        yield family.__name__, family(random)


# --- depth ----------------------------------------------------------------------------------------------------


def deep(random: Random) -> Case:
    """Nest one keyword, up to a depth at which recursive parsers crash."""
    key = random.choice(("items", "additionalProperties", "anyOf", "allOf", "properties"))
    schema: Any = {"type": "string"}
    for _ in range(size(random, 20_000)):
        wrapped = {"anyOf": [schema], "allOf": [schema], "properties": {"a": schema}}
        schema = {key: wrapped.get(key, schema)}
    return {"json_schema": schema if random.random() < 0.5 else dumps(schema)}


def deep_text(random: Random) -> Case:
    depth = size(random, 50_000)
    opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
    return {"json_schema": '{"const":' + opening * depth + "1" + closing * depth + "}"}


def references(random: Random) -> Case:
    """Refer from each definition to the next, within another keyword or none."""
    count, wrap = size(random, 4_000), random.randrange(4)

    def to(name: str) -> Case:
        reference = {"$ref": f"#/{name}"}
        return (
            {"items": reference},
            {"properties": {"a": reference}},
            {"anyOf": [{}, reference]},
            reference,
        )[wrap]

    return {"json_schema": {f"{i:x}": to(f"{i + 1:x}") for i in range(count)} | {f"{count:x}": {}, **to("0")}}


def cycles(random: Random) -> Case:
    """Let every definition refer to some others, itself included."""
    count = random.randint(1, 200)
    key = random.choice(("anyOf", "allOf", "oneOf"))
    definitions = {
        str(i): {key: [{"$ref": f"#/$defs/{random.randrange(count)}"} for _ in range(random.randint(1, 4))]}
        for i in range(count)
    }
    return {"json_schema": {"$defs": definitions, "$ref": "#/$defs/0"}}


def doubling(random: Random) -> Case:
    """Double the work with every level."""
    count, key = random.randint(5, 80), random.choice(("anyOf", "allOf", "prefixItems", "properties"))

    def twice(name: str) -> Case:
        two = [{"$ref": f"#/$defs/{name}"}, {"$ref": f"#/$defs/{name}"}]
        return {key: dict(zip("ab", two, strict=True)) if key == "properties" else two}

    definitions: Case = {str(i): twice(str(i + 1)) for i in range(count)}
    return {"json_schema": {"$defs": definitions | {str(count): {"type": "object"}}, "$ref": "#/$defs/0"}}


def rule_chain(random: Random) -> Case:
    count, name = size(random, 3_000), random.choice(("r", "R"))
    body = random.choice(('{} "x"', '((({}|"q")+))* "x"', "{} {}", '"x"? {}'))
    rules = [f"{name}{i}: {body.replace('{}', f'{name}{i + 1}')}" for i in range(count)]
    return {"grammar": "\n".join([f"start: {name}0", *rules, f'{name}{count}: "a"'])}


def brackets(random: Random) -> Case:
    depth = size(random, 9_000)
    prefix = random.choice(("", "~"))
    return {"grammar": f"start: T\nT: {(prefix + '(') * depth}" + '"a"' + ")" * depth}


# --- size -----------------------------------------------------------------------------------------------------


def enumeration(random: Random) -> Case:
    count = size(random, 60_000)
    values = [i if random.random() < 0.5 else hex(i * 7919) for i in range(count)]
    key = random.choice(("enum", "required", "anyOf", "prefixItems"))
    if key in ("anyOf", "prefixItems"):
        return {"json_schema": {key: [{"const": value} for value in values]}}
    return {"json_schema": {"type": "object" if key == "required" else "string", key: [*map(str, values)]}}


def choices(random: Random) -> Case:
    return {"choice": [hex(i * 7919) for i in range(size(random, 20_000))]}


def objects(random: Random) -> Case:
    each = ({"type": "object", "properties": {f"p{i}": {"const": i}}} for i in range(size(random, 3_000)))
    return {"json_schema": {random.choice(("anyOf", "oneOf", "allOf")): list(each)}}


def many_properties(random: Random) -> Case:
    properties = {f"p{i}": {"type": "string"} for i in range(size(random, 20_000))}
    bounds = {"minProperties": random.randrange(40), "maxProperties": random.randrange(60)}
    return {"json_schema": {"type": "object", "properties": properties} | random.choice((bounds, {}))}


def bounds(random: Random) -> Case:
    """Ask for absurd lengths and numbers."""
    number = random.choice((10**3, 10**5, 10**9, 2**31, 2**63, 2**64, 10**30, -1, 1e308, 1e-308, 0.1))
    keyword, kind = random.choice(
        (
            ("minLength", "string"),
            ("maxLength", "string"),
            ("minItems", "array"),
            ("maxItems", "array"),
            ("minProperties", "object"),
            ("maxProperties", "object"),
            ("multipleOf", "integer"),
            ("multipleOf", "number"),
            ("minimum", "number"),
            ("exclusiveMaximum", "integer"),
        )
    )
    return {"json_schema": {"type": kind, keyword: number, "items": {"type": "integer", keyword: number}}}


# --- expressions ----------------------------------------------------------------------------------------------

HARD = (
    "(a+)+b",
    "(.*a.{20}){20}",
    "(a|aa)*c?",
    ".*a.{1000}",
    "(((a{1,100}){1,100}){1,100}){1,100}",
    r"[\p{L}\p{N}]{1,5000}x",
    "(x?){5000}y",
    "((a|b)*a(a|b){30})+",
    "(?i:straße|ﬃ){1,200}",
)


def hard_expression(random: Random) -> Case:
    expression = "".join(random.choice(HARD) for _ in range(size(random, 900)))
    return {"regex": expression} if random.random() < 0.5 else {"json_schema": {"pattern": expression}}


def nested_expression(random: Random) -> Case:
    depth = size(random, 4_000)
    return {"regex": "(" * depth + "a" + random.choice((")", ")*", "|b)", "){2}")) * depth}


def intersections(random: Random) -> Case:
    """Ask for a string that matches many expressions at once; the time for each more doubles."""
    patterns = [f"{random.choice('abc')}{i}.*" for i in range(random.randint(2, 60))]
    if random.random() < 0.3:
        return {"grammar": "start: T\nT: " + " & ".join(f"/.*{pattern}/" for pattern in patterns)}
    if random.random() < 0.5:
        return {"json_schema": {"allOf": [{"pattern": pattern} for pattern in patterns]}}
    schema: Case = {}
    for pattern in patterns:
        schema = {"pattern": pattern, random.choice(("anyOf", "oneOf")): [schema]}
    return {"json_schema": schema}


def named_by_pattern(random: Random) -> Case:
    patterns = {
        f"^(a|b)*a(a|b){{{random.randint(1, 40)}}}{i}$": {"type": "string"} for i in range(size(random, 80))
    }
    return {"json_schema": {"type": "object", "patternProperties": patterns, "additionalProperties": False}}


def ambiguous(random: Random) -> Case:
    rules = random.choice(
        (
            "start: a\na: a a | b a | \nb: a b | ",
            'start: a\na: a a a | "x" | ',
            'start: x{0,500} x{0,500} x{0,500}\nx: "a" | "aa" | ""',
            "start: T*\nT: /.*/ | /(.|\\n)*/",
            'start: a{1000}\na: b{1000}\nb: "x"{1000}',
            'start: "a"{1000000000}',
        )
    )
    return {"grammar": rules}


# --- contradictions and unusual texts -------------------------------------------------------------------------


def contradiction(random: Random) -> Case:
    parts = [
        {"type": "string"},
        {"type": "integer"},
        {"minLength": 5},
        {"maxLength": 2},
        {"const": "é"},
        {"enum": []},
        {"minimum": 3},
        {"maximum": 2},
        {"$ref": "#"},
        {"pattern": "^a$"},
        {"not": {}},
        False,
    ]
    return {"json_schema": {"allOf": random.sample(parts, random.randint(2, 5))}}


TRAPS = (
    "\0",
    "\ud800",
    "\uffff",
    "\U0010ffff",
    "\u202e",
    "e\u0301",
    "🦙",
    "\\",
    '"',
    "</s>",
    "\xff",
    "\u2028",
    "%",
    "/",
)


def unicode_traps(random: Random) -> Case:
    text = "".join(random.choices(TRAPS, k=random.randint(1, 200)))
    return random.choice(
        (
            {"json_schema": {"const": text}},
            {"json_schema": {"type": "object", "properties": {text: {}}, "required": [text]}},
            {"json_schema": {"pattern": text}},
            {"json_schema": {"$ref": text}},
            {"choice": [text]},
            {"regex": text},
            {"grammar": f"start: {text}"},
        )
    )


def noise(random: Random) -> Case:
    """Put values of the wrong type under known keywords."""
    values = (
        None,
        True,
        -1,
        1.5,
        "",
        "x",
        [],
        [[]],
        {},
        {"$ref": 1},
        [None],
        "#/",
        "http://localhost/x.json",
    )
    keywords = (
        "type properties required items prefixItems enum const anyOf allOf oneOf $ref $defs pattern format minLength"
        " maxItems minimum multipleOf additionalProperties patternProperties x-guidance $schema $id if not unknown"
    ).split()
    return {
        "json_schema": {key: random.choice(values) for key in random.sample(keywords, random.randint(1, 4))}
    }


def lark_noise(random: Random) -> Case:
    words = (
        "start",
        ":",
        "|",
        '"a"',
        "/a/",
        "(",
        ")",
        "*",
        "{2,1}",
        "\n",
        "T",
        "%json {}",
        "<x>",
        "<[0]>",
        "~",
        "@start",
    )
    return {"grammar": "start: " + " ".join(random.choices((*words, '%llguidance {"x": 1}', "[lazy]"), k=12))}


def inline(random: Random) -> Case:
    """Put a schema into a grammar."""
    family = random.choice(
        (references, doubling, intersections, bounds, cycles, many_properties, contradiction)
    )
    return {"grammar": f"start: %json {dumps(family(random).get('json_schema', {}))}"}


def tools(random: Random) -> Case:
    """Require calls of tools with hostile parameters."""
    families = (
        references,
        doubling,
        intersections,
        bounds,
        cycles,
        many_properties,
        contradiction,
        enumeration,
    )
    family, count = random.choice(families), size(random, 40)
    schemas = [family(random).get("json_schema") for _ in range(count)]
    return {
        "tools": [
            {"name": f"f{n}", "parameters": {"properties": {"a": json.loads(s) if isinstance(s, str) else s}}}
            for n, s in enumerate(schemas)
        ]
    }


FAMILIES: tuple[Callable[[Random], Case], ...] = (
    deep,
    deep_text,
    references,
    cycles,
    doubling,
    rule_chain,
    brackets,
    enumeration,
    choices,
    objects,
    many_properties,
    bounds,
    hard_expression,
    nested_expression,
    intersections,
    named_by_pattern,
    ambiguous,
    contradiction,
    unicode_traps,
    noise,
    lark_noise,
    inline,
    tools,
)


def size(random: Random, largest: int) -> int:
    """Return a size whose logarithm is uniform."""
    return int(largest ** random.random())


def dumps(value: Any) -> str:
    """Return JSON at any depth."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(300_000)
    try:
        return json.dumps(value)
    except RecursionError:
        return '{"not": {}}'
    finally:
        sys.setrecursionlimit(limit)


# --- one process ----------------------------------------------------------------------------------------------


def main() -> None:
    seed, count = map(int, sys.argv[1:])
    grammars = byte_grammars()
    for name, case in cases(seed, count):
        began = time.perf_counter()
        outcome = attempt(grammars, case)
        line = {
            "family": name,
            "outcome": outcome,
            "seconds": round(time.perf_counter() - began, 3),
            "peak_mb": peak_mb(),
        }
        print(json.dumps(line), flush=True)


def peak_mb() -> int:
    """Return this process's peak resident memory. `ru_maxrss` would include the parent's, from before the exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def attempt(grammars: Any, case: Case) -> str:
    """Return "generated" after some random tokens, or the error's text."""
    import numpy as np

    from precast.loaders.artifact.errors import PrecastError
    from precast.loaders.generation.sampling import Sampler
    from precast.loaders.generation.sampling_params import SamplingParams

    try:
        params = SamplingParams(temperature=1.0, seed=0, **({} if "tools" in case else case))
        text = tool_calls(case["tools"]) if "tools" in case else params.constraint
        sampler = Sampler(params, [], VOCABULARY, [END], constraint=grammars.start(text))
        for _ in range(STEPS):
            if sampler.sample(np.zeros(VOCABULARY, np.float32)) == END:
                break
    except PrecastError as error:
        return str(error)
    return "generated"


def tool_calls(given: Any) -> Any:
    """Return the constraint of calls of any of the given tools."""
    from precast.loaders.generation.constraint_texts import TOOL_CHOICE, tool_constraint
    from precast.loaders.text.answer_formats import answer_format
    from precast.loaders.text.tool_grammar import REQUIRED, tool_grammar
    from precast.loaders.text.tools import checked_tools

    form = answer_format("", "llama3")
    return tool_constraint(*tool_grammar(form, checked_tools(given), REQUIRED, byte_tokenizer()), TOOL_CHOICE)


def byte_grammars() -> Any:
    """Return the grammars of a vocabulary of all bytes and some pairs."""
    from precast.loaders.generation.grammars import Grammars

    return Grammars(byte_tokenizer(), VOCABULARY, [END])


def byte_tokenizer() -> Any:
    """Return a tokenizer of all bytes and some pairs."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    from precast.loaders.text.tokenizer import Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [a + b for a in alphabet for b in alphabet]
    vocabulary = {text: i for i, text in enumerate(["</s>", *alphabet, *pairs[: VOCABULARY - 257]])}
    library = Library(models.BPE(vocabulary, []))
    library.add_special_tokens(["</s>"])
    library.decoder = decoders.ByteLevel()
    return Tokenizer.from_json(library.to_str().encode(), chat_template=None, bos_token=None, eos_token=None)


if __name__ == "__main__":
    main()
