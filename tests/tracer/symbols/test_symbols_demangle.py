"""Readable names, from known pairs, from compilers at hand, and from rubbish."""

from __future__ import annotations

import re
import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symbols_tools import build, need

from latrace.tracer.symbols.demangle import Demangler
from latrace.tracer.symbols.frames import NAME_LIMIT
from latrace.tracer.symbols.rust import OUTPUT_LIMIT, demangle_rust

# Pairs written down by running rustc 1.95 and reading what rustc-demangle and c++filt make of it.
RUST = [
    ("_ZN4test1a2bcE", None),
    ("_ZN1r5apply17h14f6e506fa0c996bE", "r::apply"),
    ("_ZN1r5apply17h14f6e506fa0c996bE.llvm.1234567890", "r::apply"),
    ("_ZN1r5apply17h14f6e506fa0c996bE.cold", "r::apply.cold"),
    ("_ZN5alloc6string6String17he04e7a15dd72b27fE.3933", "alloc::string::String"),
    (
        "_ZN3std2rt10lang_start28_$u7b$$u7b$closure$u7d$$u7d$17ha86af84d9cc65291E",
        "std::rt::lang_start::{{closure}}",
    ),
    (
        "_ZN89_$LT$aho_corasick..nfa..contiguous..NFA$u20$as$u20$aho_corasick..automaton.."
        "Automaton$GT$8is_match17h26dcc31d0e37e202E",
        "<aho_corasick::nfa::contiguous::NFA as aho_corasick::automaton::Automaton>::is_match",
    ),
    ("_RNvC6_123foo3bar", "123foo::bar"),
    ("_RNqCs4fqI2P2rA04_11utf8_identsu30____7hkackfecea1cbdathfdh9hlq6y",
     "utf8_idents::საჭმელად_გემრიელი_სადილი"),
    ("_RNCNCNgCs6DXkGYLi8lr_2cc5spawn00B5_", "cc::spawn::{closure#0}::{closure#0}"),
    ("_RINvCs6GmmlP4bgsG_1r5applyNCNvB2_4main0EB2_", "r::apply::<r::main::{closure#0}>"),
    ("_RNvXs13_NtCseQVuubCcFDg_12simd_adler324hashAhj41_NtB8_11Adler32Hash4hash",
     "<[u8; 65] as simd_adler32::Adler32Hash>::hash"),
    ("_RNvMNtCs1234_7mycrate3fooNtB2_3Foo3new", "<mycrate::foo::Foo>::new"),
    ("_RINvC1a1fFUKCEuE", 'a::f::<unsafe extern "C" fn()>'),
    ("_RINvC1a1fDNtC1b1Tp4ItemhEL_E", "a::f::<dyn b::T<Item = u8>>"),
    ("_RINvC1a1fFG_RL0_hEuE", "a::f::<for<'a> fn(&'a u8)>"),
    ("_RINvC1a1fTQhPjOSlEKb1_Kc41_Kin2a_E",
     "a::f::<(&mut u8, *const usize, *mut [i32]), true, 'A', -42>"),
    ("_RNvC1a1b.llvm.123", "a::b"),
    ("_RNvC1a1b.cold", "a::b.cold"),
    ("_RNv", None),
    ("_RNvC1a1bX", None),
    ("_R", None),
    ("main", None),
]  # fmt: skip


@pytest.mark.parametrize(("mangled", "readable"), RUST)
def test_rust_names(mangled, readable):
    assert demangle_rust(mangled) == readable


CXX = [
    (b"_Z1fi", b"f(int)"),
    (b"_ZN2v88internal4Heap14CollectGarbageENS0_15AllocationSpaceE",
     b"v8::internal::Heap::CollectGarbage(v8::internal::AllocationSpace)"),
    (b"_ZNSt6vectorIiSaIiEE9push_backERKi",
     b"std::vector<int, std::allocator<int> >::push_back(int const&)"),
    (b"_Z3fooILi3EEvv.cold", b"void foo<3>() [clone .cold]"),
    (b"_Z1fi@plt", b"f(int)@plt"),
    (b"_Znotaname", b"_Znotaname"),
    (b"_ZN1r5apply17h14f6e506fa0c996bE", b"r::apply"),
    (b"plain", b"plain"),
    (b"", b""),
]  # fmt: skip


@pytest.mark.parametrize(("mangled", "readable"), CXX)
def test_the_worker_s_demangler_takes_both_languages(mangled, readable):
    assert Demangler()(mangled) == readable


@settings(deadline=None)
@given(st.text(alphabet="_RNvCIMXYTBKLEsuGDFASPQO0123456789abjp", max_size=80))
def test_no_rust_like_name_escapes(body):
    for name in ("_R" + body, "_ZN" + body + "17h0123456789abcdefE"):
        readable = demangle_rust(name)
        assert readable is None or len(readable) <= max(OUTPUT_LIMIT, len(name)) + 64


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_no_bytes_escape_the_demangler(body):
    demangler = Demangler()
    for name in (b"_Z" + body, b"_R" + body, body):
        assert len(demangler(name)) <= max(NAME_LIMIT, len(name)) + 8


def test_a_short_name_cannot_describe_an_endless_one():
    """Each tuple holds the one before it twice: 2**30 types in 200 characters."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

    def backref(target: int) -> str:
        number, text = target - 1, ""
        while number >= 0:
            text, number = digits[number % 62] + text, number // 62 - (number < 62)
        return f"B{text}_"

    body = "INvC1a1fTuuE"
    previous = body.index("T")
    for _ in range(30):
        here = len(body)
        body += "T" + backref(previous) * 2 + "E"
        previous = here
    began = time.process_time()
    assert demangle_rust("_R" + body + "E") is None
    assert time.process_time() - began < 30


def test_a_long_name_takes_time_in_proportion():
    name = "_ZN" + "1" * 4090
    began = time.process_time()
    for _ in range(100):
        assert demangle_rust(name) is None
    assert time.process_time() - began < 1


def test_deep_nesting_ends():
    assert demangle_rust("_RINvC1a1f" + "R" * 100_000 + "uE") is None
    assert demangle_rust("_R" + "NvC1a1b" * 50_000) is None


CXX_SOURCE = """
#include <map>
#include <string>
#include <vector>
namespace outer { namespace {
template <typename T, int N> struct Box {
    T value;
    __attribute__((noinline)) Box operator+(const Box &b) const { return {value + b.value}; }
}; }
__attribute__((noinline)) int use(std::map<std::string, std::vector<int>> m, int (*f)(char)) {
    auto lambda = [&](int x) __attribute__((noinline)) { return x + f('a') + (int)m.size(); };
    return lambda((Box<int, 3>{1} + Box<int, 3>{2}).value);
} }
int main(int argc, char **argv) {
    return outer::use({{argv[0], {argc}}}, [](char c) -> int { return c; });
}
"""


def nm_names(path) -> list[str]:
    out = subprocess.run([need("nm"), str(path)], check=True, capture_output=True, text=True)
    return sorted({line.split()[-1] for line in out.stdout.splitlines()
                   if line.split()[-2] in "tTwW"})  # fmt: skip


def filt(names: list[str]) -> list[str]:
    text = "\n".join(names) + "\n"
    out = subprocess.run([need("c++filt")], input=text, capture_output=True, text=True, check=True)
    return out.stdout.splitlines()


def test_a_compiled_cxx_program_agrees_with_cxxfilt(tmp_path):
    source = tmp_path / "program.cc"
    source.write_text(CXX_SOURCE)
    names = nm_names(build(source, tmp_path / "program", compiler="g++"))
    names = [name for name in names if name.startswith("_Z")]
    assert len(names) > 10
    demangler = Demangler()
    assert [demangler(name.encode()).decode() for name in names] == filt(names)


RUST_SOURCE = """
use std::collections::HashMap;
use std::fmt::Debug;
trait Shape<T> { fn area(&self, t: T) -> f64; }
struct Square<const N: usize>(f64);
impl<const N: usize> Shape<&str> for Square<N> {
    #[inline(never)] fn area(&self, t: &str) -> f64 { self.0 * self.0 + (t.len() + N) as f64 }
}
#[inline(never)] fn apply<F: Fn(i32) -> i32>(f: F, x: i32) -> i32 { f(x) }
#[inline(never)] fn dynamic(v: &dyn Fn(&mut [u8; 3]) -> Option<Box<dyn Debug + Send>>) -> bool {
    v(&mut [1, 2, 3]).is_some()
}
fn main() {
    let mut m: HashMap<String, Vec<(u8,)>> = HashMap::new();
    m.insert("a".into(), vec![(1,)]);
    let k = std::env::args().count() as i32;
    let area = Square::<7>(1.0).area("x");
    println!("{:?} {} {} {}", m, area, apply(|x| x + k, 3), dynamic(&|_| None));
}
"""


def test_a_compiled_rust_program_agrees_with_cxxfilt(tmp_path):
    source = tmp_path / "program.rs"
    source.write_text(RUST_SOURCE)
    program = tmp_path / "program"
    command = [need("rustc"), "-O", "-Csymbol-mangling-version=v0", "-o", str(program), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    names = [name for name in nm_names(program) if re.match("_R|_ZN.*17h[0-9a-f]{16}E", name)]
    assert len(names) > 100
    expected = [
        # c++filt keeps what changes with each build, and the types of constants.
        re.sub(r"(\d|true|false): (usize|bool)\b", r"\1",
               re.sub(r"::h[0-9a-f]{16}$|\[[0-9a-f]{4,16}\]", "", name))
        for name in filt(names)
    ]  # fmt: skip
    assert [demangle_rust(name) for name in names] == expected
