"""Short names: what demanglers, DWARF and Go's linker write, and what of it tells the function."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latrace.flamegraphs.short import short_name

CXX = [
    ("main", "main"),
    ("foo(int)", "foo"),
    ("std::vector<int, std::allocator<int> >::push_back(int const&)", "std::vector::push_back"),
    ("void std::sort<int*>(int*, int*)", "std::sort"),
    (
        "std::basic_ostream<char, std::char_traits<char> >& std::operator<< <std::char_tr"
        "aits<char> >(std::basic_ostream<char, std::char_traits<char> >&, char const*)",
        "std::operator<<",
    ),
    ("bool std::operator< <int>(A<int> const&, A<int> const&)", "std::operator<"),
    ("Foo::operator()(int) const", "Foo::operator()"),
    ("Foo<int>::operator->() const", "Foo::operator->"),
    ("Foo::operator->*(int)", "Foo::operator->*"),
    ("Foo::operator bool() const", "Foo::operator bool"),
    ("Foo::operator std::vector<int, std::allocator<int> >() const", "Foo::operator std::vector"),
    ("Foo::operator void (*)(int)() const", "Foo::operator void (*)(int)"),
    ("operator new(unsigned long)", "operator new"),
    ("operator new[](unsigned long, std::nothrow_t const&)", "operator new[]"),
    ("operator new(unsigned long)@plt", "operator new@plt"),
    ("operator delete(void*)", "operator delete"),
    ("(anonymous namespace)::helper(int)", "(anonymous namespace)::helper"),
    ("ns::(anonymous namespace)::T<int>::f(int) const &", "ns::(anonymous namespace)::T::f"),
    ("main::{lambda(int)#1}::operator()(int) const", "main::{lambda#1}::operator()"),
    ("foo(int)::{lambda()#1}::operator()() const", "foo::{lambda#1}::operator()"),
    (
        "Foo::bar(int) const::{lambda(auto:1)#2}::operator()<int>(int) const",
        "Foo::bar::{lambda#2}::operator()",
    ),
    ("void (*foo<int>(int))(double)", "foo"),
    ("void (*Foo::get(int) const)(char)", "Foo::get"),
    ("int (Foo::*ns::member(int))(char) const", "ns::member"),
    ("decltype(auto) f<int>(int)", "f"),
    ("decltype ((forward<int>)((declval<int>)())) ns::f<int>(int)", "ns::f"),
    ("std::enable_if<(1)>(0), int>::type f<int>(int)", "f"),
    ("std::enable_if<((1)>(0)), int>::type ns::f<int>(int)", "ns::f"),
    ("foo(int) [clone .cold]", "foo"),
    ("foo(int) [clone .isra.0] [clone .cold]", "foo"),
    (
        "std::__cxx11::basic_string<char, std::char_traits<char>, std::allocator<char> >:"
        ":_M_create[abi:cxx11](unsigned long&, unsigned long)",
        "std::__cxx11::basic_string::_M_create",
    ),
    ("non-virtual thunk to Foo<int>::bar(int)", "non-virtual thunk to Foo::bar"),
    ("std::function<void (int)>::operator()(int) const", "std::function::operator()"),
    (
        "std::_Function_handler<void (int), main::{lambda(int)#1}>::_M_invoke(std::_Any_d"
        "ata const&, int&&)",
        "std::_Function_handler::_M_invoke",
    ),
    (
        "std::integral_constant<bool, (A<B>::value)&&(C<D>::value)>::operator bool() const",
        "std::integral_constant::operator bool",
    ),
    ("Foo<&(Bar::baz(int))>::f()", "Foo::f"),
    ("Foo<&operator< >::f()", "Foo::f"),
    ("auto f<int>(int)", "f"),
    ('unsigned long long operator"" _kb(unsigned long long)', 'operator"" _kb'),
    ("A::B::~B()", "A::B::~B"),
    ("Foo::operator=(Foo&&) &", "Foo::operator="),
    ("f(void (*)(int), int (&)[3])", "f"),
    ("my_operator(int)", "my_operator"),
    ("operatorx::f(int)", "operatorx::f"),
    (
        "std::__unguarded_linear_insert<__gnu_cxx::__normal_iterator<std::__cxx11::basic_"
        "string<char>*, std::vector<std::__cxx11::basic_string<char> > >, __gnu_cxx::__op"
        "s::_Val_comp_iter<main(int, char**)::<lambda(const auto:1&, const auto:2&)> > >",
        "std::__unguarded_linear_insert",
    ),
    ("main::<lambda(int)>::operator()", "main::{lambda}::operator()"),
    ("<lambda(int)>::operator()", "{lambda}::operator()"),
    ("auto std::operator<=><int>(A<int> const&, A<int> const&)", "std::operator<=>"),
    ("Foo::operator co_await()", "Foo::operator co_await"),
    (
        "v8::internal::(anonymous namespace)::Invoke(v8::internal::Isolate*, v8::internal"
        "::(anonymous namespace)::InvokeParams const&)",
        "v8::internal::(anonymous namespace)::Invoke",
    ),
    ("f(int) requires C<int>", "f"),
    ("operator/(int, int)", "operator/"),
]

RUST = [
    ("alloc::vec::Vec<T,A>::push", "alloc::vec::Vec::push"),
    ("<alloc::vec::Vec<T> as core::ops::drop::Drop>::drop", "alloc::vec::Vec::drop"),
    ("<&T as core::fmt::Debug>::fmt", "T::fmt"),
    (
        "core::ptr::drop_in_place<alloc::vec::Vec<alloc::string::String>>",
        "core::ptr::drop_in_place",
    ),
    ("core::slice::<impl [T]>::iter", "core::slice::iter"),
    ("core::str::<impl str>::len", "core::str::len"),
    ("<impl core::fmt::Display for foo::Bar<T>>::fmt", "foo::Bar::fmt"),
    ("alloc::fmt::num::<impl core::fmt::Display for u32>::fmt", "u32::fmt"),
    ("foo::main::{{closure}}", "foo::main::{{closure}}"),
    ("foo::main::{closure#0}", "foo::main::{closure#0}"),
    ("foo::bar::<i32, alloc::vec::Vec<u8>>", "foo::bar"),
    ("foo::bar::<i32>::{closure#0}::<u8>", "foo::bar::{closure#0}"),
    ("<foo::Bar<u8>>::new", "foo::Bar::new"),
    (
        "<dyn core::any::Any + core::marker::Send as core::fmt::Debug>::fmt",
        "dyn core::any::Any + core::marker::Send::fmt",
    ),
    (
        "<fn(&u8) -> i32 as core::ops::function::FnOnce<(&u8,)>>::call_once",
        "fn(&u8) -> i32::call_once",
    ),
    ("<<foo::A<B> as X>::Out as Y<Z>>::go", "foo::A::Out::go"),
    ("<(A, B<C>) as T>::f", "(A, B)::f"),
    (
        "core::ops::function::FnOnce::call_once{{vtable.shim}}",
        "core::ops::function::FnOnce::call_once{{vtable.shim}}",
    ),
    (
        "<core::iter::adapters::map::Map<I,F> as core::iter::traits::iterator::Iterator>:"
        ":fold::{{closure}}",
        "core::iter::adapters::map::Map::fold::{{closure}}",
    ),
    ("<r::Foo<alloc::string::String> as r::Tr>::go", "r::Foo::go"),
    ("std::thread::local::LocalKey<T>::with", "std::thread::local::LocalKey::with"),
]

GO = [
    ("github.com/x/y/z.(*T).M", "z.(*T).M"),
    ("net/http.(*conn).serve", "http.(*conn).serve"),
    ("runtime.goexit", "runtime.goexit"),
    ("main.main.func1", "main.main.func1"),
    ("main.(*T).Get", "main.(*T).Get"),
    ("github.com/go-chi/chi/v5.(*Mux).ServeHTTP", "chi.(*Mux).ServeHTTP"),
    ("gopkg.in/yaml%2ev2.(*parser).parse", "yaml.v2.(*parser).parse"),
    ("github.com/x/y.Map[go.shape.int,github.com/a/b.T]", "y.Map[...]"),
    ("golang.org/x/exp/slices.pdqsortOrdered[...]", "slices.pdqsortOrdered[...]"),
    ("main.(*Set[go.shape.string]).Add", "main.(*Set[...]).Add"),
    ("type..eq.github.com/x/y.T", "type..eq.y.T"),
    ("vendor/golang.org/x/net/http2/hpack.(*Encoder).WriteField", "hpack.(*Encoder).WriteField"),
    (
        "go.(*struct { sync.Mutex; math/big.table [64]math/big.Word }).Lock",
        "go.(*struct { sync.Mutex; math/big.table [64]math/big.Word }).Lock",
    ),
]

AS_THEY_ARE = ["", "<", "()", "(", "<>", "operator", "operator<", "foo<", " ", "<unknown>", "a b"]


@pytest.mark.parametrize(("name", "short"), [*CXX, *RUST, *GO])
def test_what_a_function_is_called(name: str, short: str) -> None:
    assert short_name(name) == short


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_what_is_no_such_name_stays(name: str) -> None:
    assert short_name(name) == name


def names_in(library: Path) -> set[str]:
    """The functions of a library, as binutils demangles them."""
    if shutil.which("nm") is None or not library.exists():
        pytest.skip(f"needs nm and {library}")
    command = ["nm", "-DC", "--without-symbol-versions", "--defined-only", str(library)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in out.splitlines())
    return {row[2] for row in rows if len(row) == 3 and row[1] in "TtWw"}


def test_names_of_the_cxx_library_are_plain_then() -> None:
    """What is left has no brackets but those of operators."""
    library = Path("/usr/lib/x86_64-linux-gnu/libstdc++.so.6")
    names = names_in(library)
    assert len(names) > 3000
    operator = re.compile(r"operator( .+|<=>|->|<<=?|>>=?|<=?|>=?|\(\)|[^\w ]{1,2})?$")
    for name in names:
        short = short_name(name)
        bare = operator.sub("", re.sub(r"^.* (thunk to|for) ", "", short))
        bare = bare.replace("(anonymous namespace)", "")
        assert not set("<>() ") & set(bare), (name, short)
        assert short.rpartition("::")[2].lstrip("~")[:8] in name
        assert short_name(short) == short, name


PIECES = [
    *("operator", "<", ">", "(", ")", "::", " const", " as ", "impl ", " for ", "{", "}", "[", "]"),
    *("a", "B", "*", "&", "->", " ", "/", ".", "lambda", "%2e", "@plt", ","),
]


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from(PIECES),
            max_size=30,
        ).map("".join),
    )
)
def test_whatever_it_is_a_name_comes_out(name: str) -> None:
    short = short_name(name)
    assert short.strip() or not name.strip()
    assert len(short) <= len(name) + len("{lambda}")


@pytest.mark.parametrize(
    "piece",
    [
        *("<", "(", "<(", "{", "operator", "operator<", "a<", "(*", "::<", "<impl ", "<a as "),
        *("lambda(", " const", "f()::", "f( const", "&", "<a<b as c> as ", "operator (", "a/"),
        *("type..eq.", "[", "T::*", "(T::*", "<impl for "),
    ],
)
def test_the_longest_names_take_no_time(piece: str) -> None:
    name = (piece * 4096)[:4096]
    began = time.process_time()
    for text in (name, "f(" + name, name + ">", "x" + name + ")", "<" + name + ">::f"):
        short_name(text)
    assert time.process_time() - began < 1
