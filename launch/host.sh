#!/usr/bin/env bash
# One host of a TPU VM: what `tpu_vm.sh` runs there, on all hosts at once.
#
#   host.sh setup                       the environment, beside the code
#   host.sh start WORKDIR ARGUMENT...   python -m stepsearch.train ARGUMENT...,
#                                       detached
#   host.sh status                      one line: stepsearch HOST STATE WORKDIR
#   host.sh stop SECONDS                SIGTERM, which saves; SIGKILL after that
#   host.sh log LINES [follow]          of the last start; log.old has the rest
#
# STATE is running, exit=N, stopped (by `stop`), lost (died with the machine) or
# idle (nothing was started). A lock, which dies with the processes, tells a
# running trainer from what a reboot has left behind. `tpu_vm.sh` unpacks into
# ~/stepsearch/new and calls `setup` there, which takes its place as code/.
set -euo pipefail

PLACE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CODE=$PLACE/code
RUN=$PLACE/run
PYTHON=$PLACE/venv/bin/python

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

busy() { ! flock --shared --nonblock "$RUN/lock" true; }

state() {
  if [[ ! -e $RUN/workdir ]]; then
    echo idle
  elif busy; then
    echo running
  elif [[ -e $RUN/stopped ]]; then
    echo stopped
  elif [[ -e $RUN/exit ]]; then
    echo "exit=$(<"$RUN/exit")"
  else
    echo lost
  fi
}

status() {
  local workdir=''
  [[ ! -e $RUN/workdir ]] || workdir=$(<"$RUN/workdir")
  printf 'stepsearch %s %s %s\n' "$(hostname)" "$(state)" "$workdir"
}

setup() {
  [[ $(state) != running ]] ||
    fail "busy with $(<"$RUN/workdir"): stop that before its code changes."
  if [[ -d $PLACE/new ]]; then
    rm -rf "$CODE"
    mv "$PLACE/new" "$CODE"
  fi
  # The images have Python 3.10; uv brings the version that the tests run with.
  python3 -m pip install --user --quiet --disable-pip-version-check uv
  python3 -m uv venv --quiet --allow-existing --python=3.11 "$PLACE/venv"
  python3 -m uv pip install --quiet --python="$PYTHON" \
    --requirement="$CODE/requirements.txt" 'jax[tpu]'
  echo "$(hostname): ready, $("$PYTHON" -c "
from importlib.metadata import version
print('jax', version('jax'), 'libtpu', version('libtpu'))")"
}

start() {
  (($# >= 2)) || fail "start takes a workdir and the trainer's arguments."
  [[ -x $PYTHON ]] || fail "there is no environment yet: run setup first."
  # The lock stays with this descriptor, which the trainer inherits; `busy`
  # holds it for a moment, hence the wait.
  exec 9>>"$RUN/lock"
  flock --wait 1 9 || fail "busy with $(<"$RUN/workdir"): stop that first."
  rm -f "$RUN/exit" "$RUN/stopped" "$RUN/pid"
  [[ ! -e $RUN/log ]] || cat "$RUN/log" >>"$RUN/log.old"
  printf '%s\n' "$1" >"$RUN/workdir"
  shift
  nohup setsid bash "$CODE/launch/host.sh" supervise "$@" \
    </dev/null >"$RUN/log" 2>&1 &
  echo "$(hostname): started"
}

# Runs the trainer and notes how it ended. A machine that shuts down sends
# SIGTERM to everyone: only the trainer is to act on it.
supervise() {
  local code=0 trainer
  trap : TERM INT
  cd "$CODE"
  printf '%s python -m stepsearch.train%s\n' "$(date -u +%FT%TZ)" \
    "$(printf ' %q' "$@")"
  PYTHONUNBUFFERED=1 "$PYTHON" -m stepsearch.train "$@" &
  trainer=$!
  echo "$trainer" >"$RUN/pid"
  while kill -0 "$trainer" 2>/dev/null; do
    code=0
    wait "$trainer" || code=$?
  done
  echo "$code" >"$RUN/exit"
}

stop() {
  local seconds=$1
  if [[ $(state) != running ]]; then
    status
    return
  fi
  until [[ -e $RUN/pid ]]; do sleep 0.1; done  # started a moment ago
  touch "$RUN/stopped"
  kill -TERM "$(<"$RUN/pid")" 2>/dev/null || true  # it may have ended
  for ((; seconds > 0; --seconds)); do
    busy || break
    sleep 1
  done
  if busy; then
    kill -KILL "$(<"$RUN/pid")" 2>/dev/null || true
    echo "$(hostname): killed; the last checkpoint is what is left" >&2
    flock "$RUN/lock" true
  fi
  status
}

log() {
  [[ -e $RUN/log ]] || fail "nothing has been started here."
  tail --lines="$1" ${2:+--follow} "$RUN/log"
}

mkdir -p "$RUN"
case ${1-} in
  setup | start | status | supervise | stop | log) "$@" ;;
  *) fail "host.sh setup | start | status | stop | log, not '${1-}'." ;;
esac
