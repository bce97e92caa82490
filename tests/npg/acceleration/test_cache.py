"""The cache of programs: when a shape is traced, what is kept, and what is dropped."""

import gc
from functools import partial

import pytest

from npg.acceleration.cache import Cache


class Owner:
    def method(self):
        pass

    def other(self):
        pass


@pytest.fixture
def use():
    """Ask a cache for the program of a shape; counts traces."""

    def run(cache, owner, key, difference=""):
        def trace():
            traces.append(key)
            return str(key)

        return cache.use(owner, key, trace, lambda program: (program, difference))

    traces = run.traces = []
    return run


def test_the_first_shape_is_traced_at_once_and_another_at_the_third_in_a_row(use):
    cache, owner = Cache(), Owner()
    assert [use(cache, owner, key) for key in "aabbabbbb"] == ["a", "a", None, None, "a", None, None, "b", "b"]
    assert use.traces == ["a", "b"]


def test_the_first_shape_of_a_function_is_traced_when_it_comes_again(use):
    """One that is made for a single call has no trace."""
    cache = Cache()
    for make in (lambda: lambda: None, lambda: partial(print, 1)):
        del use.traces[:]
        assert [use(cache, make(), "a") for _ in range(40)] == [None] * 40
        assert use.traces == []
        function = make()
        assert [use(cache, function, key) for key in "aaabbb"] == [None, "a", "a", None, None, "b"]
        assert use.traces == ["a", "b"]
        assert use(Cache(every_shape=True), make(), "a") == "a"


def test_a_shape_among_others_is_traced_when_it_came_for_the_32nd_time(use):
    cache, owner = Cache(), Owner()
    served = [use(cache, owner, key) for _ in range(33) for key in "abc"]
    assert served[1::3] == [None] * 31 + ["b"] * 2
    assert use.traces == ["a", "b", "c"]


def test_an_eager_cache_traces_every_shape(use):
    cache, owner = Cache(every_shape=True), Owner()
    assert [use(cache, owner, key) for key in "aba"] == ["a", "b", "a"]


def test_what_is_wrong_again_and_again_has_few_traces(use):
    cache, owner = Cache(), Owner()
    for i in range(100):
        if i in (0, 1, 4, 11, 26, 57):
            with pytest.raises(RuntimeError, match="wrong"):
                use(cache, owner, "a", "wrong")
        else:
            assert use(cache, owner, "a", "wrong") is None
    assert len(use.traces) == 6
    assert cache.kept(owner) == []


def test_a_wrong_program_is_traced_anew_at_once_the_first_time(use):
    cache, owner = Cache(), Owner()
    use(cache, owner, "a")
    results = iter(["wrong", ""])
    assert cache.use(owner, "a", lambda: "new", lambda program: (program, next(results))) == "new"
    assert cache.kept(owner) == ["new"]


def test_eight_programs_and_64_counts_are_kept(use):
    cache, owner = Cache(every_shape=True), Owner()
    for key in range(100):
        use(cache, owner, key)
        use(cache, owner, 0)
    assert cache.kept(owner) == ["93", "94", "95", "96", "97", "98", "99", "0"]
    (history,) = cache._owners[owner].values()
    assert len(history.shapes) == 64


def test_methods_of_one_object_have_first_shapes_of_their_own(use):
    cache, owner = Cache(), Owner()
    assert [use(cache, m, "a") for m in (owner.method, owner.other, owner.method)] == ["a", "a", "a"]
    assert len(use.traces) == 2
    assert cache.kept(owner) == ["a", "a"]


def test_owners_are_not_kept_alive_and_what_cannot_be_referenced_has_no_program(use):
    cache, owner = Cache(), Owner()
    use(cache, owner, "a")
    del owner
    gc.collect()
    assert len(cache._owners) == 0
    assert use(cache, [], "a") is None
    assert use(cache, 1, "a") is None


def test_a_trace_that_confirms_the_program_before_does_not_count(use):
    cache, owner = Cache(str.__eq__), Owner()
    use(cache, owner, "a")
    for i in range(20):  # it is wrong, and a new trace gives the same, which is right
        results = iter(["wrong", ""])
        served = cache.use(owner, "a", lambda: "a", lambda program, results=results: (program, next(results)))
        assert served == "a", i
    results = iter(["wrong", ""])
    assert cache.use(owner, "a", lambda: "b", lambda program: (program, next(results))) == "b"  # another one counts
    assert use(cache, owner, "a", "wrong") is None


def test_without_a_rule_every_trace_counts(use):
    cache, owner = Cache(), Owner()
    use(cache, owner, "a")
    results = iter(["wrong", ""])
    assert cache.use(owner, "a", lambda: "a", lambda program: (program, next(results))) == "a"
    assert use(cache, owner, "a", "wrong") is None
