"""The module `openvino`, imported without its report."""

from __future__ import annotations

import sys
from typing import Any


def _import_quietly() -> Any:
    """Return the openvino module, imported without the usage report that its import sends.

    The report goes through the module `openvino_telemetry`; without it, openvino has a stub.
    """
    reporter = "openvino_telemetry"
    before = sys.modules.get(reporter)
    sys.modules[reporter] = None  # type: ignore[assignment]  # None makes its import fail
    try:
        import openvino
    finally:
        del sys.modules[reporter]
        if before is not None:
            sys.modules[reporter] = before
    return openvino


ov = _import_quietly()
