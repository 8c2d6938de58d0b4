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
"""Which teachers speak for a sample: from the configuration and the data set, and what is refused at start."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from arithmetic import tiny_model
from omegaconf import OmegaConf
from test_checks import PURE, make_config

from verl.on_policy_distillation.checks import prepare, refuse_misspelt_overrides, require_routes, validate
from verl.on_policy_distillation.config import teacher_groups
from verl.on_policy_distillation.routing import Routes


def routes(models, **keys):
    return Routes.of(OmegaConf.create({"models": models, "routing_key": None, "weights_key": None} | keys))


TWO = {"maths": {"path": "m"}, "code": {"path": "c"}}


def test_without_a_key_all_teachers_speak_for_every_sample():
    assert routes({"maths": {"weight": 1}, "code": {"weight": 3}}).shares({}, 2).tolist() == [[0.25, 0.75]] * 2
    assert routes(TWO).width == 2 and routes(TWO).columns == ()


def test_a_routing_key_sends_a_sample_to_the_teacher_of_that_name():
    by_source = routes(TWO, routing_key="data_source")
    assert by_source.shares({"data_source": ["code", "maths"]}, 2).tolist() == [[0, 1], [1, 0]]
    assert by_source.width == 1 and by_source.columns == ("data_source",)


def test_several_teachers_may_serve_one_route():
    shared = routes(
        {"a": {"route": "maths"}, "b": {"route": "maths", "weight": 3}, "chat": {"weight": 9}}, routing_key="source"
    )
    assert shared.shares({"source": ["maths", "chat"]}, 2).tolist() == [[0.25, 0.75, 0], [0, 0, 1]]
    assert shared.width == 2


@pytest.mark.parametrize("weights", [{"code": 1.5, "maths": 0.5}, [0.5, 1.5], {"code": 3, "maths": 1}])
def test_a_sample_may_bring_its_weights_by_name_or_in_order(weights):
    own = routes(TWO, weights_key="weights")
    assert own.shares({"weights": [weights]}, 1).tolist() == [[0.25, 0.75]]
    # A column of structures has all names in every row.
    assert own.shares({"weights": [{"maths": None, "code": 2.0}]}, 1).tolist() == [[0, 1]]


def test_routes_may_be_numbers():
    numbered = routes({"a": {"route": 0}, "2": {"path": "p"}}, routing_key="s")
    assert numbered.shares({"s": [2, "0", 0]}, 3).tolist() == [[0, 1], [1, 0], [1, 0]]


def test_a_name_that_only_other_rows_weigh_is_no_unknown_teacher():
    own = routes(TWO, weights_key="weights")
    assert own.shares({"weights": [{"code": 1.0, "poetry": None}]}, 1).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("models", "keys", "said"),
    [
        (TWO | {"maths": {"weight": -1}}, {}, "teacher.models.maths.weight=-1"),
        (TWO | {"maths": {"weight": True}}, {}, "teacher.models.maths.weight=True"),
        ({"maths": {"weight": 0}, "code": {"weight": 0}}, {}, "not all zero"),
        ({"maths": {"weight": 0}, "code": {}}, {"routing_key": "s"}, "of the route maths: .*not all zero"),
        ({}, {"routing_key": "s"}, "teacher.routing_key=s needs several teachers"),
        ({}, {"weights_key": "w"}, "teacher.weights_key=w needs several teachers"),
        (TWO, {"routing_key": "s", "weights_key": "w"}, "leave one of them out"),
        ({"maths": {"route": "x"}}, {}, "teacher.models.maths.route=x has no effect without a routing key"),
        ({"maths": {"weight": 2}}, {"weights_key": "w"}, "teacher.models.maths.weight=2 has no effect"),
        ({"maths": "/path"}, {}, r"\+teacher.models.maths.path"),
    ],
)
def test_settings_that_do_not_go_together(models, keys, said):
    with pytest.raises(ValueError, match=said):
        routes(models, **keys)


def training_data(**columns):
    return SimpleNamespace(dataframe=datasets.Dataset.from_dict(columns))


@pytest.mark.parametrize(
    ("keys", "columns", "said"),
    [
        (
            {"routing_key": "data_source"},
            {"data_source": ["maths", "code", "poetry"]},
            "row 2 has data_source='poetry': no teacher serves it.*'code', 'maths'",
        ),
        ({"routing_key": "topic"}, {"data_source": ["maths"]}, "teacher.routing_key=topic is no field"),
        ({"weights_key": "w"}, {"w": [[1.0, 1.0], [0.0, 0.0]]}, "row 1 has w=.*not all zero"),
        ({"weights_key": "w"}, {"w": [[1.0, 1.0], [1.0]]}, "row 1 .*1 weights, and there are 2 teachers"),
        ({"weights_key": "w"}, {"w": [[1.0, None]]}, "row 0 .*give numbers"),
        ({"weights_key": "w"}, {"w": ["a", "b"]}, "row 0 .*by name or in this order"),
        ({"weights_key": "w"}, {"w": [{"maths": 1.0, "poetry": 1.0}]}, "row 0 .*no teacher 'poetry'"),
    ],
)
def test_the_training_data_is_checked_row_by_row(keys, columns, said):
    teacher = OmegaConf.create({"models": TWO, "routing_key": None, "weights_key": None} | keys)
    with pytest.raises(ValueError, match=said):
        require_routes(teacher, training_data(**columns))


def test_a_data_set_of_another_kind_is_checked_as_it_is_scored():
    teacher = OmegaConf.create({"models": TWO, "routing_key": "data_source", "weights_key": None})
    require_routes(teacher, SimpleNamespace(dataframe=[{"data_source": "poetry"}]))
    require_routes(teacher, SimpleNamespace())


def test_training_data_whose_rows_all_have_teachers_passes():
    teacher = OmegaConf.create({"models": TWO, "routing_key": "data_source", "weights_key": None})
    require_routes(teacher, training_data(data_source=["maths", "code"]))


# ----------------------------------------------------------------------------------------------------------------------
# from the trainer's configuration


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = {"student": 1, "maths": 2, "code": 3}
    return {name: str(tiny_model(folder / name, seed=seed)) for name, seed in names.items()}


def config_of(paths, *overrides):
    return make_config(PURE, f"actor_rollout_ref.model.path={paths['student']}", *overrides)


def test_teachers_inherit_the_model_and_override_it(paths):
    config = config_of(
        paths,
        f"teacher.model.path={paths['maths']}",  # of all that have none of their own
        f"+teacher.models.code.path={paths['code']}",
        "+teacher.models.code.weight=2",
        "+teacher.models.maths.use_shm=False",
    )
    prepare(config)
    groups = teacher_groups(config.teacher)
    assert {name: group.model.path for name, group in groups.items()} == {name: paths[name] for name in groups}
    assert groups["code"].model.enable_gradient_checkpointing is False and "weight" not in groups["code"].model


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["+teacher.models.code.weight=2"], "teacher.models.code.path is not set"),
        (
            ["+teacher.models.code.path={code}", "teacher.model.path={maths}"],
            "teacher.model.path=.* has no effect, as every one of teacher.models has a path",
        ),
        (["+teacher.models.code.path=/nowhere"], "teacher.models.code.path=/nowhere does not exist"),
        (["+teacher.models.code.pth=x"], "teacher.models.code.pth=x.*did you mean teacher.models.code.path"),
        (
            ["+teacher.models.code.path={code}", "+teacher.models.code.wieght=2"],
            "did you mean teacher.models.code.weight",
        ),
        (["+teacher.models.code.path={code}", "+teacher.models.code.use_fused_kernels=True"], "use_fused_kernels=True"),
        (["+teacher.models.code.path={code}", "+teacher.models.code.weight=-2"], "teacher.models.code.weight=-2"),
    ],
)
def test_a_named_teacher_is_checked_as_the_one_teacher_is(paths, overrides, said):
    with pytest.raises(ValueError, match=said):
        validate(config_of(paths, *(override.format(**paths) for override in overrides)))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.topk=8"], "teacher.topk=8 has no effect with teacher.payload=hidden_states"),
        (["teacher.payload=topk"], "teacher.topk=None with teacher.payload=topk: set it to how many"),
        (["teacher.payload=topk", "teacher.topk=0"], "teacher.topk=0"),
        (["teacher.payload=topk", "teacher.topk=2.5"], "teacher.topk=2.5"),
        (["teacher.payload=topk", "teacher.topk=100000"], "teacher.topk=100000 is more than the 258 entries"),
    ],
)
def test_a_top_k_says_how_many(paths, overrides, said):
    with pytest.raises(ValueError, match=said):
        validate(config_of(paths, f"teacher.model.path={paths['code']}", *overrides))


def test_a_single_named_teacher_gets_even_micro_batches(paths):
    """Nothing is padded for it, so VERL's own rule holds."""
    overrides = [f"+teacher.models.code.path={paths['code']}", "data.train_batch_size=8"]
    with pytest.raises(ValueError, match="teacher.micro_batch_size_per_gpu=3 does not divide"):
        validate(config_of(paths, *overrides, "teacher.use_dynamic_bsz=False", "teacher.micro_batch_size_per_gpu=3"))


@pytest.mark.parametrize("key", ["routing_key=x", "weights_key=x", "ema=0.9", "refresh_freq=2", "topk=3"])
def test_settings_of_teachers_beside_another_loss_are_refused(key):
    with pytest.raises(ValueError, match=f"teacher.{key} has no effect with .*loss_mode=vanilla"):
        validate(make_config(f"teacher.{key}"))


def test_teachers_beside_another_loss_are_refused(paths):
    config = make_config(f"+teacher.models.code.path={paths['code']}")
    with pytest.raises(ValueError, match="teacher.models.code=.* has no effect with .*loss_mode=vanilla"):
        validate(config)


def test_a_new_teacher_on_the_command_line_wants_a_plus():
    with pytest.raises(ValueError, match=r"write \+teacher.models.code.path=x"):
        refuse_misspelt_overrides(["teacher.models.code.path=x"])
    refuse_misspelt_overrides(["+teacher.models.code.path=x", "++teacher.models.code.weight=2", "~teacher.models.code"])
    # A YAML of the user's may have it already.
    refuse_misspelt_overrides(["--config-name", "mine", "teacher.models.code.weight=2"])


def test_shares_are_float64_and_sum_to_one():
    shares = routes({"a": {"weight": 1}, "b": {"weight": 1}, "c": {"weight": 1}}).shares({}, 4)
    assert shares.dtype == torch.float64 and torch.equal(shares.sum(-1), torch.ones(4).double())
