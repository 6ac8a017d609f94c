"""Expressions that steps state as text, such as ``mse + commit_weight * commitment``, and their gradients."""

from __future__ import annotations

import ast
from collections.abc import Mapping

import torch
from torch import Tensor

from .harness import GoldenFailure, Step

FUNCTIONS = {"sum": torch.sum, "mean": torch.mean}


def evaluate(step: Step, expression: str, values: Mapping[str, Tensor | float]) -> Tensor:
    """The value of an expression of names, numbers, +, -, * and ``sum`` or ``mean`` of one of them."""

    def value(node: ast.expr) -> Tensor | float:
        match node:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name) if name in values:
                return values[name]
            case ast.Call(func=ast.Name(id=name), args=[argument]) if name in FUNCTIONS:
                return FUNCTIONS[name](value(argument))
        raise GoldenFailure(f"{step.id}: {ast.unparse(node)!r} of {expression!r} is not computed")

    return value(ast.parse(expression, mode="eval").body)


def gradients(
    step: Step, values: Mapping[str, Tensor | float], of: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients that ``wrt`` asks for, of the expression ``of``; ``tensors`` by the names that ``wrt`` has."""
    scalar = evaluate(step, of, values)
    wrt = step.args["wrt"]
    unknown = sorted(set(wrt.values()) - tensors.keys())
    if unknown:
        raise GoldenFailure(f"{step.id}: no tensor is called {', '.join(unknown)}; there are {', '.join(tensors)}")
    found = torch.autograd.grad(scalar, [tensors[key] for key in wrt.values()], allow_unused=True)
    return {
        name: torch.zeros_like(tensors[key]) if gradient is None else gradient
        for (name, key), gradient in zip(wrt.items(), found)
    }


def named(step: Step, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The step's outputs, each by the quantity that it is, which ``returns`` says where names differ."""
    returns = step.args.get("returns", {})
    quantities = {output: returns.get(output, output) for output in step.outputs}
    unknown = sorted(set(quantities.values()) - values.keys())
    if unknown and len(values) == 1 == len(quantities):
        return dict.fromkeys(quantities, *values.values())  # a single answer may have any name
    if unknown:
        raise GoldenFailure(f"{step.id}: no quantity is called {', '.join(unknown)}; there are {', '.join(values)}")
    return {output: values[quantity] for output, quantity in quantities.items()}
