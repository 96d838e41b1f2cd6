"""How a window moves over one dimension, and what a block of it reads.

A result at ``y`` reads, for every place ``k`` of the window, what stands at
``y * stride + k * window_dilation - low``, where elements of what is read stand
``read_dilation`` apart. ``y`` and ``k`` play like parts: the gradient of a convolution
for its weight is one whose window is the image. So whichever is cut in blocks, with
``step`` between neighbours while the other one spans ``span``, a block reads its own
elements, some before them and some behind: a halo.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Overlap:
    """Elements that a block reads before and behind its own, and the padding (low,
    high) with which the window then moves over all of them."""

    before: int
    behind: int
    padding: tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Sizes along one dimension, and how the window moves over it.

    >>> Window(0, read=8, window=3, made=4, stride=2, low=0, high=1).of_made
    Overlap(before=0, behind=1, padding=(0, 0))
    """

    number: int
    read: int
    window: int
    made: int
    stride: int = 1
    low: int = 0
    high: int = 0
    read_dilation: int = 1
    window_dilation: int = 1

    @property
    def reach(self) -> int:
        """How many elements lie between the window's ends, both counted."""
        return (self.window - 1) * self.window_dilation + 1

    @property
    def of_made(self) -> Overlap | None:
        """Of a block of the result. None where equal blocks of it are none of what is
        read."""
        if self.read * self.read_dilation != self.made * self.stride:
            return None
        return self._overlap(self.stride, self.reach - 1)

    @property
    def of_window(self) -> Overlap | None:
        """Of a block of the window, likewise."""
        if self.read * self.read_dilation != self.window * self.window_dilation:
            return None
        return self._overlap(self.window_dilation, (self.made - 1) * self.stride)

    def _overlap(self, step: int, span: int) -> Overlap:
        before = max(self.low, 0) // self.read_dilation
        past = span - step - self.low
        behind = max(past // self.read_dilation + 1, 0)
        low = self.low - before * self.read_dilation
        high = past - (behind - 1) * self.read_dilation
        return Overlap(before, behind, (low, high))


@dataclass(frozen=True)
class Scattered:
    """What a block of the gradient of pooling reads: windows that lie over it though
    they are its neighbours' (``windows``), and all that is in these (``elements``);
    elements before and behind each."""

    windows: tuple[int, int]
    elements: tuple[int, int]

    @staticmethod
    def of(at: Window) -> Scattered | None:
        """None where equal blocks of windows are none of what is pooled.

        >>> Scattered.of(Window(0, read=8, window=3, made=4, stride=2, low=0, high=1))
        Scattered(windows=(1, 0), elements=(2, 1))
        """
        if at.read != at.made * at.stride or at.low < 0:
            return None
        before = max((at.window - 1 - at.low) // at.stride, 0)
        behind = max((at.low - 1) // at.stride + 1, 0)
        last = (behind - 1) * at.stride - at.low + at.window
        elements = before * at.stride + at.low, max(last, 0)
        return Scattered((before, behind), elements)
