"""Traces that are made once: dozens of tests export the same few architectures, and a trace takes seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from transformers import PretrainedConfig

from mirror.export.trace import Traced

Trace = Callable[[PretrainedConfig, torch.dtype], Traced]


def remembering(trace: Trace) -> Trace:
    """Return `trace` with a memory: it is made from a config alone, so an equal config gets a copy of its graph."""
    made: dict[tuple[str, torch.dtype], Traced] = {}

    def traced(config: PretrainedConfig, dtype: torch.dtype) -> Traced:
        key = (config.to_json_string(use_diff=False), dtype)
        if key not in made:
            made[key] = trace(config, dtype)
        # Each export changes the graph that it was given.
        return dataclasses.replace(made[key], model=made[key].model.clone(), parameters=dict(made[key].parameters))

    return traced
