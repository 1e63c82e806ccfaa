"""The exception tree.

MirrorError
├── BundleError        a bundle is missing, incomplete, edited, or of another schema version
├── ExportError        a checkpoint can't be turned into a bundle
│   └── SelfCheckError     the exported graphs don't compute what the checkpoint computes
├── DeviceError        a device isn't there or can't take a segment
├── CapacityError      a prompt or a request doesn't fit the KV cache
├── DraftError         the draft failed or hung; the engine goes on without it
├── RequestError       a generation request contradicts itself or the engine
└── BusyError          the engine is already generating

Every message says what was found, what was expected and what to do.
"""


class MirrorError(Exception):
    """Base of every error that this package raises on purpose."""


class BundleError(MirrorError):
    """A bundle is missing, incomplete, edited, or of another schema version."""


class ExportError(MirrorError):
    """A checkpoint can't be turned into a bundle."""


class SelfCheckError(ExportError):
    """The exported graphs don't compute what the checkpoint computes."""


class DeviceError(MirrorError):
    """A device isn't there or can't take a segment."""


class CapacityError(MirrorError):
    """A prompt or a request doesn't fit the KV cache."""


class DraftError(MirrorError):
    """The draft failed or hung."""


class RequestError(MirrorError):
    """A generation request contradicts itself or the engine."""


class BusyError(MirrorError):
    """The engine is already generating."""
