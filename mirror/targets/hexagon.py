"""Hexagon NPUs by the names that people know, and what the compiler must be told of each."""

from __future__ import annotations

from dataclasses import dataclass

from mirror.errors import DeviceError

# Architecture -> a chip of it (Qualcomm's number) and where it is found. The compiler wants both numbers for
# float16; another chip of the same architecture can be named as in `v73.43`.
_CHIPS = {
    "v73": (60, "Snapdragon X Elite and X Plus"),
    "v75": (57, "Snapdragon 8 Gen 3"),
    "v79": (69, "Snapdragon 8 Elite"),
    "v81": (87, "Snapdragon 8 Elite Gen 5"),
}
DEFAULT_ARCHITECTURE = "v73"  # of the emulator: that of the NPU in today's laptops


@dataclass(frozen=True)
class Chip:
    """One Hexagon NPU.

    Attributes:
        architecture: `v73`.
        soc: Qualcomm's number of the chip around it.
        found_in: hardware that has it, empty where the chip was named by its number.
    """

    architecture: str
    soc: int
    found_in: str = ""

    @property
    def options(self) -> dict[str, str]:
        """What the provider is told."""
        return {"htp_arch": self.architecture[1:], "soc_model": str(self.soc)}


def chip(name: str) -> Chip:
    """Return a chip by its architecture, or by architecture and number: `v73`, `v73.43`.

    Raises:
        DeviceError: the architecture is not in the table and no number was given.
    """
    architecture, _, number = name.lower().partition(".")
    if number:
        return Chip(architecture, int(number))
    if architecture not in _CHIPS:
        raise DeviceError(
            f"no Hexagon chip of architecture {architecture} is known here, only {', '.join(_CHIPS)}; give the chip's "
            f"number too, as in {architecture}.60"
        )
    return Chip(architecture, *_CHIPS[architecture])
