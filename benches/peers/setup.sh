#!/usr/bin/env bash
# Installs the peers under target/peers (PEERS_WORK): a virtual environment with the pinned versions,
# llama.cpp built for this processor, and the program that measures the machine's limits.
# Needs Python >= 3.10, a C and a C++ compiler, and 8 GB of disk; 15 minutes on two cores.
#   PEERS_TORCH=0   leave PyTorch out (its wheel brings several GB)
#   PEERS_LLAMA=0   leave llama.cpp out (most of the build time)
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
work="${PEERS_WORK:-$here/../../target/peers}"
mkdir -p "$work/models"
venv="$work/venv"
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"

cc -O2 -march=native -pthread "$here/limits.c" -o "$work/limits"
"$venv/bin/pip" install -q -r "$here/requirements.txt"
if [ "${PEERS_LLAMA:-1}" != 0 ]; then
  parts="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF"
  parts="$parts -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_COMMON=OFF"
  CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON $parts" \
    CMAKE_BUILD_PARALLEL_LEVEL="${PEERS_JOBS:-$(nproc)}" \
    "$venv/bin/pip" install -q --no-binary llama-cpp-python llama-cpp-python==0.3.36
fi
[ "${PEERS_TORCH:-1}" = 0 ] || "$venv/bin/pip" install -q torch==2.15.0
"$venv/bin/pip" freeze > "$work/versions.txt"
