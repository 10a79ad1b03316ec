# shellcheck shell=bash disable=SC2034
# What the scripts share; sourced, never run (so what looks unused here is used there). Callers set
# `set -euo pipefail` first.

TREE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

# The distribution's Python, whatever `python3` on the PATH is (pyenv, conda, an active venv): only
# this one can import the distribution's bcc.
SYSTEM_PYTHON=/usr/bin/python3

# Files made here must be readable by the other users of the machine and writable by none of them.
umask 022

# A caller's settings for some other Python must not leak into ours.
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

STEPS=0
STEP=0
BEGAN=$SECONDS

if [[ -t 1 && -z "${NO_COLOR:-}" ]]; then
    BOLD=$'\e[1m' PLAIN=$'\e[0m'
else
    BOLD='' PLAIN=''
fi

step() { # step WHAT: announce the next numbered step
    STEP=$((STEP + 1))
    printf '%s[%d/%d] %s%s\n' "$BOLD" "$STEP" "$STEPS" "$*" "$PLAIN"
}

say() { printf '      %s\n' "$*"; }

die() { # die CAUSE [HINT...]: one line of cause, lines of hint, exit 1
    printf 'error: %s\n' "$1" >&2
    shift
    (($# == 0)) || printf '  hint: %s\n' "$@" >&2
    exit 1
}

can_be_root() { ((EUID == 0)) || command -v sudo >/dev/null; }

as_root() { # as_root COMMAND...: run one command as root, asking sudo only when that is needed
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "this step needs root and there is no sudo: $*" "run this script as root"
    fi
}

has_package() { # has_package NAME: is this distribution package installed and configured?
    local status
    # shellcheck disable=SC2016  # dpkg-query expands ${Status}, not the shell
    status="$(dpkg-query --show --showformat '${Status}' "$1" 2>/dev/null)" || return 1
    [[ $status == "install ok installed" ]]
}

has_library() { # has_library NAME: does the loader know this library?
    [[ "$(/sbin/ldconfig -p 2>/dev/null)" == *"$1"* ]]
}

missing_packages() { # missing_packages NAME...: those of them that are not installed, one a line
    local name
    for name in "$@"; do
        has_package "$name" || printf '%s\n' "$name"
    done
}

install_packages() { # install_packages NAME...: from the distribution, with the lists refreshed if need be
    local -a apt=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
    local log
    log="$(mktemp)"
    say "installing from the distribution: $*"
    # Lists of a fresh machine are empty, those of an old one name versions that are gone: ask for
    # them only when the first try fails, it costs seconds every time.
    if ! as_root "${apt[@]}" install -y --no-install-recommends "$@" </dev/null >"$log" 2>&1; then
        say "refreshing the package lists first"
        if ! { as_root "${apt[@]}" update </dev/null &&
            as_root "${apt[@]}" install -y --no-install-recommends "$@" </dev/null; } >"$log" 2>&1; then
            tail -n 20 "$log" >&2
            rm -f "$log"
            die "apt-get could not install: $*" "try it by hand: sudo apt-get update && sudo apt-get install $*"
        fi
    fi
    rm -f "$log"
}

require_system_python() {
    [[ -x $SYSTEM_PYTHON ]] || die "no $SYSTEM_PYTHON" "install the distribution's python3 (3.11 or newer)"
    "$SYSTEM_PYTHON" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$SYSTEM_PYTHON" --version) is too old: latrace needs 3.11 (Debian 12, Ubuntu 24.04 or newer)"
}

hash_of() { # hash_of FILE_OR_FOLDER...: one hash over the contents and names of all files below
    find "$@" -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-16
}
