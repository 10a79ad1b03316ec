"""Another look at the same time: stacks picked, thinned, folded up or turned round.

No time comes or goes: whatever is asked for, the weights add up to what they did before.
"""

from __future__ import annotations

import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from types import FrameType
from typing import Final, TypeAlias

from latrace.analysis.frames import is_border, telling
from latrace.analysis.start_up import is_start_up
from latrace.flamegraphs.profile import CODE, NOT_ITEMISED, NOT_MATCHED, NOT_SAMPLED, Frame
from latrace.flamegraphs.text import visible

PATTERN_SECONDS: Final = 5.0
"""How long a pattern may take for all names: it can be such that it never ends."""
_NAME_LIMIT: Final = 400  # of a name; beyond, its middle is cut out, as in the picture

HIDDEN: Final = Frame("[hidden]", "marker")
"""Stands for a stack all of whose frames were hidden."""

_PROGRAM: Final = CODE - {"kernel"}
_KEPT: Final = frozenset((NOT_SAMPLED, NOT_ITEMISED, NOT_MATCHED))

_GO: Final = (
    r"runtime\.(goexit[01]?|main|mcall|systemstack(_switch)?|asmcgocall|mstart[01]?|rt0_go|gogo"
    r"|clone|park_m|schedule|mPark|execute|gopark|goparkunlock|startlockedm|stoplockedm"
    r"|gosched_m|goschedImpl|gopreempt_m|goready|ready|exitsyscall0?|startm|wakep|handoffp"
    r"|notesleep|notetsleep(_internal|g)?|notewakeup|futexsleep|futexwakeup)(\.abi\w+)?"
    r"|_rt0_\w+"
)
_NODE: Final = (
    r"(Builtins_|Builtin:)?(JSEntry|JSEntryTrampoline|JSConstructEntry|JSRunMicrotasksEntry"
    r"|InterpreterEntryTrampoline|ArgumentsAdaptorTrampoline|BaselineOutOfLinePrologue|CEntry_\w+"
    r"|Call(Function)?_Receiver\w+|CallFunction_\w+|CallApiCallback|HandleApiCall|RunMicrotasks"
    r"|PromiseFulfillReactionJob|AsyncFunctionAwait\w+|JSConstructStubGeneric)"
    r"|v8::Function::Call|v8::internal::Execution::\w+|v8::internal::Builtin_HandleApiCall"
    r"|(\S+ )?v8::internal::\(anonymous namespace\)::HandleApiCallHelper(<\w+>)?"
    r"|v8::internal::FunctionCallbackArguments::Call"
    r"|v8::internal::MicrotaskQueue::(PerformCheckpoint|RunMicrotasks)"
    r"|v8::internal::\(anonymous namespace\)::Invoke(WithTryCatch)?"
    r"|node::(Start|LoadEnvironment|StartExecution|InternalMakeCallback|MakeCallback"
    r"|SpinEventLoop(Internal)?|NodeMainInstance::Run|AsyncWrap::MakeCallback"
    r"|InternalCallbackScope::Close)"
    r"|uv_run|uv__io_poll|uv__run_\w+"
)
_CPYTHON: Final = (
    r"_?PyEval_\w+|_PyFunction_\w+|_?PyObject_(Fast)?(Vector|Make(Tp)?)?Call\w*|_PyVectorcall_Call"
    r"|PyVectorcall_Call|method_vectorcall|vectorcall_(method|maybe)|slot_tp_call|object_vacall"
    r"|cfunction_(vectorcall|call)\w*|method_vectorcall_\w+|function_code_fastcall|call_function"
    r"|do_call_core|py_trampoline_evaluator|run_(mod|eval_code_obj)|_?PyRun_\w+|pyrun_\w+"
    r"|pymain_\w+|Py_RunMain|Py_BytesMain|Py_Main"
)
# A name may carry its parameters, the compiler's `.cold` and the like, or a version.
_INTERNAL: Final = re.compile(rf"({_GO}|{_NODE}|{_CPYTHON})(\(.*|\.(cold|lto|isra|part|const).*)?")

# How the kernel wakes a thread, whatever for.
_WAKING: Final = re.compile(
    r"try_to_wake_up|wake_up_(process|state|q)|(__)?wake_up(_common|_sync|_locked)?(_key|_lock)?"
    r"|(default|autoremove|ep_autoremove|woken)_wake_function"
)

_Stack: TypeAlias = tuple[Frame, ...]


class BadPatternError(ValueError):
    """A text is no regular expression; the message says where it goes wrong."""


class SlowPatternError(Exception):
    """A regular expression takes too long; `pattern` is the one."""

    def __init__(self, pattern: str) -> None:
        super().__init__(f"the pattern '{pattern}' took over {PATTERN_SECONDS:g} s")
        self.pattern = pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What to do to the stacks; in this order.

    `only`: what has no frame that one of these regular expressions finds becomes
    `[not matched]`. `hide`: frames that one of them finds are left out. `collapse`: see
    `collapsed`. `reverse`: the leaf becomes the root. Raises BadPatternError when it is made.
    """

    only: Sequence[str] = ()
    hide: Sequence[str] = ()
    collapse: bool = False
    reverse: bool = False
    _only: list[re.Pattern[str]] = field(init=False, repr=False, compare=False)
    _hide: list[re.Pattern[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_only", [_compiled(pattern) for pattern in self.only])
        object.__setattr__(self, "_hide", [_compiled(pattern) for pattern in self.hide])

    def facts(self) -> list[tuple[str, str]]:
        """What was done, for the reader of a picture."""
        told = [("only", pattern) for pattern in self.only]
        told += [("hidden", pattern) for pattern in self.hide]
        ways = [(self.collapse, "collapsed"), (self.reverse, "leaf first")]
        done = ", ".join(way for on, way in ways if on)
        return [*told, ("stacks", done)] if done else told

    def of(
        self, stacks: Mapping[_Stack, int], *, outermost_last: bool = False
    ) -> dict[_Stack, int]:
        """Return the stacks so shaped, equal ones added up.

        `outermost_last`: the stacks are a waker's, from its innermost function out. Raises
        SlowPatternError.
        """
        if self._only:
            stacks = _picked(stacks, found(self._only, chain.from_iterable(stacks)))
        if self._hide:
            hidden = found(self._hide, chain.from_iterable(stacks)) - _KEPT
            stacks = _mapped(stacks, lambda stack: _without(stack, hidden))
        if self.collapse:
            stacks = _mapped(stacks, lambda stack: collapsed(stack, outermost_last=outermost_last))
        if self.reverse:
            stacks = _mapped(stacks, lambda stack: stack[::-1])
        return dict(stacks)


def _mapped(stacks: Mapping[_Stack, int], change: Callable[[_Stack], _Stack]) -> dict[_Stack, int]:
    sums: dict[_Stack, int] = {}
    for stack, weight in stacks.items():
        changed = change(stack)
        sums[changed] = sums.get(changed, 0) + weight
    return sums


# --- by name ------------------------------------------------------------------------------------


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may mean something else one day
            return re.compile(pattern)
    except re.error as error:
        raise BadPatternError(str(error)) from error
    except (OverflowError, RecursionError) as error:
        raise BadPatternError("it is too large") from error


def found(patterns: Sequence[re.Pattern[str]], frames: Iterable[Frame]) -> set[Frame]:
    """Return the frames in whose name, as it is shown, one of the patterns is found.

    Each name is looked at once. Raises SlowPatternError after `PATTERN_SECONDS` of one, if in the
    main thread: nowhere else can a match be interrupted.
    """
    distinct = set(frames)
    names = {frame.name: visible(frame.name, limit=_NAME_LIMIT) for frame in distinct}
    matching: set[str] = set()
    for pattern in patterns:
        with _time_limit(PATTERN_SECONDS, pattern.pattern):
            matching.update(name for name, shown in names.items() if pattern.search(shown))
    return {frame for frame in distinct if frame.name in matching}


@contextmanager
def _time_limit(seconds: float, pattern: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise SlowPatternError(pattern)

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)


def _picked(stacks: Mapping[_Stack, int], matching: set[Frame]) -> dict[_Stack, int]:
    """Keep the stacks with a matching frame, and the time of which no stack is known."""
    return _mapped(
        stacks,
        lambda stack: (
            stack
            if not matching.isdisjoint(stack) or not _KEPT.isdisjoint(stack)
            else (NOT_MATCHED,)
        ),
    )


def _without(stack: _Stack, hidden: set[Frame]) -> _Stack:
    return tuple(frame for frame in stack if frame not in hidden) or (HIDDEN,)


# --- what repeats, and what every program of a runtime has --------------------------------------


def collapsed(stack: _Stack, *, outermost_last: bool = False) -> _Stack:
    """Return a stack without its runtime's frames and without what only repeats.

    Left out: the start-up of glibc and musl at the outer end; of Go its scheduler and entry frames
    (but for `findRunnable` and `stopm`, which tell that a thread had nothing to do), of Node.js
    those of V8 and libuv, of CPython those of its evaluation loop, wherever they are; of the
    kernel, the ways into it, to its scheduler and to the thread that it wakes. Then `f f f` becomes
    `f`, and `f g f g` becomes `f g`. A program keeps its innermost function whatever that is, and
    the kernel at least one.
    """
    if outermost_last:
        return collapsed(stack[::-1])[::-1]
    last = max((i for i, frame in enumerate(stack) if frame.kind in _PROGRAM), default=-1)
    routine = _routine(stack)
    kept: list[Frame] = []
    starting = True
    for i, frame in enumerate(stack):
        if i in routine:
            continue
        if frame.kind in _PROGRAM:
            begins = starting and is_start_up(frame.name)
            if i != last and (begins or _INTERNAL.fullmatch(frame.name)):
                continue
            starting = False
        if frame.kind in CODE:
            if kept[-1:] == [frame]:
                continue
            if len(kept) > 2 and kept[-2] == frame and kept[-3] == kept[-1] and _code(kept[-1]):
                kept.pop()
                continue
        kept.append(frame)
    return tuple(kept)


def _routine(stack: _Stack) -> set[int]:
    """Return where the kernel's frames are that tell nothing of what it did for the program."""
    kernel = [i for i, frame in enumerate(stack) if frame.kind == "kernel"]
    told = [i for i in kernel if telling([stack[i].name])]
    while len(told) > 1 and _WAKING.fullmatch(stack[told[-1]].name):
        told.pop()
    while len(told) > 1 and is_border(stack[told[0]].name):
        told.pop(0)
    return set(kernel).difference(told) if told else set()


def _code(frame: Frame) -> bool:
    return frame.kind in CODE
