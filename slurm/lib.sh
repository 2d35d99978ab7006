# shellcheck shell=bash
# What the scripts of this folder share; they source it. Nothing here knows of a cluster: cluster.sh does.
#
# Environment of a job: DEEPSCALE_SHARED (cluster.sh), and what this sets:
#   JOB                    the job's folder, jobs/train-12 or jobs/ladder-13_0 in the shared one, the same after a requeue;
#                          DEEPSCALE_JOB=train-12 makes a new job go on in that of an earlier one
#   DEEPSCALE_OPS_DIR      compiled ops that `deepscale prepare` left
#   MLFLOW_TRACKING_URI    unless given: a store in the job's folder, since jobs must not share an SQLite file over a network
#   MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS

# shellcheck source=slurm/cluster.sh
source "$DEEPSCALE_SLURM/cluster.sh" || exit 2

INTERRUPTED=75 # exit code of a training that was asked to stop, wrote its checkpoint and can go on

say() { echo "slurm: $*"; }
fail() {
    echo "slurm: $*" >&2
    exit 2
}

# begin_job NAME: checks what compute nodes need, and sets the environment above.
begin_job() {
    [[ -n ${DEEPSCALE_SHARED:-} ]] || fail "DEEPSCALE_SHARED is not set: give the folder that all nodes see in slurm/cluster.sh"
    command -v deepscale >/dev/null || fail "there is no command deepscale on $(hostname): see the second line of slurm/cluster.sh"
    NAME=${DEEPSCALE_JOB:-$1-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
    JOB=$DEEPSCALE_SHARED/jobs/$NAME${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    [[ -z ${DEEPSCALE_JOB:-} || -d $JOB || -n $(compgen -G "$DEEPSCALE_SHARED/jobs/${NAME}_*") ]] ||
        fail "DEEPSCALE_JOB=$NAME names no job of $DEEPSCALE_SHARED/jobs: give the name of a folder there, without an array's _0, or leave it out"
    mkdir -p "$JOB" || fail "$JOB cannot be made: is $DEEPSCALE_SHARED (slurm/cluster.sh) there on $(hostname), and yours?"
    JOB=$(cd "$JOB" && pwd)
    export JOB DEEPSCALE_OPS_DIR=${DEEPSCALE_OPS_DIR:-$DEEPSCALE_SHARED/ops}
    export MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:-sqlite:///$JOB/mlflow.db}
    # One node's ranks meet on the loopback interface, where nobody else listens.
    MASTER_ADDR=127.0.0.1
    ((SLURM_JOB_NUM_NODES == 1)) || MASTER_ADDR=$(address_of "$(hosts | head -n 1)")
    export MASTER_ADDR
    # Below the ports that the system gives away by itself; 20 for each job, so that two on a node do not meet.
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 500 * 20))
    GPUS=${SLURM_GPUS_ON_NODE:-0}
    if [[ -n ${SLURM_NTASKS_PER_NODE:-} ]]; then
        TASKS=$SLURM_NTASKS_PER_NODE # on each node
    elif [[ -n ${SLURM_NTASKS:-} ]]; then
        TASKS=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
        ((TASKS * SLURM_JOB_NUM_NODES == SLURM_NTASKS)) || fail "$SLURM_NTASKS tasks do not divide by $SLURM_JOB_NUM_NODES nodes: give --ntasks-per-node"
    else
        TASKS=$((GPUS > 0 ? GPUS : 1))
    fi
    CPUS=$((SLURM_CPUS_ON_NODE > TASKS ? SLURM_CPUS_ON_NODE / TASKS : 1)) # for each of them
    export OMP_NUM_THREADS=$CPUS
    rm -rf "$JOB/ranks"
    say "job $SLURM_JOB_ID on $(hosts | xargs), $TASKS ranks each with $CPUS cores${SLURM_RESTART_COUNT:+, started for the $((SLURM_RESTART_COUNT + 1)). time}"
    say "records and checkpoints in $JOB"
}

hosts() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

# The address at which Slurm itself reaches a node; on most clusters that is its name.
address_of() {
    local address
    address=$(scontrol show node "$1" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    echo "${address:-$1}"
}

# launch NODES COMMAND...: the command on each rank, on the job's first so many nodes. Becomes srun: call it in the background.
launch() {
    local nodes=$1
    shift
    local -a options=(--nodes="$nodes" --nodelist="$(hosts | head -n "$nodes" | paste -sd,)" --ntasks-per-node="$TASKS" --cpus-per-task="$CPUS")
    mkdir "$JOB/ranks"
    # Every rank sees all GPUs of its node and takes that of its number, as with other launchers.
    ((GPUS == 0)) || options+=(--gpu-bind=none)
    # No kill on the first bad exit: exit code 75 is one, and rank 0 may still be closing its record then.
    # shellcheck disable=SC2016
    exec srun "${options[@]}" --overcommit --kill-on-bad-exit=0 --wait=300 \
        bash -c 'source "$0/lib.sh"; be_rank; exec "$@"' "$DEEPSCALE_SLURM" "$@"
}

# In a task of srun: the names by which torch, DeepSpeed and deepscale know a rank.
be_rank() {
    local -a here
    IFS=, read -ra here <<<"$SLURM_GTIDS"
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${#here[@]}
    trap '' USR1 # would end a program that does not listen yet; `supervise` says it again
    : >"$JOB/ranks/$RANK" # now it may be said
}

# Whether every rank ignores or hears USR1; what is not made of ranks may be told at any time.
listening() {
    local -a ranks=("$JOB"/ranks/*)
    [[ ! -d $JOB/ranks || ${#ranks[@]} -ge $((SLURM_JOB_NUM_NODES * TASKS)) ]]
}

# supervise COMMAND...: waits for the command. On USR1, which Slurm sends before the time limit (#SBATCH --signal), it asks the command to
# stop, and puts the job back into the queue. Ends the script with the command's exit code.
# SIGTERM is a scancel or a preemption. Slurm sends it to the ranks as well, and knows whether such a job shall run again.
supervise() {
    local asked='' seconds=0 code=0 child
    trap 'asked=yes' USR1
    trap : TERM
    "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        if [[ -z $asked ]]; then
            wait "$child" || true # returns when a signal comes, too
        else
            ! listening || ((seconds++ % 5)) || kill -s USR1 "$child" 2>/dev/null || true
            sleep 1
        fi
    done
    wait "$child" || code=$?
    # 138: USR1 came after Python had put down its handlers, at the very end.
    if [[ -n $asked ]] && ((code == INTERRUPTED || code == 138)); then
        say "stopped by the signal before the time limit; back into the queue to go on from the checkpoint"
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        say "Slurm did not requeue the job"
    fi
    ((code != INTERRUPTED)) || say "stopped after a checkpoint; to go on, type DEEPSCALE_JOB=$NAME before the same sbatch ..."
    exit "$code"
}

# train NODES ARGUMENTS...: trains with what `deepscale prepare` left; goes on where an earlier start of this job stopped.
train() {
    local nodes=$1
    shift
    # Named by hand, so that missing files end the job instead of training on synthetic images. What the user says comes later and wins.
    supervise launch "$nodes" python -m deepscale.train --no-download --dataset cifar10 --data-dir "$DEEPSCALE_SHARED/data" \
        --checkpoint-dir "$JOB/checkpoints" --checkpoint-every 10m --resume auto "$@"
}

# ------------------------------------------------------------------------------------------------------------------- Ray

# begin_ray: a Ray cluster of the job's own on its nodes, which ends with the script. Who has no token cannot talk to it.
begin_ray() {
    # A worker that ends leaves its training to write a checkpoint, and none is ended for the memory of others.
    export RAY_kill_child_processes_on_worker_exit=0 RAY_memory_monitor_refresh_ms=0
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$JOB/ray-token RAY_ADDRESS
    RAY_ADDRESS=$(ip_of "$(address_of "$(hosts | head -n 1)")"):$MASTER_PORT
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
    # shellcheck disable=SC2016
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --overlap \
        bash -c 'source "$0/lib.sh"; ray_node' "$DEEPSCALE_SLURM" >>"$JOB/ray.log" 2>&1 &
    RAY=$!
    trap end_ray EXIT
}

# The number behind a name, which Ray wants. It replaces 127.0.0.1, where it is a cluster on one machine, by an address that the whole
# network reaches; another one of the loopback interface it leaves alone.
ip_of() { getent ahostsv4 "$1" | awk '{ sub(/^127\.0\.0\.1$/, "127.0.0.2", $1); print $1; exit }'; }

# On each node. Short: Ray's sockets lie there, and their paths have at most 107 characters.
ray_folder() { echo "/tmp/deepscale-ray-$SLURM_JOB_ID"; }

# In a task of srun, one a node: the head on the first, a worker on each other one, until they are told to end.
ray_node() {
    local seconds=0
    local -a options=(--node-ip-address="$(ip_of "$(address_of "$SLURMD_NODENAME")")" --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
    options+=(--object-store-memory=200000000 --disable-usage-stats --block)
    trap 'rm -rf "$(ray_folder)"' EXIT
    if ((SLURM_PROCID == 0)); then
        options+=(--head --port="$MASTER_PORT" --include-dashboard=false --temp-dir="$(ray_folder)")
    else
        until (: <"/dev/tcp/${RAY_ADDRESS/:*//}$MASTER_PORT") 2>/dev/null || ((seconds++ > 120)); do sleep 1; done
        options+=(--address="$RAY_ADDRESS")
    fi
    ray start "${options[@]}" &
    trap 'kill $!' TERM # ends all that it has started
    wait $! || wait $! || true
}

end_ray() {
    # To the step, the only one of the job: a srun that gets the signal itself kills what it has started.
    scancel --signal=TERM "$SLURM_JOB_ID.0" 2>/dev/null
    wait "$RAY"
    rm -rf "$RAY_AUTH_TOKEN_PATH" "$(ray_folder)"
}
