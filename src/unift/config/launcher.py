"""What accelerate's launcher asks for beside processes: its config file arrives as environment variables. unift has
settings of its own for all of it, so each wish is taken as such a setting or refused, never left out silently."""

from __future__ import annotations

import os
from collections.abc import Mapping

from unift.config.surroundings import Model
from unift.types import ConfigError

YES = ("1", "true", "yes", "y", "on", "t")
# Variables of FSDP1 name a strategy; FSDP2 only says whether weights are dealt out again after a forward pass.
FULL = ("full_shard", "1")
NONE = ("no_shard", "3")


def shards(model: Model, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this run shards: ``model.shard``, or what the launcher says where that is auto.

    Raises ConfigError where the launcher asks for something that unift does otherwise or not at all.
    """
    asked = _asked(environment)
    if asked and model.shard == "none":
        raise ConfigError(
            "model.shard=none, but accelerate's config file asks for FSDP. Use model.shard=full, or distributed_type: "
            "MULTI_GPU in that file"
        )
    return asked or model.shard == "full"


def _asked(environment: Mapping[str, str]) -> bool:
    """Does the launcher ask for full sharding?"""

    def on(name: str) -> bool:
        return environment.get(name, "").strip().lower() in YES

    def refuse(what: str, todo: str) -> ConfigError:
        return ConfigError(f"accelerate's config file asks for {what}, which unift does not take from there: {todo}")

    for name, what in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if on(name):
            raise refuse(what, "set distributed_type: FSDP (or MULTI_GPU) in it")
    for kind in ("TP", "CP", "SP", "DP_REPLICATE"):
        if on("ACCELERATE_USE_PARALLELISM_CONFIG") and environment.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") != "1":
            raise refuse(f"parallelism_config_{kind.lower()}_size other than 1", "leave it at 1")
    if not on("ACCELERATE_USE_FSDP"):
        return False
    strategy = environment.get("FSDP_SHARDING_STRATEGY", "full_shard").strip().lower()
    if strategy in NONE:
        return False
    again = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").strip().lower()
    if strategy not in FULL or again not in (*YES, *FULL):
        found = strategy if strategy not in FULL else f"fsdp_reshard_after_forward: {again}"
        raise refuse(
            f"FSDP with {found}", "use full sharding (fsdp_version: 2, fsdp_reshard_after_forward: true), or MULTI_GPU"
        )
    if on("FSDP_OFFLOAD_PARAMS"):
        raise refuse(
            "weights in CPU memory (fsdp_offload_params)",
            "set it to false there, and train.offload_optimizer=true here (the optimizer's state)",
        )
    if environment.get("FSDP_IGNORED_MODULES"):
        raise refuse("modules that are not sharded (fsdp_ignored_modules)", "leave it out")
    if on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise refuse(
            "activation checkpointing (fsdp_activation_checkpointing)",
            "set it to false there, and train.gradient_checkpointing=true here",
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").strip().lower()
    if precision not in ("no", ""):
        raise refuse(
            f"mixed_precision: {precision}",
            "set it to 'no' there, and model.autocast=all (products in bfloat16, weights float32) here",
        )
    return True
