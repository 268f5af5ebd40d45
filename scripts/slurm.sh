#!/usr/bin/env bash
#SBATCH --job-name=jaxdiff
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --requeue
# Trains on the GPUs of several nodes:  sbatch scripts/slurm.sh experiments/cifar10_ddpm.py --workdir /shared/runs/a
#
# One process per GPU: under Slurm, JAX gives each process the GPU of its number within the node. Processes find each
# other through Slurm's variables. The workdir must lie where every node can read and write. Five minutes before the
# time is up Slurm sends SIGTERM: every process saves the same step and ends with code 130. Then the job goes back to
# the queue, and the same command goes on from that step. Fit the #SBATCH lines to the cluster. --dry-run as the first
# argument prints the command instead.
set -euo pipefail

dry_run=false
if [[ ${1-} == --dry-run ]]; then
  dry_run=true
  shift
fi
if [[ $# -eq 0 ]]; then
  echo "error: got no experiment, expected: sbatch scripts/slurm.sh FILE --workdir DIR [OPTION ...]" >&2
  exit 2
fi

# A process that has saved and ended must not take the others with it; a failed one is noticed by JAX's heartbeats.
command=(srun --kill-on-bad-exit=0 --open-mode=append --output="slurm-%j-%t.out")
command+=("${JAXDIFF:-.venv/bin/jaxdiff}" train "$@" --distributed auto)
if $dry_run; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi

code=0
"${command[@]}" || code=$?
if [[ $code -eq 130 && -n ${SLURM_JOB_ID-} ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
