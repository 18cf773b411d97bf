# shellcheck shell=bash
# Shared by the scripts in this folder, which set the resources. Environment variables, set before calling sbatch:
#   NPROC_PER_NODE   processes per node; default: one per GPU
#   CONTAINER        prefix of each command, for example "apptainer exec --nv image.sif"; default: none, with the
#                    clone's .venv if there is one, else the python and torchrun on PATH
# shellcheck disable=SC2086 # CONTAINER holds several words
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z ${CONTAINER:-} && -d $clone/.venv ]]; then export PATH="$clone/.venv/bin:$PATH"; fi
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
rendezvous=(--standalone)

# train PROCESSES [arguments of src/train.py …]: trains until the end or a signal; resumes from the latest checkpoint.
train() {
    local processes=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-$1}} requeue="" pid="" status run_dir
    shift
    trap 'requeue=yes; [[ -z $pid ]] || kill -USR1 "$pid"' USR1 # time limit is near: checkpoint, then requeue
    trap : TERM                                                 # scancel or preemption: the ranks get it too, so wait
    run_dir=$(${CONTAINER:-} python "$clone/src/train.py" "$@" --print-run-dir)
    mkdir -p "$run_dir/logs"
    echo "job $job writes to $run_dir/logs/slurm-$job.out"
    exec >>"$run_dir/logs/slurm-$job.out" 2>&1
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=150 ${CONTAINER:-} torchrun "${rendezvous[@]}" \
        --nproc-per-node "$processes" --max-restarts 3 --shutdown-timeout 110 \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$clone/src/train.py" "$@" --resume &
    pid=$!
    while true; do # a signal interrupts wait, not srun
        wait "$pid" && status=0 || status=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    # A preempted job that exits within its grace time counts as completed, and Slurm would not requeue it.
    [[ $(scontrol show job "$job") != *JobState=RUNNING*PreemptTime=[0-9]* ]] || requeue=yes
    if [[ $requeue ]]; then
        echo "job $job is requeued and will resume from its checkpoint; the traceback above is from torchrun stopping"
        scontrol requeue "$job"
        trap - TERM
        sleep 600 # until Slurm kills this script, so that its exit code does not matter
    fi
    exit "$status"
}

# report RUN [RUN …]: figures and a table
report() {
    ${CONTAINER:-} python "$clone/src/report.py" "$@"
}

# controls [arguments of bench/controls.py …]
controls() {
    ${CONTAINER:-} python "$clone/bench/controls.py" "$@"
}
