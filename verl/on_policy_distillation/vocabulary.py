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
"""Where two tokenizers agree, id by id, read from their dictionaries (token -> id, Hugging Face's `get_vocab`)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Difference", "difference", "shared_ids"]

_NAMED = 3  # so many entries of a kind are named; a message is no list

Entry = tuple[int, str]


class Difference(NamedTuple):
    """Where a student's and a teacher's tokenizers differ, by ascending id.

    conflicts: ids that both have, with different texts; the entries of both.
    student, teacher: entries of ids that only this side has.
    """

    conflicts: tuple[list[Entry], list[Entry]]
    student: list[Entry]
    teacher: list[Entry]

    def __bool__(self) -> bool:
        return any((*self.conflicts, self.student, self.teacher))

    def __str__(self) -> str:
        """For a message: how many there are of each kind, and the first of them."""
        kinds = {
            "other texts in the student's": self.conflicts[0],
            "than in the teacher's": self.conflicts[1],
            "the teacher alone has": self.teacher,
            "the student alone has": self.student,
        }
        return "; ".join(f"{kind} {_first_of(entries)}" for kind, entries in kinds.items() if entries)


def _first_of(entries: list[Entry]) -> str:
    named = ", ".join(f"{token!r} = {index}" for index, token in entries[:_NAMED])
    more = len(entries) - _NAMED
    return f"{named} and {more} more" if more > 0 else named


def difference(student: Mapping[str, int], teacher: Mapping[str, int]) -> Difference:
    """Of two dictionaries; true if there is one."""
    common = set(student.values()) & set(teacher.values())
    # Two tokens may have one id, so the pairs are compared.
    ours, theirs = (
        sorted((index, token) for token, index in one.items() - other.items())
        for one, other in ((student, teacher), (teacher, student))
    )
    conflicts = tuple([entry for entry in side if entry[0] in common] for side in (ours, theirs))
    alone = ([entry for entry in side if entry[0] not in common] for side in (ours, theirs))
    return Difference((conflicts[0], conflicts[1]), *alone)


def shared_ids(vocabularies: Sequence[Mapping[str, int]]) -> list[int]:
    """The ids that have the same text in all of them, ascending."""
    first, *others = vocabularies
    shared = set(first.values())
    for other in others:
        student, teacher = difference(first, other).conflicts
        shared &= set(other.values())
        shared -= {index for index, _ in (*student, *teacher)}
    return sorted(shared)
