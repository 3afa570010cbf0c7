"""Long curves for small pictures: smoothed, and thinned to what can be seen."""

from __future__ import annotations

# A picture is some 400 units wide: more columns than this cannot be told apart.
COLUMNS = 220


def smooth(values: list[float], window: int) -> list[float]:
    """Return, at each point, the least-squares line through the `window` points nearest to it.

    Away from the ends that is the centred mean. At the ends, where the points lie to one side, a mean would
    lag behind a falling curve and a line does not.
    """
    # Running sums of the values and of position times value: each line then costs the same, however wide.
    plain, moment = [0.0], [0.0]
    for position, value in enumerate(values):
        plain.append(plain[-1] + value)
        moment.append(moment[-1] + position * value)
    result = []
    for i in range(len(values)):
        begin = max(0, min(i - window // 2, len(values) - window))
        end = min(len(values), begin + window)
        count, middle = end - begin, (begin + end - 1) / 2
        total = plain[end] - plain[begin]
        spread = count * (count * count - 1) / 12
        slope = (moment[end] - moment[begin] - middle * total) / spread if spread else 0.0
        result.append(total / count + slope * (i - middle))
    return result


def thin(points: tuple[list[float], list[float]], columns: int = COLUMNS) -> tuple[list[float], list[float]]:
    """Return points that draw the same picture: of each column's the first, least, largest and last, in their order."""
    xs, ys = points
    if len(xs) <= 4 * columns:
        return points
    kept: list[int] = []
    for column in range(columns):
        begin, end = column * len(xs) // columns, (column + 1) * len(xs) // columns
        inside = range(begin, end)
        found = {begin, end - 1, min(inside, key=ys.__getitem__), max(inside, key=ys.__getitem__)}
        kept += sorted(found)
    return [xs[i] for i in kept], [ys[i] for i in kept]
