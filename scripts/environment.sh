# shellcheck shell=bash
# Sourced by the scripts beside it. Makes .venv in the project's root and installs into it.
# Leaves the shell in the project's root, and "$python" is the environment's interpreter.

unset CDPATH
project_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$project_root/.venv/bin/python"

heading() {
  printf '\n== %s ==\n' "$1"
}

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 1
}

# Print the first interpreter that is new enough and can make virtual environments.
find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer with the venv and ensurepip modules was found on PATH; install one"
}

environment_works() {
  "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# prepare_environment NAME REQUIREMENT...
# Does nothing when .venv already has these requirements, installed from this place with this
# pyproject.toml and these sources of the compiled kernels: a stamp in .venv, one for each NAME, says so.
prepare_environment() {
  local name="$1" stamp="$project_root/.venv/installed-$1" found wanted
  shift
  cd "$project_root"
  wanted="$(printf '%s\n' "$project_root" "$@" && cat pyproject.toml streammerge/native/*.[ch])"
  if environment_works && [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    return
  fi

  heading "preparing .venv for: $name"
  if ! environment_works; then
    found="$(find_python)"
    "$found" -m venv .venv
    environment_works || fail "$project_root/.venv does not work; remove it and run this again"
  fi
  # Alone and first, with its version given: where a build for CPUs alone is offered, pip ranks it
  # above the build for accelerators, which is many times its size.
  if ! "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; then
    quiet_install torch==2.13.0
  fi
  quiet_install "$@"
  printf '%s\n' "$wanted" >"$stamp"
}

# Modules are compiled when they are first imported: few of the thousands that come along ever are.
quiet_install() {
  "$python" -m pip --quiet --quiet --disable-pip-version-check install --no-compile "$@"
}
