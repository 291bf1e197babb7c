"""Rewrite the syntax tree of a chat template, so that the template's operations call the sandbox.

Importing this module imports jinja2.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

from .chat_meter import LimitExceeded, Limits, Meter

# Bytes that one run of a body can keep allocated: for each loop, for each macro, and for each piece of output.
_LOOP_SIZE, _MACRO_SIZE, _OUTPUT_SIZE = 512, 2048, 16


def instrument(environment: jinja2.Environment, tree: nodes.Template, limits: Limits) -> nodes.Template:
    """Return `tree` with calls of the sandbox's `metered_…` methods inserted.

    Raises:
        LimitExceeded: the tree is too large.
        TemplateSyntaxError: the template uses a statement that the sandbox does not support.
    """
    changed: nodes.Template = _Instrumenter(limits).visit(tree)
    changed.set_environment(environment)
    return changed


class TemplateTags(Extension):
    """A parser for the tag `{% generation %}`, which marks text for training and does not change a prompt."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the statements between the tags as a scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """Yield the tokens, and charge for each token."""
        meter: Meter = self.environment.meter  # type: ignore[attr-defined]
        for token in stream:
            meter.step(10)
            yield token


class MeteredCodeGenerator(CodeGenerator):
    """A jinja2 code generator that charges for each node and calls the sandbox's methods directly."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        meter: Meter = self.environment.meter  # type: ignore[attr-defined]
        meter.step(50)
        return super().visit(node, *args, **kwargs)

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.write(f"environment.{node.node.name}(")
        for arg in node.args:
            self.visit(arg, frame)
            self.write(", ")
        self.write(")")


class _Instrumenter(NodeTransformer):
    """A transformer that inserts meter calls into loops, macros, comparisons, and expressions that allocate memory."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._nodes = 0
        self._names: set[str] = set()
        self._scopes = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._nodes += 1
        if self._nodes > self._limits.nodes:
            raise LimitExceeded(f"it has more than {self._limits.nodes:,} expressions and statements")
        if isinstance(node, nodes.Name):
            self._names.add(node.name)
        elif isinstance(node, _SCOPES):
            self._scopes += 1
        # jinja2 copies its table of names for each branch and body.
        if len(self._names) * self._scopes > self._limits.tables:
            raise LimitExceeded("it has too many names for its conditions and loops")
        return super().visit(node, *args, **kwargs)

    # Bodies

    def _body(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        """Insert a call at the start of a body, so that each run of the body charges for all of its nodes."""
        before = self._nodes
        self.generic_visit(node)
        kept = 64
        for inner in node.body:
            for part in (inner, *inner.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Output))):
                kept += _KEPT.get(type(part), 0)
        turn = _call("metered_turn", nodes.Const(self._nodes - before), nodes.Const(kept))
        node.body.insert(0, nodes.ExprStmt(turn))
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._body(node)
        if (
            node.test is not None
        ):  # charge for the test, because the body does not run for an item that fails it
            node.test = nodes.And(_call("metered_test"), node.test)
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    # Expressions

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("metered_concat", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _call("metered_slice", node.node, *(bound or nodes.Const(None) for bound in bounds))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) == 1 and _cheap(node.expr, node.ops[0]):
            return node
        left = node.expr
        node.expr = _operand(left)
        for operand in node.ops:
            member = operand.op in ("in", "notin")
            if not member:
                operand.expr = _operand(operand.expr)
            elif not _constant(operand.expr):
                method = "metered_sequence" if isinstance(left, nodes.Const) else "metered_container"
                operand.expr = _call(method, operand.expr)
            left = operand.expr
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call("metered_new", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" or _constant(node) else _call("metered_new", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            if not isinstance(pair.key, nodes.Const) or not isinstance(pair.key.value, str):
                pair.key = _call("metered_key", pair.key)
        return _call("metered_new", node)

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _call("metered_arguments", node.dyn_args)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = _call("metered_keywords", node.dyn_kwargs)
        return node

    visit_Filter = visit_Test = visit_Call

    # Statements that the sandbox does not support

    def visit_Include(self, node: nodes.Stmt) -> NoReturn:
        raise jinja2.TemplateSyntaxError("another template cannot be included here", node.lineno)

    visit_Extends = visit_Import = visit_FromImport = visit_Include

    def visit_ScopedEvalContextModifier(self, node: nodes.Stmt) -> NoReturn:
        raise jinja2.TemplateSyntaxError("autoescape is not available here", node.lineno)


_SCOPES: tuple[type[nodes.Node], ...] = (
    *(nodes.AssignBlock, nodes.Block, nodes.CallBlock, nodes.FilterBlock, nodes.For, nodes.If, nodes.Macro),
    *(nodes.Scope, nodes.With),
)

_KEPT: dict[type[nodes.Node], int] = {
    nodes.For: _LOOP_SIZE,
    nodes.Macro: _MACRO_SIZE,
    nodes.CallBlock: _MACRO_SIZE,
    nodes.Output: _OUTPUT_SIZE,
}


def _call(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)


def _constant(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) or (
        isinstance(node, (nodes.List, nodes.Tuple))
        and all(isinstance(item, nodes.Const) for item in node.items)
    )


def _operand(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call("metered_operand", node)


def _cheap(left: nodes.Expr, operand: nodes.Operand) -> bool:
    """Return True if an operand is constant. The length of the constant then limits the cost of the comparison."""
    if operand.op in ("in", "notin"):
        return _constant(operand.expr)
    return isinstance(left, nodes.Const) or isinstance(operand.expr, nodes.Const)
