#!/usr/bin/env bash
# Prepares MLX for this machine. macOS: nothing to do, mlx-sys builds it. Linux: MLX comes as the wheel of the Python
# package, mlx-c is compiled from the sources inside the mlx-sys package, and .cargo/config.toml tells Cargo to use both in
# place of mlx-sys's build script (Cargo's documented override for crates with `links`). Needs a C++ compiler and Python.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $(uname -s) == Linux ]] || { echo "macOS: mlx-sys builds MLX itself, nothing to prepare"; exit 0; }

mlx_version=0.32.2 # what mlx-sys 0.7.0 carries
wheel=${MLX_WHEEL:-mlx-cpu} # or mlx-cuda-13, for a machine with an NVIDIA GPU
root=$PWD/.mlx
stamp="$wheel $mlx_version $(cksum scripts/setup-mlx.sh scripts/mlx-linux/format scripts/mlx-linux/shim.cpp scripts/mlx-linux/bindings/src/main.rs | cksum)"
if [[ -f $root/ready && $(cat "$root/ready") == "$stamp" && -f .cargo/config.toml ]] && grep -q "\"$root/lib\"" .cargo/config.toml; then
  exit 0
fi

for tool in python3 c++ cargo; do
  command -v "$tool" >/dev/null || { echo "$tool is needed (Debian: apt-get install g++ python3 python3-venv; Rust: rustup.rs)" >&2; exit 1; }
done
rm -rf "$root/ready" && mkdir -p "$root/lib" "$root/include"

echo "mlx: fetching the $wheel wheel, cmake and libclang"
[[ -x $root/tools/bin/python ]] || python3 -m venv "$root/tools"
"$root/tools/bin/pip" install -q --disable-pip-version-check "cmake<5" ninja libclang
"$root/tools/bin/pip" install -q --disable-pip-version-check --no-deps --upgrade --target "$root/wheel" "$wheel==$mlx_version"
export PATH=$root/tools/bin:$PATH
libclang=$("$root/tools/bin/python" -c 'import clang.native, pathlib; print(pathlib.Path(clang.native.__file__).parent)')

echo "mlx: compiling mlx-c"
mlx_c=$(cargo metadata --format-version 1 --locked | "$root/tools/bin/python" -c '
import json, pathlib, sys
package = next(p for p in json.load(sys.stdin)["packages"] if p["name"] == "mlx-sys")
print(pathlib.Path(package["manifest_path"]).parent / "src/mlx-c")')
flags=
if ! printf '#include <format>\nint main() {}\n' | c++ -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; then
  cp scripts/mlx-linux/format "$root/include/format" # GCC 12 has no <format>
  flags="-isystem $root/include -include $root/include/format"
fi
cmake -G Ninja -S "$mlx_c" -B "$root/mlx-c" -DCMAKE_BUILD_TYPE=Release -DMLX_C_USE_SYSTEM_MLX=ON -DMLX_C_BUILD_EXAMPLES=OFF \
  -DMLX_ROOT="$root/wheel/mlx" -DCMAKE_CXX_FLAGS="$flags" >"$root/cmake.log" 2>&1 || { tail -20 "$root/cmake.log" >&2; exit 1; }
cmake --build "$root/mlx-c" >>"$root/cmake.log" 2>&1 || { tail -30 "$root/cmake.log" >&2; exit 1; }
cp "$root/mlx-c/libmlxc.a" "$root/lib/"
c++ -std=c++20 -O2 -fPIC $flags -I"$mlx_c" -I"$root/wheel/mlx/include" -c scripts/mlx-linux/shim.cpp -o "$root/lib/shim.o"
ar rcs "$root/lib/libmlxshim.a" "$root/lib/shim.o"

echo "mlx: writing bindings"
# The system's C headers stand where the compiler says; libclang from a wheel brings none of its own.
builtin=$(c++ -print-file-name=include)
LIBCLANG_PATH=$libclang BINDGEN_EXTRA_CLANG_ARGS="-isystem $builtin" CARGO_TARGET_DIR=$root/bindings-target \
  cargo run -q --manifest-path scripts/mlx-linux/bindings/Cargo.toml -- "$mlx_c" "$root/lib/bindings.rs"

host=$(rustc -vV | sed -n 's/^host: //p')
mkdir -p .cargo
cat >.cargo/config.toml <<EOF
# Written by scripts/setup-mlx.sh; not kept in git because the paths must be absolute.
[target.$host.mlx]
rustc-link-search = ["native=$root/lib", "native=$root/wheel/mlx/lib"]
rustc-link-lib = ["static:+whole-archive=mlxc", "static:+whole-archive=mlxshim", "dylib=mlx", "dylib=stdc++"]
rustc-env = { OUT_DIR = "$root/lib" }

[target.$host]
rustflags = ["-C", "link-arg=-Wl,-rpath,$root/wheel/mlx/lib"]
EOF
echo "$stamp" >"$root/ready"
echo "mlx: ready"
