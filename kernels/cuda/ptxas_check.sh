#!/usr/bin/env bash
# ptxas_check.sh SPILL_BYTES COMPILER ARGS...: runs nvcc with -Xptxas=-v and fails where a kernel
# spills more than SPILL_BYTES, wgmma is serialised (C7510, C7512, C7514 ...) or setmaxnreg is ignored
# (C7508).
# Prints what nvcc said, without ptxas's own statistics unless something is wrong.
set -uo pipefail
budget=$1
shift
report=$("$@" 2>&1)
status=$?
wrong=$(grep -E 'C7508|C7510|wgmma.mma_async instructions are serialized' <<<"$report"
        awk -v budget="$budget" '
          /Compiling entry function/ { kernel = $0 }
          /bytes spill/ {
            for (i = 2; i <= NF; i++) if ($i == "bytes" && $(i + 1) == "spill") spilled = $(i - 1) + 0;
            if (spilled > budget) print kernel "\n" $0 " (budget " budget ")"
          }' <<<"$report")
if [ -n "$wrong" ]; then
  printf '%s\nkernel build rule broken:\n%s\n' "$report" "$wrong" >&2
  exit 1
fi
grep -vE '^ptxas info +: (0 bytes gmem|[0-9]+ bytes gmem|Compiling entry|Function properties|Used [0-9]+ registers|Compile time)|bytes stack frame|^$' <<<"$report" >&2
exit $status
