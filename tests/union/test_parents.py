"""The table of forgotten nodes is a dict from ids to ids, in less space."""

from __future__ import annotations

from hypothesis import given, strategies as st

from cowfs.union.forgotten import Parents

IDS = st.integers(2, 400) | st.integers(2, (1 << 64) - 1)
STEPS = st.tuples(st.just("set"), IDS, IDS) | st.tuples(st.sampled_from(["discard", "reserve"]), IDS, st.just(0))


@given(st.lists(STEPS, max_size=600))
def test_it_answers_as_a_dict_does(steps: list[tuple[str, int, int]]) -> None:
    table, model = Parents(), dict[int, int]()
    for what, id, parent in steps:
        if what == "set":
            table[id] = model[id] = parent
        elif what == "discard":
            table.discard(id)
            model.pop(id, None)
        else:
            table.reserve(id % 5000)
        assert len(table) == len(model)
    assert {id: table.get(id) for _, id, _ in steps} == {id: model.get(id) for _, id, _ in steps}


def test_what_is_reserved_is_there_before_it_is_used() -> None:
    table = Parents()
    table.reserve(1000)
    keys = table._keys
    for id in range(2, 1002):
        table[id] = 1
    assert table._keys is keys
