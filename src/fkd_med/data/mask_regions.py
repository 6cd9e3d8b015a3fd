"""Which values of a mask that is taken for background and foreground fill regions of their own: further classes.

Borders, JPEG noise and soft edges bring any value, but no regions of one. What could be taken for some: a slope near an
end, which has at least half as many pixels of the next value inwards; and an end that JPEG of low quality has moved as
a whole, by 5 of 255 at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

REGION_SHARE = 0.01  # more of the foreground than this in regions of further values is no border and no noise
_NEAR = 0.1  # of the largest value: nearer to an end than this, JPEG noise and slopes are looked for
_MOVED = 0.02  # of the largest value: JPEG moves an end by no more
_FILLED = 0.5  # of an end's pixels are solid, unless JPEG has moved it and a few were left where it was
_SLOPE = 2  # neighbouring values of a slope differ in their numbers of pixels by no more than this factor


def further_regions(pixels: Mapping[int, int], solid: Mapping[int, int], top: int) -> dict[int, int]:
    """Return the values of one mask that are regions beside background and foreground, with their solid pixels.

    Args:
        pixels: Raw value -> number of pixels.
        solid: Raw value -> number of pixels whose 3x3 neighbourhood has that one value.
        top: Foreground; background is 0.
    """
    low = [0, *sorted(value for value in pixels if 0 < value <= _NEAR * top)]
    high = [top, *sorted((value for value in pixels if (1 - _NEAR) * top <= value < top), reverse=True)]
    middle = [value for value in solid if _NEAR * top < value < (1 - _NEAR) * top]
    beside = [*_beside_end(low, pixels, solid, top), *middle, *_beside_end(high, pixels, solid, top)]
    return {value: solid[value] for value in beside}


def _beside_end(near: Sequence[int], pixels: Mapping[int, int], solid: Mapping[int, int], top: int) -> list[int]:
    """Return which of the values near an end, given from there inwards, are regions beside that end."""
    counts = [solid.get(value, 0) for value in near]
    reach = [place for place, value in enumerate(near) if abs(value - near[0]) <= _MOVED * top]
    end = 0 if counts[0] > _FILLED * pixels.get(near[0], 0) else max(reach, key=counts.__getitem__)
    inwards = [pixels[value] for value in near[1:]] + [0]
    return [near[place] for place in range(end + 1, len(near)) if counts[place] > _SLOPE * inwards[place]]
