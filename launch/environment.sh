# Makes the environment shared by demo.sh and test.sh: `.venv` beside this folder, with harness and some extras in it.
# Sourced from the repository root; then `make_environment demo,dev`. Pinned by constraints.txt. torch is pinned only
# where there is no GPU: on Colab and on GPU machines the torch that is there stays. It is installed again when the
# dependencies have changed.

torch_without_gpu="torch==2.13.0"
venv_python=.venv/bin/python
stamp_file=.venv/harness-installed

stop() {
    echo "harness: $*" >&2
    exit 2
}

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

# What python $1 has to offer: "cuda" (also ROCm), "cpu" or "none".
torch_of() {
    "$1" - 2>/dev/null <<'PY' || echo none
import torch
print("cuda" if torch.version.cuda or torch.version.hip else "cpu")
PY
}

# "keep": use the torch of python $1; "any": let pip choose one for the GPU; "pin": the tested CPU version.
torch_choice() {
    local found
    found=$(torch_of "$1")
    if [ "$found" = cuda ] || { [ "$found" = cpu ] && [ -n "${COLAB_RELEASE_TAG:-}" ]; }; then
        echo keep
    elif has_gpu; then
        echo any
    else
        echo pin
    fi
}

make_venv() {
    local python=$1 choice=$2 options=() # ${options[@]+...}: an empty one is an error to the bash of macOS
    [ "$choice" = keep ] && options=(--system-site-packages)
    if "$python" -m venv ${options[@]+"${options[@]}"} .venv >.venv-log 2>&1; then
        rm -f .venv-log
    elif [ "$choice" = keep ] && "$python" -m venv "${options[@]}" --without-pip --clear .venv >.venv-log 2>&1; then
        rm -f .venv-log # Colab has no ensurepip; the pip of the system is seen from inside
    else
        cat .venv-log >&2
        rm -rf .venv .venv-log
        stop "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
    fi
}

# $1: extras, separated by commas.
make_environment() {
    local extras=$1 python=${PYTHON:-python3} hash stamped_hash="" stamped_extras="" missing="" extra choice torch=()
    hash=$(cat pyproject.toml launch/constraints.txt launch/environment.sh | cksum | tr ' ' -) # macOS has no sha256sum
    if [ -x "$venv_python" ] && [ -f "$stamp_file" ]; then
        read -r stamped_hash stamped_extras <"$stamp_file" || true
    fi
    for extra in ${extras//,/ }; do
        [[ ",$stamped_extras," == *",$extra,"* ]] || missing+=",$extra"
    done
    [ "$hash" = "$stamped_hash" ] && [ -z "$missing" ] && return
    extras=${stamped_extras:+$stamped_extras}$missing
    extras=${extras#,}

    if [ ! -x "$venv_python" ]; then
        command -v "$python" >/dev/null || stop "$python is not installed; harness needs Python 3.11 or newer"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            stop "$python is $("$python" --version 2>&1); harness needs 3.11 or newer (name another by PYTHON=python3.11)"
        choice=$(torch_choice "$python")
        make_venv "$python" "$choice"
    else
        choice=$(torch_choice "$venv_python")
    fi
    "$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip >/dev/null 2>&1 ||
        stop ".venv has no pip; remove the folder .venv and start again"
    [ "$choice" = pin ] && torch=("$torch_without_gpu")
    echo "installing harness[$extras] into .venv (torch: $choice), about two minutes"
    "$venv_python" -m pip install -qq --disable-pip-version-check -c launch/constraints.txt \
        ${torch[@]+"${torch[@]}"} -e ".[$extras]" || stop "pip could not install the packages, see above; run this again to go on"
    echo "$hash $extras" >"$stamp_file"
}
