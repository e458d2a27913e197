#!/usr/bin/env bash
# Makes .venv, the Python environment of the tests: mlx-lm to compare with, and the official API client. Prints its python.
set -euo pipefail
cd "$(dirname "$0")/.."
case $(uname -s) in
  Darwin) mlx='mlx==0.32.4' ;;
  *) mlx='mlx[cpu]==0.32.4' ;;
esac
packages=("$mlx" 'mlx-lm==0.32.2' 'openai>=3' 'requests')
stamp="${packages[*]}"
if [[ ! -x .venv/bin/python || $(cat .venv/ready 2>/dev/null) != "$stamp" ]]; then
  echo "python: installing ${packages[*]} into .venv" >&2
  python3 -m venv .venv >&2
  .venv/bin/pip install -q --disable-pip-version-check "${packages[@]}" >&2
  echo "$stamp" >.venv/ready
fi
echo "$PWD/.venv/bin/python"
