"""Names of functions: what is the function's own in them, and what of them fits."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latrace.analysis.names import callers, fit_name, own_part, tidy
from latrace.analysis.words import cells

OWN = [
    ("epoll_wait", "epoll_wait"),
    ("do_softirq.part.0", "do_softirq.part.0"),
    ("uv__async_io.constprop.0.isra.0", "uv__async_io.constprop.0.isra.0"),
    ("net/http.(*conn).serve", "(*conn).serve"),
    ("net/http.HandlerFunc.ServeHTTP", "HandlerFunc.ServeHTTP"),
    ("github.com/user/pkg/v2.(*T[go.shape.int]).Do", "(*T[go.shape.int]).Do"),
    ("main.main.func2", "main.func2"),
    ("runtime.futex.abi0", "futex.abi0"),
    ("libz.so.1.2.13+0x4a44", "+0x4a44"),
    ("std::vector<int, std::allocator<int> >::push_back(int const&)", "push_back"),
    ("void v8::Function::Call<int>(char*)", "Call"),
    ("non-virtual thunk to node::(anonymous namespace)::Parser::OnRead(long)", "OnRead"),
    ("node::Wrap::Start()::{lambda(uv_stream_s*)#2}::_FUN(uv_stream_s*)", "_FUN"),
    ("node::Task::Run(std::unique_ptr<v8::Task>) [clone .part.0]", "Run"),
    ("app::worker::{{closure}}", "worker::{{closure}}"),
    ("<T as core::Trait>::method", "method"),
    ("void Service.contendOnce()", "contendOnce"),
    ("Lcom/foo/Bar;::method", "method"),
    ("cheapest /srv/service.js:4:11", "cheapest"),
    ("get size node:internal/map:3:4", "get size"),
    ("[unknown]", "[unknown]"),
    ("::", "::"),
    ("f(", "f"),
    ("(", "("),
    ("", ""),
]


@pytest.mark.parametrize(("name", "own"), OWN)
def test_the_part_that_is_the_function_s_own(name: str, own: str) -> None:
    start, end = own_part(name)
    assert name[start:end] == own


@pytest.mark.parametrize(
    ("name", "columns", "shown"),
    [
        ("net/http.(*conn).serve", 22, "net/http.(*conn).serve"),
        ("net/http.(*conn).serve", 21, "..(*conn).serve"),
        ("runtime.notetsleep_internal", 16, "..notetsleep_i.."),
        ("postgres+0x475299", 12, "p..+0x475299"),
        ("libjemalloc.so.2+0x39ad8", 18, "libjemal..+0x39ad8"),
        # The own part is in what remains: the namespace may stay.
        ("node::Start(int, char**)", 20, "node::Start(int, c.."),
        ("schedule_hrtimeout_range_clock", 12, "schedule_h.."),
    ],
)
def test_qualifiers_go_before_the_function_s_own_part(name: str, columns: int, shown: str) -> None:
    assert fit_name(name, columns) == shown


@given(st.text("ab.:/<>(){}[]* ~+0x", max_size=40) | st.text(max_size=40), st.integers(4, 30))
def test_any_name_has_a_part_of_its_own_and_is_cut_to_fit(name: str, columns: int) -> None:
    start, end = own_part(name)
    assert 0 <= start <= end <= len(name)
    assert start < end or not name
    assert cells(fit_name(name, columns)) <= columns


def test_no_name_takes_long() -> None:
    began = time.monotonic()
    for name in ("(" * 100_000, "a::" * 50_000, "<>" * 50_000, " a:1" * 30_000, "a+0x1" * 30_000):
        own_part(name)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("JS:*cheapest /srv/service.js:4:11", "cheapest /srv/service.js:4:11"),
        ("JS:~cheapest /srv/service.js:4:11", "cheapest /srv/service.js:4:11"),
        ("JS:^ /srv/service.js:16:34", "(anonymous) /srv/service.js:16:34"),
        ("LazyCompile:~foo file.js:12", "foo file.js:12"),
        ("Function:o*osr file.js:1:2", "osr file.js:1:2"),
        ("JS:open file.js:1:2", "open file.js:1:2"),
        ("Builtin:ArrayPrototypeSort", "Builtin:ArrayPrototypeSort"),
        ("void Service.run()", "void Service.run()"),
        ("JS:", "JS:"),
    ],
)
def test_a_function_of_javascript_is_one_whatever_compiled_it(symbol: str, name: str) -> None:
    assert tidy(symbol, jit=True) == name
    assert tidy(symbol, jit=False) == symbol


def test_the_ways_to_sleep_are_left_out_but_not_where_it_sleeps() -> None:
    slept = ["runtime.futex", "runtime.futexsleep", "runtime.notesleep", "runtime.stopm"]
    assert callers(slept) == ["runtime.futex", "runtime.stopm"]
    assert callers(slept[1:]) == ["runtime.futexsleep", "runtime.stopm"]
    assert callers([]) == []
