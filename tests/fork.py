# Copyright 2026 Bytedance Ltd. and/or its affiliates
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
"""Edits to VERL's files such as a fork has: comments, statements without effect, renamed local variables."""

import ast
import builtins

EDITS = {  # of each file
    "verl/trainer/ppo/v1/trainer_base.py": 14,
    "verl/workers/engine_workers.py": 10,
    "verl/workers/utils/losses.py": 6,
}
RENAMED = "fork_"


def make_fork(folder):
    """Edit the VERL in `folder`; what was done, a line for each edit."""
    return [line for name, count in EDITS.items() for line in _edit_file(folder / name, count)]


def _edit_file(path, count):
    source, done = path.read_text(encoding="utf-8"), []
    for number in range(count):
        functions = _functions(ast.parse(source))
        edit, start = _EDITS[number % len(_EDITS)], number * len(functions) // count  # spread over the file
        function = next(
            it for it in functions[start:] + functions[:start] if edit is not _rename or _local_variables(it)
        )
        lines = source.split("\n")
        done.append(f"{path.name}, {function.name}: {edit(lines, function)}")
        source = "\n".join(lines)
    path.write_text(source, encoding="utf-8")
    return done


def _functions(tree):
    """Functions and methods with a statement on a line of its own, but not those inside another."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = {node for function in functions for node in ast.walk(function) if node is not function}
    functions = [function for function in functions if function not in inner and _first_statement(function)]
    return sorted(functions, key=lambda function: function.lineno)


def _first_statement(function):
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[0] if body and body[0].lineno > function.lineno else None


def _insert(lines, function, text):
    statement = _first_statement(function)
    lines.insert(statement.lineno - 1, " " * statement.col_offset + text)
    return text


def _comment(lines, function):
    return _insert(lines, function, "# The fork's own.")


def _statement(lines, function):
    return _insert(lines, function, "fork_statement = None")


def _rename(lines, function):
    places = _local_variables(function)
    name = next(iter(places))
    for row, column in sorted(places[name], reverse=True):
        line = lines[row - 1].encode()  # columns count bytes
        assert line[column:].startswith(name.encode())
        lines[row - 1] = (line[:column] + RENAMED.encode() + line[column:]).decode()
    return f"{name} is {RENAMED}{name}"


_EDITS = (_comment, _statement, _rename)


def _local_variables(function):
    """Name to places, of names that are nothing else than local variables."""
    nodes = list(ast.walk(function))
    if any(isinstance(node, ast.Global | ast.Nonlocal | ast.Match) for node in nodes):
        return {}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    inside_strings = [part for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)]
    taken = {part.id for part in inside_strings if isinstance(part, ast.Name)}  # without a place before Python 3.12
    taken |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    taken |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    taken |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler | ast.FunctionDef | ast.ClassDef)}
    stored = {name.id for name in names if isinstance(name.ctx, ast.Store) and not name.id.startswith(RENAMED)}
    return {
        name: [(node.lineno, node.col_offset) for node in names if node.id == name]
        for name in sorted(stored - taken - set(dir(builtins)))
    }
