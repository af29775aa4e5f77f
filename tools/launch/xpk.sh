#!/bin/bash
# Pre-trains DeepSeek-V3 671B on a TPU v5p slice of 8x8x16 chips, through xpk.
#
#   CLUSTER=... PROJECT=... ZONE=... IMAGE=... SHARED=/shared tools/launch/xpk.sh
#
# CLUSTER, PROJECT, ZONE  a cluster that `xpk cluster create --tpu-type=v5p-2048` made
# IMAGE                   this repository with the extra `tpu`
# SHARED                  path in the pods of a volume that all can write (`xpk storage attach`)
#
# v5p-2048 counts cores, two a chip: 1,024 chips, 256 hosts. xpk writes a JobSet as jobset.yaml
# shows. It restarts on any exit code but 0, a mistake in the call (2) included: try the command
# with --dry_run on a laptop first. Stop: xpk workload delete --workload=dsv3-671b.
set -euo pipefail

: "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${IMAGE:?}" "${SHARED:?}"

# SIGTERM comes 600 s before the end of a pod: one step and one save, then exit code 75. Without
# --restart-on-user-code-failure xpk would take that code for a failure of the run.
xpk workload create \
    --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --workload=dsv3-671b --tpu-type=v5p-2048 --num-slices=1 --docker-image="$IMAGE" \
    --max-restarts=1000 --restart-on-user-code-failure \
    --termination-grace-period-seconds=600 \
    --env=JAX_COMPILATION_CACHE_DIR="$SHARED/compilation_cache" \
    --command="python -m experiments.pretrain --config=deepseek_v3_671b \
--set=parallel.pipe=1 --set=parallel.data=16 --set=parallel.expert=64 \
--set=parallel.layout=fsdp_ep --set=parallel.dispatch=padded --set=parallel.max_deferred=none \
--set=data.microbatch_sequences=1024 --set=data.prepared=$SHARED/corpus \
--set=checkpoint.interval_steps=50 --workdir=$SHARED/runs/deepseek_v3_671b"
