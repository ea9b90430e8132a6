"""The lineage as a drawing: artifacts in a column, an arc from each to what it went into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sevenfold.verify.lineage import Artifact

ROW_HEIGHT = 28.0
NODE_X = 84.0
FIRST_BULGE, BULGE_PER_ROW = 10.0, 9.0


@dataclass(frozen=True, kw_only=True)
class Node:
    """One artifact at height ``y``, in pixels."""

    label: str
    fingerprint: str
    y: float
    is_model: bool


@dataclass(frozen=True, kw_only=True)
class Edge:
    """An arc from an artifact to what was made from it, as the path of an SVG."""

    title: str
    path: str
    state: str


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes and arcs, and the height that they take, in pixels."""

    nodes: Sequence[Node]
    edges: Sequence[Edge]
    height: float
    node_x: float = NODE_X


def draw(artifacts: Sequence[Artifact]) -> Graph:
    """Lay out ``artifacts``, in the order given: every input comes before what is made from it."""
    heights = {a.name: (row + 0.5) * ROW_HEIGHT for row, a in enumerate(artifacts)}
    nodes = [
        Node(
            label=artifact.label,
            fingerprint=artifact.fingerprint,
            y=heights[artifact.name],
            is_model=artifact.label.endswith(" model"),
        )
        for artifact in artifacts
    ]
    edges = [
        Edge(
            title=f"{parent.label} went into {artifact.label}",
            path=_arc(heights[parent.name], heights[artifact.name]),
            state=parent.state,
        )
        for artifact in artifacts
        # What came from outside has no place here; the list beside the drawing names it.
        for parent in artifact.parents
        if parent.name in heights and parent.state != "outside"
    ]
    return Graph(nodes=nodes, edges=edges, height=len(artifacts) * ROW_HEIGHT)


def _arc(start_y: float, end_y: float) -> str:
    """Return the path between two heights; the further apart, the further it swings to the left."""
    rows = abs(end_y - start_y) / ROW_HEIGHT
    bulge_x = max(0.0, NODE_X - FIRST_BULGE - BULGE_PER_ROW * rows)
    return (
        f"M{NODE_X:.0f} {start_y:.0f}C{bulge_x:.1f} {start_y:.0f} "
        f"{bulge_x:.1f} {end_y:.0f} {NODE_X:.0f} {end_y:.0f}"
    )
