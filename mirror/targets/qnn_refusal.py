"""Why a Hexagon NPU doesn't take a graph whole, node by node.

The provider says its reasons only to ONNX Runtime's log, which goes to the process's stderr. So the graph is
loaded once more in a process of its own, with the CPU allowed, and what that one says is read.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REFUSED = re.compile(r"failed for node `([^`]+)` of type `[^`]+` with error code (\d+)")
_ANSWER = "left to the CPU: "
_TIMEOUT_S = 120.0
_SHOWN = 8


@dataclass(frozen=True)
class RefusedNode:
    """A node that the NPU didn't take.

    Attributes:
        code: the compiler's error for it, None where the provider has no form of the operator at all.
    """

    name: str
    operator: str
    code: int | None

    def __str__(self) -> str:
        """The node and the reason."""
        reason = "no form of it on the NPU" if self.code is None else f"its compiler refused it, error {self.code}"
        return f"{self.operator} {self.name} ({reason})"


def refused_nodes(path: Path, sizes: Mapping[str, int], provider_options: Mapping[str, str]) -> list[RefusedNode]:
    """Return the nodes of a graph that the NPU leaves to the CPU, empty where it failed for another reason.

    Args:
        sizes: the value of every symbolic dimension.
    """
    request = json.dumps({"path": str(path), "sizes": dict(sizes), "options": dict(provider_options)})
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return []
    if done.returncode != 0:
        return []
    codes = {name: int(code) for name, code in _REFUSED.findall(done.stderr)}
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if not answers:
        return []
    left = json.loads(answers[-1].removeprefix(_ANSWER))
    return [RefusedNode(name, operator, codes.get(name)) for name, operator in left]


def sentence(nodes: list[RefusedNode]) -> str:
    """Return the first few nodes, and how many more there are."""
    more = f"; and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
    return "; ".join(str(node) for node in nodes[:_SHOWN]) + more


def _left_to_the_cpu(request: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Load a graph with the CPU allowed; return the name and operator of each node that it got."""
    import onnxruntime as ort

    from mirror.targets.qnn import registered_device

    options = ort.SessionOptions()
    options.log_severity_level = 2
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for dimension, size in request["sizes"].items():
        options.add_free_dimension_override_by_name(dimension, size)
    options.add_provider_for_devices([registered_device()], dict(request["options"]))
    session = ort.InferenceSession(request["path"], options)
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == "CPUExecutionProvider"]
    return [(node.name, node.op_type) for part in parts for node in part.get_nodes()]


if __name__ == "__main__":
    # Libraries loaded here, and the system's own, may write to the same stream.
    print(_ANSWER + json.dumps(_left_to_the_cpu(json.load(sys.stdin))), flush=True)  # noqa: T201  (its answer)
