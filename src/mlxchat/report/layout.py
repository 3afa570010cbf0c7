"""A layered drawing of the pipeline: where each step's box goes and how the lines run.

The method is Sugiyama's in its simplest form: a step's layer is its longest way from a source; an edge over
several layers gets a bend point in each, shared by all edges from the same step; barycentres order each
layer; then every node moves as near to its neighbours as the gaps allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GAP = 18.0
LAYER_GAP = 30.0
BEND_SIZE = 8.0
# Above a leaf's 1, so that the bends of a long line stay in line; below that of a step others build on.
BEND_WEIGHT = 20.0
MARGIN = 6.0
SWEEPS = 24


@dataclass(frozen=True, kw_only=True)
class Box:
    """A step's place, in pixels from the upper left."""

    name: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """A piece of an edge as SVG path data; the last piece, into a box, carries the arrow head."""

    path: str
    has_arrow: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The whole drawing and its size in pixels."""

    width: float
    height: float
    boxes: list[Box]
    lines: list[Line]


@dataclass(eq=False)
class _Node:
    name: str
    layer: int
    size: float
    """Extent across the layers' direction."""
    is_bend: bool = False
    weight: float = 1.0
    """How much it draws its neighbours; what many steps build on stays straight, what is a leaf gives way."""
    place: float = 0.0
    """Centre, across the layers' direction."""


def arrange(
    widths: Mapping[str, float], inputs: Mapping[str, Sequence[str]], *, height: float, is_wide: bool
) -> Layout:
    """Lay a graph out in layers.

    Args:
        widths: each box's least width in pixels, in topological order; side by side, the boxes of one layer
            are as wide as the widest of them.
        inputs: the names each box depends on; names without a width are ignored.
        height: every box's height in pixels.
        is_wide: layers follow each other from left to right, else from top to bottom.

    Returns:
        Boxes in the order of `widths`, and the lines between them.

    """
    layers, links = _layers(widths, inputs, height, is_wide)
    _order(layers, links)
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 else reversed(layers):
            _settle(layer, links, (True, True) if sweep > SWEEPS // 2 else (bool(sweep % 2), not sweep % 2))
    return _draw(layers, links, widths, height, is_wide)


def _layers(
    widths: Mapping[str, float], inputs: Mapping[str, Sequence[str]], height: float, is_wide: bool
) -> tuple[list[list[_Node]], list[tuple[_Node, _Node]]]:
    nodes: dict[str, _Node] = {}
    bends: dict[tuple[str, int], _Node] = {}
    links: dict[tuple[_Node, _Node], None] = {}
    for name, width in widths.items():
        sources = [nodes[source] for source in inputs.get(name, ()) if source in nodes]
        layer = max((source.layer + 1 for source in sources), default=0)
        nodes[name] = node = _Node(name, layer, height if is_wide else width)
        for source in sources:
            last = source
            for between in range(source.layer + 1, layer):
                key = (source.name, between)
                bend = bends.setdefault(key, _Node(source.name, between, BEND_SIZE, True, BEND_WEIGHT))
                links[last, bend] = None
                last = bend
            links[last, node] = None
    for user in reversed(nodes.values()):
        for name in set(inputs.get(user.name, ())).intersection(nodes):
            nodes[name].weight += user.weight
    for node in nodes.values():
        node.weight **= 6
    everything = [*nodes.values(), *bends.values()]
    depth = max((node.layer for node in everything), default=-1) + 1
    return [[n for n in everything if n.layer == layer] for layer in range(depth)], list(links)


def _neighbours(node: _Node, links: list[tuple[_Node, _Node]], before: bool, after: bool) -> list[_Node]:
    sources = [a for a, b in links if b is node] if before else []
    return sources + ([b for a, b in links if a is node] if after else [])


def _order(layers: list[list[_Node]], links: list[tuple[_Node, _Node]]) -> None:
    for layer in layers:
        for position, node in enumerate(layer):
            node.place = position
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        for layer in layers if downwards else reversed(layers):
            wishes = {
                id(node): sum(n.place for n in near) / len(near) if near else node.place
                for node in layer
                for near in [_neighbours(node, links, downwards, not downwards)]
            }
            layer.sort(key=lambda node: wishes[id(node)])
            for position, node in enumerate(layer):
                node.place = position
    for layer in layers:
        offset = 0.0
        for node in layer:
            node.place = offset + node.size / 2
            offset += node.size + GAP


def _settle(layer: list[_Node], links: list[tuple[_Node, _Node]], sides: tuple[bool, bool]) -> None:
    """Move a layer's nodes to the mean of their neighbours, keeping order and gaps.

    With the gaps taken off, the wished places must not decrease: isotonic regression, by pooling.
    """
    offset = 0.0
    offsets, pools = [], []
    for position, node in enumerate(layer):
        if position:
            offset += (layer[position - 1].size + node.size) / 2 + GAP
        offsets.append(offset)
        near = _neighbours(node, links, *sides)
        pull = sum(n.weight for n in near)
        wish = sum(n.place * n.weight for n in near) / pull if near else node.place
        pools.append(((wish - offset) * node.weight, node.weight, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            upper, lower = pools.pop(), pools.pop()
            pools.append((lower[0] + upper[0], lower[1] + upper[1], lower[2] + upper[2]))
    settled = [total / weight for total, weight, count in pools for _ in range(count)]
    for node, base, shift in zip(layer, offsets, settled, strict=True):
        node.place = base + shift


def _draw(
    layers: list[list[_Node]],
    links: list[tuple[_Node, _Node]],
    widths: Mapping[str, float],
    height: float,
    is_wide: bool,
) -> Layout:
    everything = [node for layer in layers for node in layer]
    lowest = min((node.place - node.size / 2 for node in everything), default=0.0)
    across = max((node.place + node.size / 2 for node in everything), default=0.0) - lowest
    # Where each layer begins and ends along the direction of the layers.
    spans, along = [], MARGIN
    for layer in layers:
        deep = max((widths[n.name] for n in layer if not n.is_bend), default=0.0) if is_wide else height
        spans.append((along, along + deep))
        along += deep + LAYER_GAP
    end = along - LAYER_GAP + MARGIN if layers else 2 * MARGIN

    def centre(node: _Node) -> float:
        return node.place - lowest + MARGIN

    def point(at: float, place: float) -> str:
        return f"{at:.1f} {place:.1f}" if is_wide else f"{place:.1f} {at:.1f}"

    boxes = {}
    for node in everything:
        if not node.is_bend:
            begin, finish = spans[node.layer]
            width, middle = finish - begin if is_wide else widths[node.name], (begin + finish) / 2
            x, y = (middle, centre(node)) if is_wide else (centre(node), middle)
            boxes[node.name] = Box(name=node.name, x=x - width / 2, y=y - height / 2, width=width, height=height)
    lines = []
    for source, target in links:
        begin, finish = spans[source.layer][1], spans[target.layer][0]
        middle = (begin + finish) / 2
        a, b = centre(source), centre(target)
        path = f"M{point(begin, a)} C{point(middle, a)} {point(middle, b)} {point(finish, b)}"
        if target.is_bend:
            path += f" L{point(spans[target.layer][1], b)}"
        lines.append(Line(path=path, has_arrow=not target.is_bend))
    size = (end, across + 2 * MARGIN)
    return Layout(
        width=size[0] if is_wide else size[1],
        height=size[1] if is_wide else size[0],
        boxes=[boxes[name] for name in widths],
        lines=lines,
    )
