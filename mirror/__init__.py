"""Mirror speculative decoding for Hugging Face decoder models, on two devices at once.

    with mirror.load("bundle") as engine:
        print(engine.generate("Why is the sky blue?").text)

Importing this package loads neither onnxruntime nor torch; `load` does.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mirror.version import __version__

# ONNX Runtime reports usage by default, and reads this when it is imported, which export does too.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from mirror.runtime.engine import Conversation, Engine, load
    from mirror.runtime.records import FinishReason, Mode
    from mirror.runtime.result import Result, Stream
    from mirror.runtime.statistics import Statistics

_HOMES = {
    "Conversation": "mirror.runtime.engine",
    "Engine": "mirror.runtime.engine",
    "Result": "mirror.runtime.result",
    "Stream": "mirror.runtime.result",
    "load": "mirror.runtime.engine",
    "FinishReason": "mirror.runtime.records",
    "Mode": "mirror.runtime.records",
    "Statistics": "mirror.runtime.statistics",
}

__all__ = ["Conversation", "Engine", "FinishReason", "Mode", "Result", "Statistics", "Stream", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mirror' has no attribute {name!r}")
