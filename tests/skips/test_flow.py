"""The graph of a pass: what depends on what, and what goes on in what."""

from stability_probe.skips.flow import Call, Flow

ABOUT = {"function": "f", "depth": 0, "call": 0, "shape": (1,), "parametric": False}


def flow():
    """0 → 1 → 3, 0 → 2 → 3 with 2 as a gate alone, 3 → 4."""
    graph = Flow()
    for parents, carriers in (((), ()), ((0,), (0,)), ((0,), (0,)), ((1, 2), (1,)), ((3,), (3,))):
        graph.add(parents=frozenset(parents), carriers=frozenset(carriers), **ABOUT)
    return graph


def test_nodes_are_numbered_in_order():
    assert [node.index for node in flow().nodes] == [0, 1, 2, 3, 4]


def test_a_node_depends_on_its_gate_and_does_not_carry_it():
    graph = flow()
    assert graph.depends(4, on=2) and not graph.carries(4, content_of=2)
    assert graph.depends(4, on=1) and graph.carries(4, content_of=1)
    assert graph.carries(2, content_of=2) and graph.depends(2, on=2)
    assert not graph.depends(1, on=2) and not graph.depends(0, on=4)


def test_calls_lie_within_those_around_them():
    graph = Flow()
    for index, parent in enumerate((-1, 0, 1, 0)):
        graph.calls.append(Call(index, "", "", parent, number=0, entered=0))
    assert graph.within(2, 1) and graph.within(2, 0) and graph.within(2, 2)
    assert not graph.within(3, 1) and not graph.within(1, 2)
