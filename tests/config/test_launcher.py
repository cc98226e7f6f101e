"""What accelerate's launcher asks for is taken as a setting or refused by name."""

from __future__ import annotations

import pytest

from unift.config.launcher import shards
from unift.config.surroundings import Model
from unift.types import ConfigError

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("auto", {}, False),
        ("none", {}, False),
        ("full", {}, True),
        ("auto", FSDP, True),
        ("full", FSDP, True),
        ("auto", FSDP | {"ACCELERATE_MIXED_PRECISION": "no", "FSDP_OFFLOAD_PARAMS": "false"}, True),
        ("auto", {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, True),
        ("auto", {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "1"}, True),
        ("auto", {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, False),
        ("auto", {"ACCELERATE_USE_FSDP": "false", "FSDP_OFFLOAD_PARAMS": "true"}, False),
        ("auto", FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "1"}, True),
    ],
)
def test_who_shards(setting, environment, expected):
    assert shards(Model(shard=setting), environment) is expected


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "True"}, "fsdp_activation_checkpointing"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward: false"),
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "hybrid_shard"),
        ({"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "shard_grad_op"),
        ({"FSDP_IGNORED_MODULES": "lm_head"}, "fsdp_ignored_modules"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "parallelism_config_tp_size",
        ),
    ],
)
def test_what_is_refused(more, said):
    with pytest.raises(ConfigError, match="accelerate's config file asks for") as found:
        shards(Model(), FSDP | more)
    assert said in str(found.value)


def test_a_setting_against_the_launcher():
    with pytest.raises(ConfigError, match="model.shard=none, but accelerate's config file asks for FSDP"):
        shards(Model(shard="none"), FSDP)
