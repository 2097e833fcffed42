"""What can go wrong with what a caller hands to the core.

NstModelError
├── InvalidOption          an option outside its bounds, or naming something that does not exist
├── InvalidImage           a tensor or picture that cannot be stylized
├── UnknownModel           no feature model of that name
├── WeightsUnavailable     a known model whose weights are not on this machine and cannot be had
├── WeightsCorrupt         weights whose hash, keys or shapes are not what they must be
├── DamagedState           the kept state of a run that cannot be gone on from
├── InvalidArtifact        a file that is no artifact of this project, or not the one that was written
└── DeviceUnavailable      a device that this machine does not have
"""

from __future__ import annotations


class NstModelError(Exception):
    """Base of everything that the core raises on purpose."""


class InvalidOption(NstModelError, ValueError):
    """An option is outside its bounds.

    Attributes:
        field: name of the option, `iterations` or `style_layers[relu9_9]` for instance.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field
        self.reason = message


class InvalidImage(NstModelError, ValueError):
    """A picture cannot be stylized: shape, type or size."""


class UnknownModel(NstModelError, LookupError):
    """No feature model has that name."""


class WeightsUnavailable(NstModelError, RuntimeError):
    """The weights of a known model cannot be had; the message says what to do."""


class WeightsCorrupt(NstModelError, ValueError):
    """Weights are not what they must be: wrong hash, missing key, wrong shape."""


class DamagedState(NstModelError, ValueError):
    """The kept state of a run is not what was written, or is another version's or another run's."""


class InvalidArtifact(NstModelError, ValueError):
    """A file is no artifact of this project, or is truncated, altered or of another version."""


class DeviceUnavailable(NstModelError, RuntimeError):
    """This machine does not have that device."""
