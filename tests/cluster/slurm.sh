#!/usr/bin/env bash
# One SLURM controller and one node on loopback, without systemd, cgroups or accounting: slurm.sh {start|stop} FOLDER
# Everything it writes lies in FOLDER, which it must own; clients find it through SLURM_CONF=FOLDER/slurm.conf. Needs root, and Debian's
# slurmctld, slurmd, slurm-client and munge. Ports are derived from the folder's name, so that two clusters can live side by side.
# SLURM_AT is the address of this host in place of 127.0.0.1, SLURM_NODES the lines of the nodes and partitions and what else is to be set;
# on other hosts of SLURM_NODES, slurmd alone is started with the same SLURM_CONF.
set -euo pipefail
action=$1
folder=$(mkdir -p "$2" && cd "$2" && pwd)
socket=$folder/munge.socket
export SLURM_CONF=$folder/slurm.conf

stop() {
  if [ -s "$folder/slurmctld.pid" ]; then # daemons that end leave their jobs running
    timeout 10 scancel --me 2>/dev/null || true
    for _ in $(seq 50); do [ -n "$(timeout 10 squeue -h 2>/dev/null)" ] || break; sleep 0.2; done
  fi
  for file in "$folder"/slurmd.*.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
    [ -s "$file" ] || continue
    local pid
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$file"
  done
}

start() {
  for tool in slurmctld slurmd munged sbatch; do
    command -v "$tool" >/dev/null || { echo "needs $tool: apt-get install slurmctld slurmd slurm-client munge"; exit 3; }
  done
  [ "$(id -u)" = 0 ] || { echo "needs root: slurmd starts its jobs as their owners"; exit 3; }
  mkdir -p "$folder"/{state,spool,log}
  chmod 755 "$folder"
  local port host one_node
  port=$((20000 + $(printf %s "$folder" | cksum | cut -d' ' -f1) % 6000 * 2)) # below those that Linux gives to whoever asks for any
  host=$(hostname -s)
  one_node="NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP"
  printf '#!/bin/sh\n[ ! -e %s/no-launch ]\n' "$folder" >"$folder/prolog"
  chmod 755 "$folder/prolog"
  head -c 1024 /dev/urandom >"$folder/munge.key"
  chmod 400 "$folder/munge.key"
  munged --force --socket="$socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
    --seed-file="$folder/munged.seed" --log-file="$folder/log/munged.log"
  cat >"$SLURM_CONF" <<EOF
ClusterName=loopback
SlurmctldHost=$host(${SLURM_AT:-127.0.0.1})
SlurmUser=root
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for the life of its credential before it starts again: 120 seconds by default.
AuthInfo=socket=$socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
# Jobs cannot be launched while FOLDER/no-launch is there.
Prolog=$folder/prolog
ReturnToService=2
KillWait=1
${SLURM_NODES:-$one_node}
EOF
  slurmctld
  slurmd
  for _ in $(seq 900); do
    sinfo -h -o %T 2>/dev/null | grep -q idle && return 0
    sleep 0.2
  done
  echo "the node did not come up; the ends of its logs:"
  tail -n 5 "$folder"/log/*.log
  stop
  exit 4
}

case $action in
  start) start ;;
  stop) stop ;;
  *) echo "usage: slurm.sh {start|stop} FOLDER"; exit 2 ;;
esac
