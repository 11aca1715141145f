#!/usr/bin/env bash
# TPU VMs: create | setup | run | status | logs | stop | delete, by gcloud.
#
#   launch/tpu_vm.sh create --name=N --zone=Z --project=P --topology=v5e:4x4
#
# `launch/tpu_vm.sh --help` lists the flags; --dry_run prints the commands
# instead of running them. Needs Python 3.9 and gcloud, nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m launch.tpu_vm "$@"
