#!/bin/bash
# Makes .venv/ ready: a Python of a version that works, Debian packages where they may be installed, the package with its
# extras. FFCV needs a compiler and libraries; without them everything else is installed, and a line says so.
# Quick when nothing has changed; may be interrupted and started again.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/deepscale-setup # the key of the last complete setup, then a sentence on FFCV when it is missing
LOG=$VENV/deepscale-setup.log
BUSY=$VENV/deepscale-installing # there while pip changes .venv/
OLDEST=11 NEWEST=12 # Python 3.11 and 3.12

say() { echo "setup: $*"; }
fail() {
    echo "setup: $*" >&2
    exit 2
}
have() { command -v "$1" >/dev/null; }

# ------------------------------------------------------------------------------------------------------------- python

supported() { "$1" -c "import sys; sys.exit(not (3, $OLDEST) <= sys.version_info[:2] <= (3, $NEWEST))" 2>/dev/null; }

# The base interpreter, also where python3 is that of an active virtual environment.
base_of() { "$1" -c 'import os, sys; print(os.path.realpath(sys._base_executable))'; }

find_python() {
    local candidate found
    if [[ -n ${DEEPSCALE_PYTHON:-} ]]; then
        have "$DEEPSCALE_PYTHON" || fail "DEEPSCALE_PYTHON=$DEEPSCALE_PYTHON is not a command"
        supported "$DEEPSCALE_PYTHON" || fail "DEEPSCALE_PYTHON=$DEEPSCALE_PYTHON is not a Python 3.$OLDEST or 3.$NEWEST that runs"
        base_of "$DEEPSCALE_PYTHON"
        return
    fi
    for candidate in python3 /usr/bin/python3 python3.12 python3.11; do
        if have "$candidate" && supported "$candidate"; then
            base_of "$candidate"
            return
        fi
    done
    found=$(python3 --version 2>/dev/null || echo "no python3")
    fail "Python 3.$OLDEST or 3.$NEWEST is needed, and here is ${found}: install one (Debian 12, Ubuntu 24.04:" \
        "apt-get install python3 python3-venv), or name it: DEEPSCALE_PYTHON=/path/to/python3.12 make setup"
}

# ----------------------------------------------------------------------------------------------------- Debian packages

# Each is looked for by what it gives, so that a compiler or a library from elsewhere counts too.
has_venv() { "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; }
has_headers() { "$PYTHON" -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null; }
has_library() { have pkg-config && pkg-config --exists "$1"; }
has_gl() { compgen -G '/usr/lib/*/libGL.so.1' >/dev/null || ldconfig -p 2>/dev/null | grep -q 'libGL\.so\.1'; }

missing_for_ffcv() {
    have g++ || echo g++
    has_headers || echo "$DEBIAN_PYTHON-dev"
    have pkg-config || echo pkg-config
    has_library opencv4 || echo libopencv-dev
    has_library libturbojpeg || echo libturbojpeg0-dev
    has_gl || echo libgl1
}

missing_packages() {
    has_venv || echo "$DEBIAN_PYTHON-venv"
    missing_for_ffcv
    have shellcheck || echo shellcheck
}

# Debian names its default Python's packages python3-..., and those of another version python3.12-...
debian_python() {
    if [[ $(realpath -q /usr/bin/python3) == "$PYTHON" ]]; then echo python3; else "$PYTHON" -c 'import sys; print("python3.%d" % sys.version_info[1])'; fi
}

as_root() {
    if [[ $(id -u) == 0 ]]; then
        DEBIAN_FRONTEND=noninteractive "$@"
    else
        sudo -n DEBIAN_FRONTEND=noninteractive "$@"
    fi
}

may_install() { have apt-get && { [[ $(id -u) == 0 ]] || { have sudo && sudo -n true 2>/dev/null; }; }; }

apt() {
    as_root apt-get -o DPkg::Lock::Timeout=300 -qq "$@" </dev/null >>"$LOG" 2>&1
}

install_debian_packages() {
    local -a missing
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]})) || return 0
    if may_install; then
        say "installing Debian packages: ${missing[*]}"
        apt update || say "apt-get update failed; trying with the package lists that are here"
        # One by one after a failure: a package that cannot be had must not keep the others away.
        apt install --no-install-recommends -y "${missing[@]}" || for package in "${missing[@]}"; do
            apt install --no-install-recommends -y "$package" || true
        done
        mapfile -t missing < <(missing_packages)
        ((${#missing[@]})) || return 0
        say "could not be installed: ${missing[*]} (messages: $LOG)"
    else
        say "these Debian packages are missing and may not be installed from here: ${missing[*]}"
        say "an administrator types: apt-get install ${missing[*]}"
    fi
    has_venv || fail "without $DEBIAN_PYTHON-venv no virtual environment can be made"
}

# ----------------------------------------------------------------------------------------------------- Python packages

# .venv/ is there, of the right Python, at home in this folder, with a pip that runs.
usable_venv() {
    local version
    version=$("$PYTHON" -c 'import sys; print(sys.version_info[:2])')
    [[ -x $VENV/bin/python && $("$VENV/bin/python" -c 'import sys; print(sys.version_info[:2], sys.prefix)') == "$version $PWD/$VENV" ]] &&
        head -n 1 "$VENV/bin/pip" | grep -qF "$PWD/$VENV/" && "$VENV/bin/python" -m pip --version
} >/dev/null 2>&1

make_venv() {
    if [[ -e $BUSY ]]; then
        # Half-unpacked packages look installed to pip, and half of torch stops the build of DeepSpeed.
        say "the last setup was interrupted while installing; starting again"
    elif usable_venv; then
        return
    fi
    say "making $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear "$VENV"
}

pip_install() {
    local code=0
    touch "$BUSY"
    env -u PIP_USER -u PIP_TARGET -u PIP_PREFIX PIP_NO_INPUT=1 "$VENV/bin/python" -m pip install --progress-bar off \
        --disable-pip-version-check "$@" </dev/null >>"$LOG" 2>&1 || code=$?
    rm -f "$BUSY" # also after an error, which pip cleans up after
    return $code
}

install_python_packages() {
    say "installing Python packages (some 6 GB, 2 to 5 minutes the first time; messages: $LOG)"
    pip_install -e '.[sweep,dev]' || {
        tail -n 20 "$LOG" >&2
        fail "installing the Python packages failed, see above; then type make setup again"
    }
}

# Sets WITHOUT_FFCV to the reason where FFCV cannot be had.
install_ffcv() {
    local missing
    missing=$(missing_for_ffcv | xargs)
    WITHOUT_FFCV=
    if [[ -n $missing ]]; then
        WITHOUT_FFCV="without FFCV, which needs $missing; the in-memory feed takes its place"
    elif ! { pip_install -e '.[ffcv]' && "$VENV/bin/python" -c 'import ffcv' >>"$LOG" 2>&1; }; then
        "$VENV/bin/python" -m pip uninstall -y ffcv >>"$LOG" 2>&1 || true
        WITHOUT_FFCV="without FFCV, whose build failed (messages: $LOG); the in-memory feed takes its place"
    fi
}

# ---------------------------------------------------------------------------------------------------------------- main

# What a complete setup depends on: the settings, this script, the interpreter, the place, and what FFCV found.
key() {
    {
        cat pyproject.toml .ci/setup.sh
        echo "$PYTHON" "$PWD"
        missing_for_ffcv
    } | sha256sum
}

main() {
    trap 'exit 130' INT TERM HUP # before anything after pip runs: what pip left must stay marked
    exec 9<. # one setup at a time: the lock is on the folder itself
    flock -n 9 || {
        say "another setup is at work here; waiting for it"
        flock 9
    }
    PYTHON=$(find_python)
    DEBIAN_PYTHON=$(debian_python)
    if [[ -x $VENV/bin/python && -f $STAMP && $(head -n 1 "$STAMP") == "$(key)" ]]; then
        sed -n '2s|..*|setup: ready, &|p' "$STAMP"
        return
    fi
    mkdir -p "$VENV"
    rm -f "$STAMP"
    : >"$LOG"
    install_debian_packages
    make_venv
    install_python_packages
    install_ffcv
    { key && echo "$WITHOUT_FFCV"; } >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    say "ready${WITHOUT_FFCV:+, $WITHOUT_FFCV}"
}

main
