#!/bin/bash
# Checks the given scripts with shellcheck. Where it is missing: an error in CI (CI=true), a loud line elsewhere.
set -euo pipefail

if ! command -v shellcheck >/dev/null; then
    echo "shellcheck is not installed, so the shell scripts were NOT checked: apt-get install shellcheck" >&2
    [[ ${CI:-false} != true ]]
    exit
fi
shellcheck --external-sources "$@"
echo "shellcheck: $# scripts checked"
