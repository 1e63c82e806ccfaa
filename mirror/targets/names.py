"""Device names as users write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from mirror.errors import DeviceError


class DeviceFamily(Enum):
    """Which runtime serves a device."""

    CPU = "cpu"
    CUDA = "cuda"
    OPENVINO = "openvino"
    QNN = "qnn"


class Precision(Enum):
    """The arithmetic that a device computes in, whatever its weights are stored as."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"


@dataclass(frozen=True)
class DeviceName:
    """A device name taken apart.

    Attributes:
        unit: which one of the family: empty for the CPU, a number for CUDA, OpenVINO's own name
            (`CPU`, `GPU`, `GPU.1`, `NPU`) for OpenVINO, `htp` or `emulator` for QNN.
        precision: the arithmetic asked for, None for the device's default.
        chip: the Hexagon architecture asked for, `v73` or, with a chip's number, `v73.43`; None for the
            machine's own, or the emulator's default.
        share: the part of a GPU's multiprocessors that is asked for, above 0; 1 is all of them.
    """

    family: DeviceFamily
    unit: str = ""
    precision: Precision | None = None
    chip: str | None = None
    share: float = 1.0

    def __str__(self) -> str:
        """The name without its precision, chip or share."""
        return f"{self.family.value}:{self.unit}" if self.unit else self.family.value


_CHOICES = (
    "cpu, cuda:0 (a number), openvino:CPU, openvino:GPU (or GPU.1), openvino:NPU, qnn:htp (or qnn:emulator), "
    "npu (whichever there is)"
)
_UNITS = {
    DeviceFamily.CPU: re.compile(r""),
    DeviceFamily.CUDA: re.compile(r"0|[1-9]\d{0,2}"),
    DeviceFamily.OPENVINO: re.compile(r"CPU|NPU|GPU(\.\d{1,2})?"),
    DeviceFamily.QNN: re.compile(r"HTP|EMULATOR"),
}
_SHARE = re.compile(r"0?\.\d{1,3}")
_CHIP = re.compile(r"v\d{2}(\.\d{1,3})?")


def parse_device_name(text: str) -> DeviceName:
    """Return a device name taken apart: `family[:unit[:precision, chip or share]]`, as in `openvino:CPU:bf16`.

    Raises:
        DeviceError: the name is none of the known ones; the message lists them.
    """
    family_text, _, rest = text.strip().partition(":")
    unit, _, detail = rest.partition(":")
    try:
        family = DeviceFamily(family_text.lower())
    except ValueError:
        raise DeviceError(f"no device is called {text!r}; the names are {_CHOICES}") from None
    unit = unit.upper()
    if _UNITS[family].fullmatch(unit) is None or (rest and not unit):
        raise DeviceError(f"{text!r} doesn't say which {family.value} device; the names are {_CHOICES}")
    if family is DeviceFamily.QNN:
        return DeviceName(family, unit.lower(), chip=_chip(text, detail))
    if family is DeviceFamily.CUDA:
        return DeviceName(family, unit, share=_share(text, detail))
    return DeviceName(family, unit, _precision(text, detail))


def _share(text: str, share: str) -> float:
    if not share:
        return 1.0
    if _SHARE.fullmatch(share) is None or float(share) == 0.0:
        raise DeviceError(f"{text!r} asks for {share!r} of a GPU; write a part above 0 and below 1, as in cuda:0:0.25")
    return float(share)


def _chip(text: str, chip: str) -> str | None:
    if not chip:
        return None
    if _CHIP.fullmatch(chip.lower()) is None:
        raise DeviceError(f"{text!r} asks for chip {chip!r}; write its architecture, as in qnn:htp:v73")
    return chip.lower()


def _precision(text: str, precision: str) -> Precision | None:
    if not precision:
        return None
    try:
        return Precision(precision.lower())
    except ValueError:
        raise DeviceError(f"{text!r} asks for precision {precision!r}; the choices are f32, f16, bf16") from None
