"""The layers of a disk, from the guest to the storage, as the geometry of a picture (SVG)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from virt_sse.page.document import DiskPart, LayerPart

WIDTH = 760
"""Of the picture, in its own units; a character of text takes about seven."""
_BOX, _HEIGHT, _GAP = 400, 58, 46
_KEY_X = 440
_TIMES = ("plaintext", "encrypted once", "encrypted twice")
_PROCESSES = {"guest": "QEMU of the guest", "cache": "Host cache", "storage": "Storage daemon"}


@dataclass(frozen=True, slots=True)
class Box:
    """A box: a place that data passes or is stored in.

    :ivar kind: ``guest``, ``layer``, ``cache`` or ``image``.
    :ivar key: the key beside the box, with its version below; ``None`` for a box without a DEK.
    """

    kind: str
    y: int
    title: str
    text: str
    key: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Arrow:
    """The way of data between two boxes."""

    y: int
    end: int
    label: str
    is_plaintext: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture.

    :ivar summary: the picture in words.
    """

    width: int
    height: int
    box_width: int
    box_height: int
    key_x: int
    boxes: Sequence[Box]
    arrows: Sequence[Arrow]
    summary: str


def draw(disk: DiskPart, target: str | None = None, domain: str | None = None) -> Picture:
    """Draw the layers of a disk.

    :param target: the disk's name in the guest, in *domain*.
    """
    where = f"/dev/{target} in {domain}" if target and domain else "not in use by a running domain"
    boxes = [Box("guest", 0, "Guest", where)]
    arrows = []
    times = 0
    for layer in disk.layers:
        y = len(boxes) * (_HEIGHT + _GAP)
        arrows.append(_arrow(y, times))
        boxes.append(_box(layer, y))
        times += layer.cipher is not None
    y = len(boxes) * (_HEIGHT + _GAP)
    arrows.append(_arrow(y, times))
    boxes.append(Box("image", y, f"Image, {disk.format}", disk.path))
    ways = [arrow.label for arrow in arrows]
    steps = [boxes[0].title]
    for box, way in zip(boxes[1:], ways, strict=True):
        steps.append(f"{way} to {box.title}{', ' + box.text if box.kind == 'layer' else ''}")
    return Picture(WIDTH, y + _HEIGHT, _BOX, _HEIGHT, _KEY_X, boxes, arrows, "; ".join(steps))


def _arrow(y: int, times: int) -> Arrow:
    label = _TIMES[times] if times < len(_TIMES) else f"encrypted {times} times"
    return Arrow(y - _GAP, y, label, times == 0)


def _box(layer: LayerPart, y: int) -> Box:
    title = _PROCESSES.get(layer.process, layer.process)
    if layer.cipher is None:
        return Box("cache", y, title, f"{layer.detail}, holds ciphertext only")
    return Box("layer", y, title, f"LUKS {layer.cipher}, DEK {layer.slot}", layer.key, layer.version)
