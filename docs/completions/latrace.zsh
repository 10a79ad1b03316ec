#compdef latrace
# Written by scripts/docs from the command line itself.
local context state state_descr line
typeset -A opt_args
local -a verbs
verbs=(
    'attach:Trace processes until Ctrl-C, a duration or their end'
    'run:Start a program and trace it from its first instruction'
    'watch:Capture a spike of P99 by itself, with the seconds before it'
    'trigger:Make a running watch keep these seconds, with a reason'
    'spikes:List what a watch has captured\: when, how bad, and why'
    'tcp:Show TCP retransmits as they happen, then by connection'
    'flame:Draw where the threads waited, and for whom, as a flame graph'
    'report:Tell why the threads waited\: in words, as JSON or as a page'
    'diff:Compare two captures, and tell which differences are noise'
    'doctor:Try what tracing needs, and say what to do where it fails'
    'demo:Trace a real victim and a real culprit, and explain what is seen'
)
_arguments -C \
    ''--version'[Print the version.]' \
    '(-h --help)'{-h,--help}'[Show the help.]' \
    '1:command:{_describe command verbs}' \
    '*::argument:->verb'
[[ $state == verb ]] || return
case $line[1] in
    attach)
        _arguments -s \
            '(-p --pid)'{-p,--pid}'[Processes\: all their threads, present and future.]:PID\[,PID\]:_pids' \
            '(-t --tid)'{-t,--tid}'[Single threads.]:TID\[,TID\]:_pids' \
            ''--comm'[Processes by name; a trailing * is a prefix.]:NAME\[,NAME\]: ' \
            ''--cgroup'[All processes of a cgroup, present and future\: its directory, or its path in the cpu (v1) or unified (v2) hierarchy. May be repeated.]:PATH:_files -/' \
            ''--children'[Also all descendants alive now, and all forked later.]' \
            '(-d --duration)'{-d,--duration}'[Stop after this long\: 30s, 5m; a bare number is seconds.]:TIME: ' \
            '(-o --output)'{-o,--output}'[Where the capture goes. Without it\: latrace.data; an earlier one is moved to latrace.data.old.]:DIR:_files -/' \
            '(-f --force)'{-f,--force}'[Replace an output that exists.]' \
            ''--min'[Record only waits of at least this in detail; 0 records all and never adapts. Without it\: all, until there are too many. Counts and percentiles are exact anyway.]:TIME: ' \
            ''--slow'[A wait of at least this gets its stack.]:TIME: ' \
            ''--no-stacks'[Take no stacks\: cheaper, no flame graph.]' \
            ''--no-user-stack-copy'[Never read the memory of the targets'\'' stacks\: less of them is seen where code has no frame pointers.]' \
            ''--stack-budget'[Take at most so many stacks per second.]:N: ' \
            ''--cpu-samples'[See what the targets do on the CPU, so many times a second on each; 0\: never.]:HZ: ' \
            ''--without'[Leave out, to be cheaper\: causes (why a wait was long), culprits (who had the CPU then), interrupts (they count as the thread'\''s that they came in), sleeps (sleep calls).]:PART\[,PART\]: ' \
            ''--ring-size'[Buffer between kernel and latrace, a power of two. Without it\: 16M; with --min 0\: 64M.]:SIZE: ' \
            ''--json'[Print the report as JSON, for machines.]' \
            '(-v --verbose)'{-v,--verbose}'[Say more on the way.]' \
            '(-q --quiet)'{-q,--quiet}'[Say nothing on the way but warnings.]' \
            '(-h --help)'{-h,--help}'[Show the help.]'
        ;;
    run)
        _arguments -s \
            ''--children'[Also all descendants alive now, and all forked later.]' \
            '(-d --duration)'{-d,--duration}'[Stop after this long\: 30s, 5m; a bare number is seconds.]:TIME: ' \
            '(-o --output)'{-o,--output}'[Where the capture goes. Without it\: latrace.data; an earlier one is moved to latrace.data.old.]:DIR:_files -/' \
            '(-f --force)'{-f,--force}'[Replace an output that exists.]' \
            ''--min'[Record only waits of at least this in detail; 0 records all and never adapts. Without it\: all, until there are too many. Counts and percentiles are exact anyway.]:TIME: ' \
            ''--slow'[A wait of at least this gets its stack.]:TIME: ' \
            ''--no-stacks'[Take no stacks\: cheaper, no flame graph.]' \
            ''--no-user-stack-copy'[Never read the memory of the targets'\'' stacks\: less of them is seen where code has no frame pointers.]' \
            ''--stack-budget'[Take at most so many stacks per second.]:N: ' \
            ''--cpu-samples'[See what the targets do on the CPU, so many times a second on each; 0\: never.]:HZ: ' \
            ''--without'[Leave out, to be cheaper\: causes (why a wait was long), culprits (who had the CPU then), interrupts (they count as the thread'\''s that they came in), sleeps (sleep calls).]:PART\[,PART\]: ' \
            ''--ring-size'[Buffer between kernel and latrace, a power of two. Without it\: 16M; with --min 0\: 64M.]:SIZE: ' \
            ''--json'[Print the report as JSON, for machines.]' \
            '(-v --verbose)'{-v,--verbose}'[Say more on the way.]' \
            '(-q --quiet)'{-q,--quiet}'[Say nothing on the way but warnings.]' \
            '(-h --help)'{-h,--help}'[Show the help.]' \
            '*::command:_normal'
        ;;
    watch)
        _arguments -s \
            '(-p --pid)'{-p,--pid}'[Processes\: all their threads, present and future.]:PID\[,PID\]:_pids' \
            '(-t --tid)'{-t,--tid}'[Single threads.]:TID\[,TID\]:_pids' \
            ''--comm'[Processes by name; a trailing * is a prefix.]:NAME\[,NAME\]: ' \
            ''--cgroup'[All processes of a cgroup, present and future\: its directory, or its path in the cpu (v1) or unified (v2) hierarchy. May be repeated.]:PATH:_files -/' \
            ''--children'[Also all descendants alive now, and all forked later.]' \
            ''--p50'[Fire when the median is above this.]:\[sleep=\]TIME: ' \
            ''--p90'[The same of the 90th percentile.]:\[sleep=\]TIME: ' \
            ''--p95'[The same of the 95th.]:\[sleep=\]TIME: ' \
            ''--p99'[The same of the 99th\: 10ms is of waits for a CPU, sleep=10ms of how late sleep calls came back. Every rule may be given more than once.]:\[sleep=\]TIME: ' \
            ''--p999'[The same of the 99.9th.]:\[sleep=\]TIME: ' \
            ''--p99-ratio'[Fire when the P99 is N times what is usual here. Without any rule\: 3.]:\[sleep=\]N: ' \
            ''--floor'[With --p99-ratio\: below this is no spike.]:TIME: ' \
            ''--max'[Fire when a single wait is longer than this.]:\[sleep=\]TIME: ' \
            ''--retransmits'[Fire when so many TCP segments are sent again within the window.]:N: ' \
            ''--metrics'[Ask the application itself, for its Prometheus metrics, once a second.]:URL: ' \
            ''--metric'[The histogram or summary of its latency; NAME{label="value"} takes some series.]:NAME: ' \
            ''--quantile'[Which quantile of it.]:Q: ' \
            ''--above'[Fire when that is above this.]:TIME: ' \
            ''--pprof'[Lay the profiles of a Go service into the bundle\: http\://127.0.0.1\:6060.]:URL: ' \
            ''--window'[Over how long percentiles are taken.]:TIME: ' \
            ''--min-count'[Fewer values in the window are no percentile.]:N: ' \
            ''--before'[What a bundle has from before the moment.]:TIME: ' \
            ''--after'[What it has from after the moment.]:TIME: ' \
            ''--cooldown'[At least so long from one bundle to the next.]:TIME: ' \
            ''--memory'[For what is kept; the oldest goes first.]:SIZE: ' \
            '(-o --output)'{-o,--output}'[Where the bundles go.]:DIR:_files -/' \
            ''--keep'[Bundles to keep; the oldest goes first.]:N: ' \
            ''--disk'[The same, by what they take together.]:SIZE: ' \
            ''--on-spike'[Run this as you, with the bundle'\''s path behind it; not by a shell.]:CMD: ' \
            ''--once'[End after the first bundle.]' \
            ''--budget'[Of one CPU, for our own work; above it there are fewer details.]:PERCENT: ' \
            '(-d --duration)'{-d,--duration}'[Stop after this long\: 30s, 5m; a bare number is seconds.]:TIME: ' \
            ''--min'[Record only waits of at least this in detail; 0 records all and never adapts. Without it\: all, until there are too many. Counts and percentiles are exact anyway.]:TIME: ' \
            ''--slow'[A wait of at least this gets its stack.]:TIME: ' \
            ''--no-stacks'[Take no stacks\: cheaper, no flame graph.]' \
            ''--no-user-stack-copy'[Never read the memory of the targets'\'' stacks\: less of them is seen where code has no frame pointers.]' \
            ''--stack-budget'[Take at most so many stacks per second.]:N: ' \
            ''--cpu-samples'[See what the targets do on the CPU, so many times a second on each; 0\: never.]:HZ: ' \
            ''--without'[Leave out, to be cheaper\: causes (why a wait was long), culprits (who had the CPU then), interrupts (they count as the thread'\''s that they came in), sleeps (sleep calls).]:PART\[,PART\]: ' \
            ''--ring-size'[Buffer between kernel and latrace, a power of two. Without it\: 16M; with --min 0\: 64M.]:SIZE: ' \
            ''--json'[Print the report as JSON, for machines.]' \
            '(-v --verbose)'{-v,--verbose}'[Say more on the way.]' \
            '(-q --quiet)'{-q,--quiet}'[Say nothing on the way but warnings.]' \
            '(-h --help)'{-h,--help}'[Show the help.]'
        ;;
    trigger)
        _arguments -s \
            ''--watch'[Which watch is meant, where several run.]:PID: ' \
            '(-h --help)'{-h,--help}'[Show the help.]' \
            '1:REASON: '
        ;;
    spikes)
        _arguments -s \
            ''--json'[Print them as JSON, for machines.]' \
            '(-h --help)'{-h,--help}'[Show the help.]' \
            '1:DIR:_files -/'
        ;;
    tcp)
        _arguments -s \
            '(-p --pid)'{-p,--pid}'[Processes\: all their threads, present and future.]:PID\[,PID\]:_pids' \
            '(-a --all)'{-a,--all}'[Every process of the host, as without --pid.]' \
            '(-d --duration)'{-d,--duration}'[Stop after this long\: 30s, 5m; a bare number is seconds.]:TIME: ' \
            '(-o --output)'{-o,--output}'[Where the capture goes. Without it\: latrace.data; an earlier one is moved to latrace.data.old.]:DIR:_files -/' \
            '(-f --force)'{-f,--force}'[Replace an output that exists.]' \
            '(-i --input)'{-i,--input}'[Trace nothing\: tell it of this capture.]:DIR:_files -/' \
            ''--json'[Print the report as JSON, for machines.]' \
            '(-v --verbose)'{-v,--verbose}'[Say more on the way.]' \
            '(-q --quiet)'{-q,--quiet}'[Say nothing on the way but warnings.]' \
            '(-h --help)'{-h,--help}'[Show the help.]'
        ;;
    flame)
        _arguments -s \
            '(-i --input)'{-i,--input}'[The capture to read.]:DIR:_files -/' \
            ''--kind'[What the widths are; see above.]:wait|offcpu|culprit|waker|wall:(wait offcpu culprit waker wall)' \
            ''--format'[The format, whatever OUT is called.]:svg|folded|speedscope|pprof:(svg folded speedscope pprof)' \
            ''--only'[Only stacks with a frame whose name this finds (a regular expression of Python); the others'\'' time is one frame, \[not matched\]. May be repeated\: one must match.]:REGEX: ' \
            ''--hide'[Leave out frames whose name this finds; their time goes to their callers. May be repeated.]:REGEX: ' \
            ''--collapse'[Fold recursion\: f f f is f, f g f g is f g. And take away what every program of a runtime has\: the start-up of libc and its threads, the entry and scheduler functions of Go, the entries of V8 and libuv (Node.js), the evaluation loop of CPython, the ways into the kernel and to its scheduler. Never a program'\''s innermost function.]' \
            ''--reverse'[Leaf first\: from the functions where threads stood, out to their callers; process and cause come last.]' \
            ''--per-thread'[A first level of threads, comm/tid, in place of processes. What was not sampled is nobody'\''s. With --kind culprit\: the threads that ran.]' \
            ''--merge-threads'[No level of processes\: all threads together. With --kind culprit\: processes of one name together. Without either option, processes of one name are one, and with --kind culprit each stands alone.]' \
            ''--inlines'[Show functions that the compiler inlined as frames of their own, where DWARF tells of them\: in the file itself, if it is still the same build, or in its debug file under /usr/lib/debug.]' \
            ''--short-names'[Names of C++, Rust and Go without parameters, template and generic arguments, and folders of packages; functions that then have one name are one.]' \
            '(-f --force)'{-f,--force}'[Replace an output that exists.]' \
            '(-q --quiet)'{-q,--quiet}'[Say nothing on the way but warnings.]' \
            '(-h --help)'{-h,--help}'[Show the help.]' \
            '1:OUT:_files'
        ;;
    report)
        _arguments -s \
            '(-i --input)'{-i,--input}'[The capture to read.]:DIR:_files -/' \
            ''--since'[Only what ended from so long after the start on\: 1m30s.]:TIME: ' \
            ''--until'[Only what ended before that time.]:TIME: ' \
            '(-t --tid)'{-t,--tid}'[Only these threads.]:TID\[,TID\]:_pids' \
            ''--over'[Only waits longer than this, and sleep calls that came back so late\: 5ms.]:TIME: ' \
            ''--json'[Print the report as JSON, for machines.]' \
            '(-o --output)'{-o,--output}'[Write a page with plots and flame graphs instead\: one file that needs nothing else. - is stdout.]:FILE.html: ' \
            '(-f --force)'{-f,--force}'[Replace an output that exists.]' \
            '(-q --quiet)'{-q,--quiet}'[Say nothing on the way but warnings.]' \
            '(-h --help)'{-h,--help}'[Show the help.]'
        ;;
    diff)
        _arguments -s \
            '(-o --output)'{-o,--output}'[Draw a flame graph of both instead\: red is more in B, blue less. - is stdout.]:FILE.svg: ' \
            ''--kind'[What the flame graph shows, as in latrace flame.]:wait|offcpu|culprit|waker|wall:(wait offcpu culprit waker wall)' \
            ''--json'[Print the comparison as JSON, for machines.]' \
            '(-f --force)'{-f,--force}'[Replace an output that exists.]' \
            '(-q --quiet)'{-q,--quiet}'[Say nothing on the way but warnings.]' \
            '(-h --help)'{-h,--help}'[Show the help.]' \
            '1:A: ' '1:B: '
        ;;
    doctor)
        _arguments -s \
            ''--json'[Print the findings as JSON, for machines.]' \
            '(-v --verbose)'{-v,--verbose}'[Say of everything what it is for.]' \
            '(-h --help)'{-h,--help}'[Show the help.]'
        ;;
    demo)
        _arguments -s \
            '(-d --duration)'{-d,--duration}'[How long to trace\: 5s.]:TIME: ' \
            '(-o --output)'{-o,--output}'[The capture; the flame graph goes beside it, as .svg. Those of an earlier demo are replaced.]:DIR:_files -/' \
            '(-v --verbose)'{-v,--verbose}'[Say more on the way.]' \
            '(-q --quiet)'{-q,--quiet}'[Say nothing on the way but warnings.]' \
            '(-h --help)'{-h,--help}'[Show the help.]'
        ;;
esac
