#!/usr/bin/env bash
# Runs jaxdiff on a Cloud TPU VM slice of any number of workers.
#
#   export TPU_NAME=diffusion ZONE=us-central2-b TPU_TYPE=v4-32 WORKDIR=gs://bucket/runs/imagenet64
#   scripts/tpu_vm.sh create
#   scripts/tpu_vm.sh install
#   scripts/tpu_vm.sh start experiments/imagenet64_adm.py --set bf16=true --mesh fsdp=4
#   scripts/tpu_vm.sh watch            the last lines of every worker's log; watch all: the whole logs
#   scripts/tpu_vm.sh stop             SIGTERM to every worker: all save the same step and end
#   scripts/tpu_vm.sh resume           the command of the last start again, which goes on from the newest checkpoint
#   scripts/tpu_vm.sh delete
#
# Every worker runs the same command, `jaxdiff train FILE --workdir WORKDIR --distributed auto`, detached from the
# connection, and keeps its output in ~/jaxdiff/logs/ with a new file for each start. Only gs:// can hold the workdir,
# because all workers write one checkpoint. Variables: TPU_NAME and ZONE always; TPU_TYPE and TPU_VERSION (the VM image)
# for create; SPOT=1 for a preemptible slice; PROJECT if it is not gcloud's default; SOURCE for install, a folder (this
# checkout by default) or what pip understands. --dry-run as the first argument prints the commands instead.
set -euo pipefail

usage="scripts/tpu_vm.sh [--dry-run] create|install|start|watch|resume|stop|delete [ARGUMENT ...]"

fail() {
  echo "error: $1" >&2
  exit 2
}

need() {
  local name
  for name in "$@"; do
    [[ -n ${!name-} ]] || fail "variable $name is not set; export $name=... first, see the top of scripts/tpu_vm.sh"
  done
}

run() {
  if $dry_run; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

tpu() {
  run gcloud compute tpus tpu-vm "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

# The same shell command on every worker. The tool returns when all have.
everywhere() {
  tpu ssh "$TPU_NAME" --worker=all "--command=$1"
}

# On a worker: is the process of run.pid ours? After a restart of the machine another one may have its number.
running='running() { test -f run.pid && grep -qa jaxdiff "/proc/$(cat run.pid)/cmdline" 2> /dev/null; }'
idle="cd ~/jaxdiff || exit 1; $running"'
! running || { echo "already running, use stop first"; exit 1; }'
# Starts run.sh in a session of its own, so that it outlives the connection, with a log of its own; "latest" points to it.
launch='mkdir -p logs
log=$(hostname)-$(date -u +%Y%m%dT%H%M%SZ).log
ln -sfn "$log" logs/latest
setsid bash run.sh > "logs/$log" 2>&1 < /dev/null &
sleep 1; echo "$(hostname): started"'

dry_run=false
if [[ ${1-} == --dry-run ]]; then
  dry_run=true
  shift
fi
action=${1-}
[[ -n $action ]] || fail "got no action, expected: $usage"
shift
need TPU_NAME ZONE

case $action in
  create)
    need TPU_TYPE
    tpu create "$TPU_NAME" "--accelerator-type=$TPU_TYPE" "--version=${TPU_VERSION:-tpu-ubuntu2204-base}" ${SPOT:+--spot}
    ;;
  install)
    source=${SOURCE:-$(cd "$(dirname "$0")/.." && pwd)}
    everywhere 'mkdir -p ~/jaxdiff && cd ~/jaxdiff && { test -x .venv/bin/python || python3 -m venv .venv; }'
    if [[ -d $source ]]; then
      archive=$(mktemp -u)-jaxdiff.tar.gz
      run tar -C "$source" --exclude=.git --exclude=.venv --exclude=runs -czf "$archive" .
      tpu scp "$archive" "$TPU_NAME:jaxdiff/source.tar.gz" --worker=all
      run rm -f "$archive"
      everywhere 'cd ~/jaxdiff && tar -xzf source.tar.gz && .venv/bin/pip install --quiet "jax[tpu]" gcsfs -e ".[tfds]" -c constraints.txt'
    else
      everywhere "cd ~/jaxdiff && .venv/bin/pip install --quiet 'jax[tpu]' gcsfs $(printf '%q' "$source")"
    fi
    everywhere 'cd ~/jaxdiff && .venv/bin/python -c "import jax; jax.distributed.initialize(); print(jax.process_index(), jax.device_count())"'
    ;;
  start)
    need WORKDIR
    [[ $# -gt 0 ]] || fail "got no experiment, expected: scripts/tpu_vm.sh start FILE [OPTION ...]"
    [[ $WORKDIR == gs://* ]] || fail "WORKDIR must be a gs:// folder that all workers share, got '$WORKDIR'"
    words=$(printf '%q ' .venv/bin/jaxdiff train "$@" --workdir "$WORKDIR" --distributed auto)
    script="echo \$\$ > run.pid; exec env JAX_COMPILATION_CACHE_DIR=\$HOME/jaxdiff/cache $words"
    everywhere "$idle"$'\n'"printf '%s\n' $(printf '%q' "$script") > run.sh"$'\n'"$launch"
    ;;
  resume)
    everywhere "$idle"$'\n'"test -f run.sh || { echo 'nothing was started here, use start'; exit 1; }"$'\n'"$launch"
    ;;
  watch)
    lines=${1:-20}
    [[ $lines != all ]] || lines=+1
    [[ $lines =~ ^\+?[0-9]+$ ]] || fail "watch takes a number of lines or all, got '$lines'"
    everywhere "cd ~/jaxdiff/logs && echo \"== \$(readlink latest)\" && tail -n $lines latest"
    ;;
  stop)
    everywhere "cd ~/jaxdiff && $running; running && kill -TERM \$(cat run.pid) || echo 'not running'"
    ;;
  delete)
    tpu delete "$TPU_NAME" --quiet
    ;;
  *)
    fail "unknown action '$action', expected: $usage"
    ;;
esac
