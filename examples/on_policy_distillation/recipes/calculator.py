# Copyright 2026 The on-policy-distillation authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The tool of multi_turn.sh. VERL reads this file (`multi_turn.function_tool_path`) and tells the model of the tool."""

import ast
import operator
from collections.abc import Callable

from verl.tools.function_tool import function_tool

_BINARY: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 200  # characters of an expression, so that a model cannot make a call slow


@function_tool
def calculate(expression: str) -> str:
    """Calculate an arithmetic expression.

    Args:
        expression: Numbers, +, -, *, / and parentheses, for example (12 + 3) * 4.
    """
    try:
        if len(expression) > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST} characters")
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(value) if isinstance(value, int) else f"{value:.12g}"
    except (SyntaxError, ValueError, ArithmeticError) as error:
        return f"This cannot be calculated: {error}."


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.BinOp) and (operation := _BINARY.get(type(node.op))):
        return operation(_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError("only numbers, +, -, *, / and parentheses are known")
