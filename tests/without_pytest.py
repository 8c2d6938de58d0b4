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
"""As much of pytest as test_on_policy_distillation.py uses, for a Python that has VERL and torch but not pytest.

Tests that take a fixture need pytest itself and are left out; the last line says how many. At most `MOST_CASES` cases
of each test are run, spread over all of them, so that the whole takes less than a minute.
"""

import contextlib
import inspect
import itertools
import math
import re
import sys
import time
import traceback
from types import SimpleNamespace

__all__ = ["approx", "fail", "main", "mark", "raises"]

MOST_CASES = 12


def _parametrize(names, values, ids=None):
    """Keeps the (names, values) pairs of stacked decorators on the function."""
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [value if len(names) > 1 else (value,) for value in values]

    def decorate(function):
        function.parameters = [*getattr(function, "parameters", []), (names, rows)]
        return function

    return decorate


mark = SimpleNamespace(parametrize=_parametrize)


class approx:  # noqa: N801  (pytest's name)
    """Compares numbers, and lists, tuples and dicts of them, up to a tolerance."""

    __hash__ = None

    def __init__(self, expected, rel=1e-6, abs=1e-12):  # noqa: A002
        self.expected, self.rel, self.abs = expected, rel, abs

    def _is_near(self, actual, expected):
        if isinstance(expected, dict):
            return set(actual) == set(expected) and all(self._is_near(actual[k], v) for k, v in expected.items())
        if isinstance(expected, list | tuple):
            return len(actual) == len(expected) and all(map(self._is_near, actual, expected))
        if actual == expected:  # infinities among them
            return True
        return math.isfinite(expected) and abs(actual - expected) <= max(self.abs, self.rel * abs(expected))

    def __eq__(self, actual):
        return self._is_near(actual, self.expected)

    def __repr__(self):
        return f"{self.expected} within {self.rel:g} (or {self.abs:g})"


@contextlib.contextmanager
def raises(kind, match=None):
    caught = SimpleNamespace(value=None)
    try:
        yield caught
    except kind as error:
        caught.value = error
        if match is not None and not re.search(match, str(error)):
            raise AssertionError(f"{match!r} does not match {str(error)!r}") from error
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


def fail(message):
    raise AssertionError(message)


def _cases(function):
    """Keyword arguments of the cases to run, evenly spread over all."""
    parameters = getattr(function, "parameters", [])
    cases = [
        dict(zip([name for names, _ in parameters for name in names], itertools.chain(*rows), strict=True))
        for rows in itertools.product(*(rows for _, rows in parameters))
    ]
    step = max(len(cases) / MOST_CASES, 1.0)
    return [cases[int(index * step)] for index in range(min(len(cases), MOST_CASES))]


def _needs_fixtures(function):
    given = {name for names, _ in getattr(function, "parameters", []) for name in names}
    return bool(set(inspect.signature(function).parameters) - given)


def _run(name, function):
    """Number of cases that passed and that failed; each failure is printed."""
    passed = failed = 0
    for case in _cases(function):
        try:
            function(**case)
            passed += 1
        except Exception:
            failed += 1
            print(f"FAILED {name} {case}\n{traceback.format_exc()}")
    return passed, failed


def main(arguments):
    """Run the tests of the module that is being run; the exit status."""
    if arguments[1:]:
        print(f"{' '.join(arguments[1:])}: options need pytest, which is not installed", file=sys.stderr)
        return 2
    start = time.perf_counter()
    names = vars(sys.modules["__main__"]).items()
    tests = {name: value for name, value in names if name.startswith("test_") and inspect.isfunction(value)}
    runnable = {name: test for name, test in tests.items() if not _needs_fixtures(test)}
    counts = [_run(name, test) for name, test in runnable.items()]
    passed, failed = (sum(column) for column in zip(*counts, strict=True))
    left_out = len(tests) - len(runnable)
    print(
        f"{failed} failed, {passed} passed in {time.perf_counter() - start:.0f} s "
        f"({len(runnable)} tests, at most {MOST_CASES} cases of each; {left_out} left out; pytest runs all)"
    )
    return int(failed > 0)
