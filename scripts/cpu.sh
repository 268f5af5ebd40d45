#!/usr/bin/env bash
# Starts a program with the settings that JAX wants on a CPU:  scripts/cpu.sh jaxdiff train FILE --workdir DIR
#
# - glibc keeps freed memory. A train step frees and takes hundreds of megabytes; given back to the kernel, every page
#   of them is faulted in again at each step.
# - One host device per core, each with one thread. XLA runs a convolution on one core of a CPU device, so more cores
#   help only as more devices, over which jaxdiff splits its batches. JAXDIFF_CPU_DEVICES=N sets another number.
# What is set already stays as it is. --dry-run prints the settings and the command instead.
set -euo pipefail

dry_run=false
if [[ ${1-} == --dry-run ]]; then
  dry_run=true
  shift
fi
if [[ $# -eq 0 || $1 == -* ]]; then
  echo "error: got no command, expected: scripts/cpu.sh [--dry-run] COMMAND [ARGUMENT ...]" >&2
  exit 2
fi

devices=${JAXDIFF_CPU_DEVICES:-$(getconf _NPROCESSORS_ONLN)}
if [[ ! $devices =~ ^[1-9][0-9]*$ ]]; then
  echo "error: JAXDIFF_CPU_DEVICES must be a whole number of at least 1, got '$devices'" >&2
  exit 2
fi

names=()
default() {
  names+=("$1")
  export "$1=${!1-$2}"
}

default MALLOC_ARENA_MAX 1
default MALLOC_MMAP_MAX_ 0
default MALLOC_TRIM_THRESHOLD_ 8000000000
default MALLOC_TOP_PAD_ 1000000000
default OMP_NUM_THREADS 1
default JAX_PLATFORMS cpu
if [[ ${XLA_FLAGS-} != *xla_force_host_platform_device_count* ]]; then
  default JAX_NUM_CPU_DEVICES "$devices"
fi
if [[ ${XLA_FLAGS-} != *xla_cpu_multi_thread_eigen* ]]; then
  export XLA_FLAGS="--xla_cpu_multi_thread_eigen=false${XLA_FLAGS:+ $XLA_FLAGS}"
fi
names+=(XLA_FLAGS)

if $dry_run; then
  for name in "${names[@]}"; do
    printf '%s=%q\n' "$name" "${!name}"
  done
  printf '%q ' "$@"
  printf '\n'
  exit 0
fi
exec "$@"
