# shellcheck shell=bash
# What the scripts beside this one share; they hold the resources.  Set in the shell that calls sbatch:
#   NPROC_PER_NODE   processes on each node, instead of one a GPU
#   CONTAINER        what to put before a command, for example "apptainer exec --nv image.sif".  Without it the clone's
#                    .venv is used where there is one, else the python and torchrun on PATH
# shellcheck disable=SC2086 # CONTAINER holds several words
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z ${CONTAINER:-} && -d $clone/.venv ]]; then export PATH="$clone/.venv/bin:$PATH"; fi
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
rendezvous=(--standalone)

# train PROCESSES [arguments of src/train.py …]: trains to the end or to a signal, and resumes where it stopped.
train() {
    local processes=${NPROC_PER_NODE:-$1} requeue="" pid="" status run_dir
    shift
    trap 'requeue=yes; [[ -z $pid ]] || kill -USR1 "$pid"' USR1 # time is nearly over: checkpoint, then queue again
    trap : TERM                                                 # scancel or preemption, which the ranks hear too: wait
    run_dir=$(${CONTAINER:-} python "$clone/src/train.py" "$@" --print-run-dir)
    mkdir -p "$run_dir/logs"
    echo "job $job writes to $run_dir/logs/slurm-$job.out"
    exec >>"$run_dir/logs/slurm-$job.out" 2>&1
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=150 ${CONTAINER:-} torchrun "${rendezvous[@]}" \
        --nproc-per-node "$processes" --max-restarts 3 --shutdown-timeout 110 \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$clone/src/train.py" "$@" --resume &
    pid=$!
    while true; do # a signal ends wait, not srun
        wait "$pid" && status=0 || status=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    # Preempted, the job has a time of grace; ending within it counts as done, and Slurm would not queue it again.
    [[ $(scontrol show job "$job") != *JobState=RUNNING*PreemptTime=[0-9]* ]] || requeue=yes
    if [[ $requeue ]]; then
        echo "job $job is requeued and will resume from its checkpoint; the traceback above is how torchrun stops"
        scontrol requeue "$job"
        trap - TERM
        sleep 600 # Slurm ends this script: an exit code of its own means nothing
    fi
    exit "$status"
}

# report RUN [RUN …]
report() {
    ${CONTAINER:-} python "$clone/src/report.py" "$@"
}
