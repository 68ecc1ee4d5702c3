#!/bin/sh
# Checks the two things that make cannot install by itself, a recent Python with venv and a C compiler, and prints the
# one line that installs what is missing.
#
#     scripts/preflight.sh [PYTHON]        (default python3)
set -u
python=${1:-python3}

python_is_recent() { "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The compiler that setuptools will call: $CC, or the one that built this Python.
compiler() {
    if [ -n "${CC:-}" ]; then echo "$CC"; else
        "$python" -c 'import sysconfig; print(sysconfig.get_config_var("CC") or "cc")' 2>/dev/null || echo cc
    fi
}

compiler_works() {
    folder=$(mktemp -d) || return 1
    printf '#include <stdint.h>\n#include <string.h>\nint32_t f(const char *s) { return (int32_t)strlen(s); }\n' >"$folder/f.c"
    # Unquoted: the setting may hold flags, as in "gcc -pthread".
    $(compiler) -shared -fPIC -o "$folder/f.so" "$folder/f.c" 2>/dev/null
    status=$?
    rm -rf "$folder"
    return $status
}

missing="" why=""
if ! command -v "$python" >/dev/null 2>&1; then
    missing="python" why="there is no $python"
elif ! python_is_recent; then
    missing="newer" why="$("$python" --version) is too old, 3.11 is the first that will do"
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing="venv" why="$python has no venv module"
fi
if ! compiler_works; then
    missing="$missing cc" why="${why:+$why; }there is no working C compiler ($(compiler))"
fi
[ -z "$missing" ] && exit 0

# The package names of one system: what brings python, a newer python, venv, and a compiler.
packages() {
    for part in $missing; do
        case $part in
            python) printf ' %s' "$1" ;;
            newer) printf ' %s' "$2" ;;
            venv) printf ' %s' "$3" ;;
            cc) printf ' %s' "$4" ;;
        esac
    done
}

root="sudo "
[ "$(id -u)" = 0 ] && root=""
case ${PREFIX:-} in
    *com.termux*) line="pkg install$(packages "python python-ensurepip-wheels" python python-ensurepip-wheels clang)" ;;
    *)
        if command -v apt-get >/dev/null 2>&1; then
            line="${root}apt-get install -y$(packages "python3 python3-venv" "python3.11 python3.11-venv" python3-venv "gcc libc6-dev")"
        elif command -v dnf >/dev/null 2>&1; then
            line="${root}dnf install -y$(packages python3 python3.11 python3 "gcc glibc-devel")"
        elif command -v pacman >/dev/null 2>&1; then
            line="${root}pacman -S --needed$(packages python python python gcc)"
        elif command -v apk >/dev/null 2>&1; then
            line="${root}apk add$(packages python3 python3 python3 "gcc musl-dev")"
        elif command -v brew >/dev/null 2>&1; then
            line="brew install$(packages python python python llvm)"
        else
            line="your system's package manager: Python 3.11 or newer with venv, and a C compiler"
        fi
        ;;
esac
echo "shoal: $why. This installs what is missing:" >&2
echo "    $line" >&2
case $missing in *newer*) echo "and then name it: make PYTHON=python3.11 ..." >&2 ;; esac
exit 1
