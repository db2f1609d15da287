"""What a study's points say, in sentences: which network is ahead where, and whether that changes with more data.

A network is ahead only where the two intervals part. Two 95 % intervals that part are more than a difference at the 5 %
level asks for (Schenker and Gentleman, The American Statistician 55, 2001), so a crossing that is named is meant.
"""

import itertools
from collections.abc import Iterator, Sequence

from pipeline.studies.points import Point, at_longest

SINGLE = "; of one seed: what chance does to a training is not in it"


def findings(points: Sequence[Point]) -> list[str]:
    """One sentence for each objective and pair of networks that share an amount of data; of the longest runs."""
    sentences, points = [], at_longest(points)
    for objective in dict.fromkeys(point.objective for point in points):
        of_objective = [point for point in points if point.objective == objective]
        networks = list(dict.fromkeys(point.network for point in of_objective))
        for one, other in itertools.combinations(networks, 2):
            pairs = _pairs(of_objective, one, other)
            if pairs:
                chance = SINGLE if min(point.seeds for pair in pairs for point in pair) == 1 else ""
                sentences.append(f"{objective}: {_sentence(one, other, pairs)}{chance}")
    return sentences


def _pairs(points: Sequence[Point], one: str, other: str) -> list[tuple[Point, Point]]:
    """The points of both networks at each amount of data that both have, the smallest first."""
    of_one, of_other = (
        {point.fraction: point for point in points if point.network == name} for name in (one, other)
    )  # fmt: skip
    return [(of_one[fraction], of_other[fraction]) for fraction in sorted(of_one.keys() & of_other.keys())]


def _sentence(one: str, other: str, pairs: Sequence[tuple[Point, Point]]) -> str:
    ahead = [_ahead(*pair) for pair in pairs]
    images = [pair[0].images for pair in pairs]
    if crossing := _crossing(ahead):
        winner, place = crossing
        loser = other if winner == one else one
        since = f" and stays ahead up to {images[-1]:,}" if place < len(images) - 1 else ""
        return f"{winner} overtakes {loser} at {images[place]:,} images{since}"
    lasting = " that lasts" if len({name for name in ahead if name}) == 2 else ""
    stretches = "; ".join(_stretches(ahead, images))
    return f"no crossing of {one} and {other}{lasting} seen up to {images[-1]:,} images: {stretches}"


def _ahead(one: Point, other: Point) -> str | None:
    """The network whose interval lies above the other's; None where they overlap, or where there is none."""
    if one.low > other.high:
        return one.network
    return other.network if other.low > one.high else None


def _crossing(ahead: Sequence[str | None]) -> tuple[str, int] | None:
    """(who, from which place on) where one network is ahead up to the last place, and the other was before that."""
    last = ahead[-1]
    if last is None:
        return None
    place = len(ahead) - 1
    while place and ahead[place - 1] == last:
        place -= 1
    behind = [name for name in ahead[:place] if name is not None]
    return (last, place) if behind and behind[-1] != last else None


def _stretches(ahead: Sequence[str | None], images: Sequence[int]) -> Iterator[str]:
    """Who is ahead at which amounts of data, neighbours together."""
    for name, group in itertools.groupby(zip(ahead, images, strict=True), key=lambda pair: pair[0]):
        amounts = [f"{amount:,}" for _, amount in group]
        where = f"at {amounts[0]}" if len(amounts) == 1 else f"from {amounts[0]} to {amounts[-1]}"
        yield f"{name} is ahead {where}" if name else f"they cannot be told apart {where}"
