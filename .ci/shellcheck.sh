#!/bin/bash
# Checks every shell script of the repository. Where shellcheck is missing: an error in CI (CI=true), a loud line elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v shellcheck >/dev/null; then
    echo "shellcheck is not installed, so the shell scripts were NOT checked: apt-get install shellcheck" >&2
    [[ ${CI:-false} != true ]]
    exit
fi

# By name or by first line, and without asking git, which refuses a clone of another user's.
scripts=()
while IFS= read -r -d '' file; do
    if [[ $file == *.sh || $file == *.sbatch ]] || head -n 1 "$file" | grep -aqE '^#!.*\b(ba)?sh\b'; then scripts+=("$file"); fi
done < <(find .ci slurm tune tests -type f -print0 2>/dev/null)
shellcheck --shell=bash --external-sources "${scripts[@]}"
echo "shellcheck: ${#scripts[@]} scripts checked"
