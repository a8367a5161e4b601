"""Configuration: round trips, checks, and the integer arithmetic of densities."""

from __future__ import annotations

import dataclasses
import inspect
import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch

from salad_compile.common.schema import ConfigFields, SummaryFields, decode, fields_of, stamp
from salad_compile.config import BackendOptions, SaladConfig
from salad_compile.definition.spec import AttentionSpec, density_permille
from salad_compile.errors import ConfigError, CorruptFileError
from salad_compile.training.settings import TrainSettings

RESULT = {"steps": 1, "loss": None, "validation_loss": None, "items": 1, "processes": 1}


def test_json_round_trip() -> None:
    config = SaladConfig(sparsity=0.85, lora_targets=("query", "out"), lora_alpha=16, feature_map="elu")
    assert SaladConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": True}, r"\[0, 1\)"),
        ({"sparsity": float("nan")}, r"\[0, 1\)"),
        ({"feature_map": "rellu"}, "Did you mean 'relu'"),
        ({"pattern": "band"}, "'topk'"),
        ({"query_block": 48}, "query_block"),
        ({"key_block": 64.0}, "key_block"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"lora_rank": 1.5}, "lora_rank"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_targets": "query"}, r"\('query',\)"),
        ({"lora_targets": ("to_q",)}, "'query'"),
        ({"train_base": 1}, "train_base"),
        ({"token_order": "tile"}, "Did you mean 'tiles'"),
        ({"lora_rnk": 4}, "Did you mean 'lora_rank'"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SaladConfig.from_dict(values)


ODD = (
    *(None, True, float("nan"), float("inf"), -1, 2**31, 2**54, 2**70, 10**400, "x", b"x", 1j, object(), float),
    *(
        (),
        [None],
        {"a"},
        {1: 2},
        {"x": float("nan")},
        {"x": torch.float32},
        torch.tensor([1.0, 2.0]),
        torch.tensor(0.5),
    ),
    *(numpy.float32(0.5), numpy.float64(0.5), numpy.int64(4), numpy.array([1, 2]), Fraction(1, 2), Decimal("0.5")),
)


@pytest.mark.parametrize("cls", [SaladConfig, TrainSettings, BackendOptions])
def test_a_setting_of_any_kind_is_refused_or_fits_into_a_file(cls: Any) -> None:
    accepted = 0
    for name in (field.name for field in dataclasses.fields(cls) if field.init):
        for value in ODD:
            try:
                made = cls(**{name: value})
            except ConfigError:
                continue
            accepted += 1
            if cls is SaladConfig:
                fields = fields_of(decode(ConfigFields, json.dumps(made.to_dict()), "a file", CorruptFileError))
                assert SaladConfig.from_dict(fields) == made, (name, value)
            if cls is TrainSettings:
                text = json.dumps(stamp({**RESULT, "settings": made.to_dict()}))
                held = fields_of(decode(SummaryFields, text, "a file", CorruptFileError))["settings"]
                assert TrainSettings.from_dict(held).to_dict() == made.to_dict(), (name, value)
    assert accepted >= 10  # so many were looked at


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (SaladConfig, {"query_block": "x"}, "query_block must be one of"),
        (SaladConfig, {"lora_targets": 5}, "'query'"),
        (SaladConfig, {"lora_alpha": float("inf")}, "lora_alpha"),
        (SaladConfig, {"window": 2**31}, "window"),
        (TrainSettings, {"gradient_checkpointing": "yes"}, "gradient_checkpointing must be one of"),
        (TrainSettings, {"compile_options": {"x": torch.float32}}, "that JSON can hold"),
        (TrainSettings, {"learning_rate": 10**400}, "learning_rate"),
        (TrainSettings, {"compile_options": {"lowring": "eager"}}, "unknown option 'lowring'. Did you mean 'lowering'"),
        (SaladConfig, {"sparsty": 0.9}, "unknown setting 'sparsty'. Did you mean 'sparsity'"),
        (BackendOptions, {"lowring": "eager"}, "unknown option 'lowring'. Did you mean 'lowering'"),
        (BackendOptions, {"given": frozenset()}, "unknown option 'given'"),
        (
            TrainSettings,
            {"learning_rat": 1e-4},
            "unknown training setting 'learning_rat'. Did you mean 'learning_rate'",
        ),
        (TrainSettings, {"compile": "block"}, "Did you mean 'blocks'"),
    ],
)
def test_constructors_name_the_nearest(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**values)
    with pytest.raises(ConfigError, match="unknown"):
        dataclasses.replace(cls(), sparsityy=1)
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    assert list(inspect.signature(cls).parameters) == fields  # what editors and help() show


@pytest.mark.parametrize("make", [SaladConfig.from_dict, TrainSettings.from_dict, BackendOptions.from_options])
@pytest.mark.parametrize("values", [{1: 2}, {None: 2}, 5, "x", [("steps", 2)], [1]])
def test_what_is_no_dictionary_of_names_is_refused(make: Any, values: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown|are a dictionary"):
        make(values)


def test_densities_are_integers() -> None:
    assert [density_permille(s) for s in (0.0, 0.5, 0.9, 0.97, 0.774)] == [1000, 500, 100, 30, 226]


def test_specs_travel_as_text() -> None:
    spec = SaladConfig(sparsity=0.9, query_block=64, key_block=128, compensation="none", feature_map="softmax").spec
    made = AttentionSpec("topk", 100, 64, 128, "softmax", "tiles", rope_placement="map-then-rotate")
    assert AttentionSpec.decode(spec.encode()) == spec == made
    given = {"linear_branch": False, "rope_placement": "rotate-then-map", "gate": "head", "scaling": "v2"}
    given |= {"compensation": "tail", "pool": 64, "gate_axes": "1 0"}
    found = {"text": "before", "single": True, "heads_per_key": 4, "square_mask": True, "process_group": "0+1"}
    site = dataclasses.replace(spec, token_order="flat", adjustable=True, window=300, **given, **found)
    assert AttentionSpec.decode(site.encode()) == site
    assert all(getattr(site, f.name) != getattr(spec, f.name) for f in dataclasses.fields(spec)[5:])


def test_what_is_left_out_is_compensated_unless_settings_say_otherwise() -> None:
    assert (SaladConfig().compensation, SaladConfig().spec.pool) == ("tail", 256)
    assert SaladConfig(compensation="none").spec.pool == 0


def test_options_remember_what_was_given() -> None:
    assert BackendOptions.from_options({"sparsity": 0.5}).given == {"sparsity"}
    assert BackendOptions.from_options(None).given == frozenset()


def test_differences_are_listed() -> None:
    assert SaladConfig().difference(SaladConfig()) == ""
    assert SaladConfig(lora_rank=4).difference(SaladConfig(sparsity=0.5)) == "sparsity: 0.9 != 0.5, lora_rank: 4 != 64"


def test_overrides_apply_in_order_and_decide_what_is_adjustable() -> None:
    config = SaladConfig(overrides={"a.*": {"sparsity": 0.5}, "a.1": {"sparsity": 0.7, "pattern": "stswa"}})
    assert [config.of_site(name).sparsity for name in ("a.0", "a.1", "b.1")] == [0.5, 0.7, 0.9]
    assert [config.of_site(name).pattern for name in ("a.0", "a.1", "b.1")] == ["topk", "stswa", "topk"]
    assert config.spec.permille == 500
    assert config.spec.adjustable
    assert SaladConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert not SaladConfig(overrides={"a.*": {"pattern": "stswa"}}).spec.adjustable
    assert SaladConfig(lowest_sparsity=0.25).spec.permille == 750


@pytest.mark.parametrize(
    "values",
    [
        {"window": 0},
        {"window": 1.5},
        {"dense_layers": -1},
        {"dense_layers": True},
        {"lowest_sparsity": 0.95},
        {"lowest_sparsity": 0.6, "overrides": {"a": {"sparsity": 0.5}}},
        {"gate": "heads"},
        {"scaling": "v3"},
        {"rope_placement": "rotate"},
        {"linear_branch": 1},
    ],
    ids=str,
)
def test_wrong_variants_of_the_method(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SaladConfig(**values)
