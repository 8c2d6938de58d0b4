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
"""A warning that VERL repeats for every sample is said once in each process.

For a model type that VERL has no "continuous token" builder for, such as Llama's, its agent loop says so for each
sample: 6,840 lines, nine tenths of the log of the quickstart's 15 steps.
"""

import logging
from types import ModuleType

__all__ = ["drop_repeats"]


class _Once:
    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def __call__(self, record: logging.LogRecord) -> bool:
        """Whether to log the `record`: an error, always; a warning or less, if it was not said before.

        By its parts: a message that cannot be put together is logging's to complain about.
        """
        parts = (str(record.msg), repr(record.args))
        is_repeat = parts in self._said
        self._said.add(parts)
        return not is_repeat or record.levelno > logging.WARNING


def drop_repeats(module: ModuleType) -> None:
    """Of what the logger of `module` says. Where it has none, nothing changes."""
    module_logger = getattr(module, "logger", None)
    if isinstance(module_logger, logging.Logger):
        module_logger.addFilter(_Once())
