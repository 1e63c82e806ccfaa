"""A machine as the planner knows it: rates and fixed costs of its devices, each figure with where it comes from.

A profile is a JSON file; those of the package are in `boxes/`. A figure is `{"value", "basis", "source"}`, and
`"range": [low, high]` where it is known no better than that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from mirror.errors import RequestError

Read = TypeVar("Read")


class Basis(Enum):
    """Where a figure comes from.

    VENDOR: the maker's specification. PUBLISHED: somebody's public measurement. MEASURED: ours. FITTED: chosen so
    that one published or measured run comes out. ASSUMED: nobody said; the source says why this is plausible.
    """

    VENDOR = "vendor"
    PUBLISHED = "published"
    MEASURED = "measured"
    FITTED = "fitted"
    ASSUMED = "assumed"


@dataclass(frozen=True)
class Figure:
    """A number, its origin, and the range it is known to lie in (`low` and `high` equal it where it is sharp)."""

    value: float
    basis: Basis
    source: str
    low: float
    high: float


@dataclass(frozen=True)
class DeviceProfile:
    """What a device can do.

    Attributes:
        memory: the memory it reads from; devices that name the same one share its bandwidth.
        gb_s: bandwidth that it sustains in products with stored matrices.
        gb_s_by_precision: the same for matrices that are stored in some way, where it isn't `gb_s`.
        cache_gb_s: the same for attention over a cache; None takes `gb_s`.
        tops: sustained 10^12 operations a second (a multiply-add is two), by the way matrices are stored.
        pass_ms: the fixed cost of a pass.
        kernel_us: the fixed cost of each kernel in a pass.
        copy_gb_s: at what rate the whole cache travels to the device at each pass; None where it stays there.
        draft_use: the share of the device that a draft's pass takes up beside a target's; None takes all of it.
        many_rows: how many times longer reading the matrices takes with more than one row.
    """

    name: str
    title: str
    memory: str
    gb_s: Figure
    tops: Mapping[str, Figure]
    pass_ms: Figure
    kernel_us: Figure
    cache_gb_s: Figure | None = None
    copy_gb_s: Figure | None = None
    draft_use: Figure | None = None
    many_rows: Figure | None = None
    gb_s_by_precision: Mapping[str, Figure] = field(default_factory=dict)

    def product_gb_s(self, precision: str) -> float:
        """Return the bandwidth of products with matrices that are stored in some way."""
        return self.gb_s_by_precision.get(precision, self.gb_s).value


@dataclass(frozen=True)
class Box:
    """A machine.

    Attributes:
        memories: each memory's bandwidth for all its devices together, GB/s.
        host_ms: what a round takes beside its passes.
        target, draft: the devices that run them where the user says nothing.
    """

    name: str
    title: str
    memories: Mapping[str, Figure]
    devices: Mapping[str, DeviceProfile]
    host_ms: Figure
    target: str
    draft: str

    def device(self, name: str) -> DeviceProfile:
        """Return a device's profile.

        Raises:
            RequestError: the box has no such device.
        """
        if name not in self.devices:
            raise RequestError(f"{self.title} has no device {name!r}; it has {', '.join(self.devices)}")
        return self.devices[name]

    def at_edge(self, *, slow: bool) -> Box:
        """Return the same box with every figure at the slow or the fast end of its range."""
        devices = {name: _device_at_edge(profile, slow) for name, profile in self.devices.items()}
        memories = {name: _edge(figure, low=slow) for name, figure in self.memories.items()}
        return replace(self, memories=memories, devices=devices, host_ms=_edge(self.host_ms, low=not slow))


def _device_at_edge(profile: DeviceProfile, slow: bool) -> DeviceProfile:
    changed: dict[str, Any] = {
        name: {precision: _edge(figure, low=slow) for precision, figure in getattr(profile, name).items()}
        for name in ("tops", "gb_s_by_precision")
    }
    for item in fields(profile):
        found = getattr(profile, item.name)
        if isinstance(found, Figure):
            changed[item.name] = _edge(found, low=slow == item.name.endswith("gb_s"))
    return replace(profile, **changed)


def _edge(figure: Figure, *, low: bool) -> Figure:
    return replace(figure, value=figure.low if low else figure.high)


# --- reading --------------------------------------------------------------------------------------


def named_boxes() -> tuple[str, ...]:
    """Return the names of the profiles that come with the package, sorted."""
    folder = resources.files("mirror").joinpath("plan/boxes")
    return tuple(sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")))


def read_box(source: str) -> Box:
    """Return a profile by its name, or from a file.

    Raises:
        RequestError: there is none, or it is wrong; the message names the place.
    """
    if Path(source).is_file():
        return parse_box(source, Path(source).read_text(encoding="utf-8"))
    if source not in named_boxes():
        raise RequestError(f"there is no box {source!r}; name a JSON file, or one of {', '.join(named_boxes())}")
    text = resources.files("mirror").joinpath(f"plan/boxes/{source}.json").read_text(encoding="utf-8")
    return parse_box(source, text)


def parse_box(name: str, text: str) -> Box:
    """Return the profile that a JSON text describes.

    Raises:
        RequestError: it isn't JSON, or a key is missing, unknown or of another kind; the message names the place.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"{name} is not JSON ({error}); mend it, or start from a profile in mirror/plan/boxes"
        ) from (error)
    place = _Place(name, "", data)
    place.expect({"title", "memories", "devices", "host_ms", "target", "draft"}, set())
    memories = place.each("memories", _figure)
    devices = place.each("devices", _device)
    box = Box(
        Path(name).stem if name.endswith(".json") else name,
        place.text("title"),
        memories,
        devices,
        place.figure("host_ms", zero=True),
        place.text("target"),
        place.text("draft"),
    )
    _check(name, box)
    return box


def _check(name: str, box: Box) -> None:
    for role in ("target", "draft"):
        if getattr(box, role) not in box.devices:
            raise RequestError(f"{name}: {role} is {getattr(box, role)!r}; expected one of {', '.join(box.devices)}")
    for device in box.devices.values():
        if device.memory not in box.memories:
            raise RequestError(
                f"{name}: devices.{device.name}.memory is {device.memory!r}; expected one of {', '.join(box.memories)}"
            )
        whole = box.memories[device.memory].high
        rates = {"gb_s": device.gb_s} | {f"gb_s_by_precision.{key}": it for key, it in device.gb_s_by_precision.items()}
        for key, rate in rates.items():
            if rate.value > whole:
                raise RequestError(
                    f"{name}: devices.{device.name}.{key} is {rate.value:g}, more than the {whole:g} of its memory "
                    f"{device.memory!r}; give the device what it sustains of that"
                )


@dataclass(frozen=True)
class _Place:
    """A JSON object in a profile, and where it stands."""

    file: str
    path: str
    data: Any

    def expect(self, needed: set[str], optional: set[str]) -> None:
        """Refuse anything but an object with these keys."""
        if not isinstance(self.data, dict):
            self.fail(f"expected an object with {', '.join(sorted(needed))}")
        missing, unknown = needed - self.data.keys(), self.data.keys() - needed - optional
        if missing or unknown:
            found = f"{min(missing)!r} is missing" if missing else f"{min(unknown)!r} is unknown"
            self.fail(f"{found}; the keys are {', '.join(sorted(needed | optional))}")

    def fail(self, why: str) -> None:
        """Raise an error that names this place."""
        where = f" at {self.path}" if self.path else ""
        raise RequestError(f"{self.file}{where}: {why}")

    def at(self, key: str) -> _Place:
        """Return what is under a key."""
        return _Place(self.file, f"{self.path}.{key}" if self.path else key, self.data[key])

    def text(self, key: str) -> str:
        """Return the text under a key."""
        found = self.data[key]
        if not isinstance(found, str) or not found:
            self.at(key).fail(f"found {found!r}; expected a text")
        return str(found)

    def number(self, key: str, *, zero: bool = False) -> float:
        """Return the number under a key, above 0 unless 0 may stand there."""
        found = self.data[key]
        known = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
        if not known or found < 0 or (found == 0 and not zero):
            self.at(key).fail(f"found {found!r}; expected a number {'of 0 or more' if zero else 'above 0'}")
        return float(found)

    def figure(self, key: str, *, zero: bool = False) -> Figure:
        """Return the figure under a key."""
        return _figure(key, self.at(key), zero=zero)

    def optional(self, key: str) -> Figure | None:
        """Return the figure under a key, None without one."""
        return self.figure(key) if key in self.data else None

    def each(self, key: str, read: Callable[[str, _Place], Read]) -> dict[str, Read]:
        """Return what an object holds by name, not empty."""
        inner = self.at(key)
        if not isinstance(inner.data, dict) or not inner.data:
            inner.fail("expected an object with at least one entry")
        return {name: read(name, inner.at(name)) for name in inner.data}


def _figure(_: str, place: _Place, *, zero: bool = False) -> Figure:
    place.expect({"value", "basis", "source"}, {"range"})
    bases = [basis.value for basis in Basis]
    if place.data["basis"] not in bases:
        place.at("basis").fail(f"found {place.data['basis']!r}; expected one of {', '.join(bases)}")
    value = place.number("value", zero=zero)
    low, high = _range(place, value)
    return Figure(value, Basis(place.data["basis"]), place.text("source"), low, high)


def _range(place: _Place, value: float) -> tuple[float, float]:
    found = place.data.get("range", [value, value])
    numbers = isinstance(found, list) and len(found) == 2 and all(isinstance(item, int | float) for item in found)
    if not numbers or not 0 <= found[0] <= value <= found[1] or (found[0] == 0 < value):
        place.at("range").fail(f"found {found!r}; expected [low, high] around the value {value:g}, low above 0")
    return float(found[0]), float(found[1])


def _device(name: str, place: _Place) -> DeviceProfile:
    optional = {"gb_s_by_precision", "cache_gb_s", "copy_gb_s", "draft_use", "many_rows"}
    place.expect({"title", "memory", "gb_s", "tops", "pass_ms", "kernel_us"}, optional)
    return DeviceProfile(
        name=name,
        title=place.text("title"),
        memory=place.text("memory"),
        gb_s=place.figure("gb_s"),
        tops=place.each("tops", _figure),
        pass_ms=place.figure("pass_ms", zero=True),
        kernel_us=place.figure("kernel_us", zero=True),
        cache_gb_s=place.optional("cache_gb_s"),
        copy_gb_s=place.optional("copy_gb_s"),
        draft_use=place.optional("draft_use"),
        many_rows=place.optional("many_rows"),
        gb_s_by_precision=place.each("gb_s_by_precision", _figure) if "gb_s_by_precision" in place.data else {},
    )
