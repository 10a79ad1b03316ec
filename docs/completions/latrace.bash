# shellcheck shell=bash
# bash completion for latrace; written by scripts/docs from the command line itself.
_latrace() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    local verb='' name i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} != -* ]]; then
            verb=${COMP_WORDS[i]}
            break
        fi
    done
    case "$verb:$before" in
        flame:--format)
            mapfile -t COMPREPLY < <(compgen -W "svg folded speedscope pprof" -- "$word")
            return
            ;;
        flame:--kind | diff:--kind)
            mapfile -t COMPREPLY < <(compgen -W "wait offcpu culprit waker wall" -- "$word")
            return
            ;;
        attach:--comm | watch:--comm)
            while IFS= read -r name; do
                [[ $name != "$word"* ]] || COMPREPLY+=("$(printf '%q' "$name")")
            done < <(cat /proc/[0-9]*/comm 2>/dev/null | sort -u)
            return
            ;;
        attach:--cgroup | attach:-o | attach:--output | run:-o | run:--output | watch:--cgroup | watch:-o | watch:--output | tcp:-o | tcp:--output | tcp:-i | tcp:--input | flame:-i | flame:--input | report:-i | report:--input | demo:-o | demo:--output)
            compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$word")
            return
            ;;
        attach:-d | attach:--duration | attach:--min | attach:--slow | attach:--stack-budget | attach:--cpu-samples | attach:--without | attach:--ring-size | run:-d | run:--duration | run:--min | run:--slow | run:--stack-budget | run:--cpu-samples | run:--without | run:--ring-size | watch:--p50 | watch:--p90 | watch:--p95 | watch:--p99 | watch:--p999 | watch:--p99-ratio | watch:--floor | watch:--max | watch:--retransmits | watch:--metrics | watch:--metric | watch:--quantile | watch:--above | watch:--pprof | watch:--window | watch:--min-count | watch:--before | watch:--after | watch:--cooldown | watch:--memory | watch:--keep | watch:--disk | watch:--on-spike | watch:--budget | watch:-d | watch:--duration | watch:--min | watch:--slow | watch:--stack-budget | watch:--cpu-samples | watch:--without | watch:--ring-size | trigger:--watch | tcp:-d | tcp:--duration | flame:--only | flame:--hide | report:--since | report:--until | report:--over | report:-o | report:--output | diff:-o | diff:--output | demo:-d | demo:--duration)
            :
            return
            ;;
        attach:-p | attach:--pid | attach:-t | attach:--tid | watch:-p | watch:--pid | watch:-t | watch:--tid | tcp:-p | tcp:--pid | report:-t | report:--tid)
            for name in /proc/[0-9]*; do
                [[ ${name#/proc/} != "$word"* ]] || COMPREPLY+=("${name#/proc/}")
            done
            return
            ;;
        run:--)
            mapfile -t COMPREPLY < <(compgen -c -- "$word")
            return
            ;;
    esac
    if [[ -n $verb && $word != -* ]]; then
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
        return
    fi
    local words=''
    case "$verb" in
        '') words='attach run watch trigger spikes tcp flame report diff doctor demo --version -h --help' ;;
        attach) words='-p --pid -t --tid --comm --cgroup --children -d --duration -o --output -f --force --min --slow --no-stacks --no-user-stack-copy --stack-budget --cpu-samples --without --ring-size --json -v --verbose -q --quiet -h --help' ;;
        run) words='--children -d --duration -o --output -f --force --min --slow --no-stacks --no-user-stack-copy --stack-budget --cpu-samples --without --ring-size --json -v --verbose -q --quiet -h --help' ;;
        watch) words='-p --pid -t --tid --comm --cgroup --children --p50 --p90 --p95 --p99 --p999 --p99-ratio --floor --max --retransmits --metrics --metric --quantile --above --pprof --window --min-count --before --after --cooldown --memory -o --output --keep --disk --on-spike --once --budget -d --duration --min --slow --no-stacks --no-user-stack-copy --stack-budget --cpu-samples --without --ring-size --json -v --verbose -q --quiet -h --help' ;;
        trigger) words='--watch -h --help' ;;
        spikes) words='--json -h --help' ;;
        tcp) words='-p --pid -a --all -d --duration -o --output -f --force -i --input --json -v --verbose -q --quiet -h --help' ;;
        flame) words='-i --input --kind --format --only --hide --collapse --reverse --per-thread --merge-threads --inlines --short-names -f --force -q --quiet -h --help' ;;
        report) words='-i --input --since --until -t --tid --over --json -o --output -f --force -q --quiet -h --help' ;;
        diff) words='-o --output --kind --json -f --force -q --quiet -h --help' ;;
        doctor) words='--json -v --verbose -h --help' ;;
        demo) words='-d --duration -o --output -v --verbose -q --quiet -h --help' ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -F _latrace latrace
