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
"""Which teachers speak for which sample, and with what weight: ``teacher.models``, ``routing_key``, ``weights_key``.

A teacher serves a route: the samples whose field ``routing_key`` of the data set has the teacher's ``route`` as its
value, by default the teacher's name. Without a routing key all teachers serve all samples. The teachers of one sample
are mixed by their ``weight``, or by the sample's own weights in the field ``weights_key``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch

from verl.on_policy_distillation.mixture import normalized_weights

__all__ = ["TEACHER_KEYS", "Routes"]

# What an entry of ``teacher.models`` has beside the settings of a model.
TEACHER_KEYS = ("weight", "route")


@dataclass(frozen=True)
class Routes:
    """The teachers by name, in the order of the configuration, and how samples find them."""

    names: tuple[str, ...]
    routes: tuple[str, ...]
    weights: tuple[float, ...]
    routing_key: Optional[str] = None
    weights_key: Optional[str] = None

    @classmethod
    def of(cls, teacher: Mapping[str, Any]) -> "Routes":
        """Read the ``teacher`` group. One unnamed teacher is the one route there is.

        Raises:
            ValueError: naming the key, its value and the fix.
        """
        models = teacher.get("models", None) or {}
        routing_key, weights_key = teacher.get("routing_key", None), teacher.get("weights_key", None)
        _require_keys(models, routing_key, weights_key)
        if not models:
            return cls(("teacher",), ("teacher",), (1.0,))
        routes = cls(
            tuple(str(name) for name in models),
            tuple(_route(name, model.get("route", None)) for name, model in models.items()),
            tuple(_weight(name, model.get("weight", None)) for name, model in models.items()),
            routing_key,
            weights_key,
        )
        routes._require_weights()
        return routes

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of the data set that say where a sample goes."""
        return tuple(key for key in (self.routing_key, self.weights_key) if key is not None)

    @property
    def width(self) -> int:
        """The most teachers that speak for one sample."""
        if self.routing_key is None:
            return len(self.names)
        return max(self.routes.count(route) for route in self.routes)

    def shares(self, fields: Mapping[str, Sequence[Any]], samples: int) -> torch.Tensor:
        """(samples, teachers) float64, each row normalised: the weight of each teacher in the mixture of a sample.

        Args:
            fields: the values of `columns`, one for each sample.

        Raises:
            ValueError: naming the first sample, by its number, that has no teacher or no weights.
        """
        if not self.columns:
            return torch.tensor([self._of_route(None)] * samples, dtype=torch.float64).view(samples, -1)
        [column] = self.columns
        rows = []
        for index, value in enumerate(fields[column]):
            try:
                rows.append(self._share(value))
            except ValueError as error:
                raise ValueError(f"row {index} has {column}={value!r}: {error}") from None
        return torch.tensor(rows, dtype=torch.float64).view(samples, len(self.names))

    def _share(self, value: Any) -> list[float]:
        return self._of_route(value) if self.weights_key is None else self._of_sample(value)

    def _of_route(self, route: Optional[str]) -> list[float]:
        chosen = [self.routing_key is None or own == str(route) for own in self.routes]
        if not any(chosen):
            raise ValueError(
                f"no teacher serves it. teacher.models has the routes {sorted(set(self.routes))}: add a teacher of "
                "that name, or set its route, or leave these rows out."
            )
        return normalized_weights(
            [w if is_on else 0.0 for w, is_on in zip(self.weights, chosen, strict=True)], len(chosen)
        )

    def _of_sample(self, weights: Any) -> list[float]:
        """`weights`: a number for each teacher, by name (one that is not named has none) or in order."""
        if isinstance(weights, Mapping):
            # A column of structures has the names of all rows in each, with None where a row says nothing.
            if unknown := sorted(name for name in set(weights) - set(self.names) if weights[name]):
                raise ValueError(f"there is no teacher {unknown[0]!r}: the teachers are {list(self.names)}.")
            weights = [weights.get(name) or 0.0 for name in self.names]
        if isinstance(weights, str) or not hasattr(weights, "__len__"):
            raise ValueError(f"pass a weight for each of the teachers {list(self.names)}, by name or in this order.")
        return normalized_weights(list(weights), len(self.names))

    def _require_weights(self) -> None:
        for route in dict.fromkeys(self.routes) if self.routing_key else [None]:
            try:
                self._of_route(route)
            except ValueError as error:
                of = f" of the route {route}" if route else ""
                raise ValueError(f"teacher.models.<name>.weight{of}: {error}") from None


def _require_keys(models: Mapping[str, Any], routing_key: Any, weights_key: Any) -> None:
    for key, value in (("routing_key", routing_key), ("weights_key", weights_key)):
        if value is not None and not models:
            raise ValueError(
                f"teacher.{key}={value} needs several teachers: set +teacher.models.<name>.path for each, or leave it "
                "out."
            )
    if routing_key is not None and weights_key is not None:
        raise ValueError(
            f"teacher.routing_key={routing_key} and teacher.weights_key={weights_key} both choose the teachers of a "
            "sample: leave one of them out. Weights of zero route too."
        )
    for name, model in models.items():
        if not hasattr(model, "items"):
            raise ValueError(f"teacher.models.{name}={model!r} is no group: set +teacher.models.{name}.path.")
        if routing_key is None and model.get("route", None) is not None:
            raise ValueError(
                f"teacher.models.{name}.route={model['route']} has no effect without a routing key: set "
                "teacher.routing_key to the field of the data set that names the routes, for example data_source."
            )
        if weights_key is not None and model.get("weight", None) is not None:
            raise ValueError(
                f"teacher.models.{name}.weight={model['weight']} has no effect with teacher.weights_key={weights_key}: "
                "leave one of them out."
            )


def _route(name: Any, route: Any) -> str:
    return str(name if route is None else route)


def _weight(name: Any, weight: Any) -> float:
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight < float("inf"):
        raise ValueError(f"teacher.models.{name}.weight={weight!r}: set it to a number of 0 or more.")
    return float(weight)
