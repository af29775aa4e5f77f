#!/usr/bin/env bash
# The whole road on a laptop: pre-train, extend, SFT, GRPO, distil, evaluate, serve. Table of contents.
#
#     experiments/recipes/tiny_end_to_end.sh [WORKDIR]         # 15 minutes on 2 idle cores
#     SHORT=1 experiments/recipes/tiny_end_to_end.sh WORKDIR   # every stage for a moment, no bars
#
# Each stage has a measure, and the script ends with an error at the first that misses its bar.
# The same command goes on where it was stopped.
set -euo pipefail
work=$(realpath -m "${1:-runs/tiny_end_to_end}")
cd "$(dirname "$0")/../.."
mkdir -p "$work"
export JAX_PLATFORMS=cpu JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/compiled}

steps() { if [[ ${SHORT:-} ]]; then echo 2; else echo "$1"; fi; }
improves() { python -m tools.check_stage ${SHORT:+--report_only} "$@" | tee -a "$work/measures.txt"; }
# One device, and float32, which is what a CPU multiplies.
common=(--set parallel.data=1 --set parallel.expert=1 --set precision=f32 --set precision.remat=none)
yarn=(--set model.yarn.enabled=true --set model.yarn.factor=4 --set model.yarn.original_length=64)
texts=(--set data.cache_dir="$work/cache" --set data.max_documents=none --set data.fim_rate=0
    --set data.deduplicate=false --set data.filter_quality=false --set data.punctuation_split_rate=0)
rm -f "$work/measures.txt"

echo "== data: needles in haystacks, and sums"
needles() { python -m tools.make_needles --output="$work/$1.jsonl" --documents="$2" "${@:3}"; }
needles short 40000 --sentences=2 --needles=2 --digits=1
needles pairs 5000 --sentences=2 --needles=2 --digits=2 # so that these numbers become tokens
needles long 4000 --sentences=32 --needles=2 --digits=1 # up to 270 tokens
python -m tools.make_arithmetic --output="$work/sums" --largest=9 --shown=75
python -m tools.make_arithmetic --output="$work/few" --largest=9 --shown=20 # the same held out

echo "== pre-training on 64 tokens: held-out loss"
python -m experiments.pretrain "${common[@]}" "${texts[@]}" --workdir="$work/pretrained" \
    --set data.sources="jsonl:$work/short.jsonl*0.9,jsonl:$work/pairs.jsonl*0.1" \
    --set model.init_std=0.04 --set data.sequence_length=64 --set data.sequences_per_step=32 \
    --set run.num_steps="$(steps 800)"
improves --name='held-out loss, pre-training' --less_is_better \
    --before="$work/pretrained/metrics.jsonl:validation_loss" \
    --after="$work/pretrained/metrics.jsonl:validation_loss"

needle() { # finds numbers in texts of up to 256 tokens
    python -m experiments.evaluate --checkpoint="$work/$1" --needle --needle_tokens=256 \
        --needle_cells=16 --needle_digits=1 --format=json --output="$work/$1" >"$work/$1/needle.json"
}
echo "== context extension to 128 and 256 tokens: needle in a haystack"
needle pretrained
python -m experiments.extend_context "${common[@]}" "${texts[@]}" --workdir="$work/extended" \
    --set checkpoint.initial_weights="$work/pretrained" --set data.sources=jsonl:"$work/long.jsonl" \
    --set model.yarn.original_length=64 --set data.sequence_length=64 \
    --set data.sequences_per_step=32 --set extend.first_length=128 --set extend.second_length=256 \
    --set extend.steps="$(steps 120)"
needle extended/phase_2_256
# No bar for before: a model of this size finds more than half of them untaught.
improves --name='needle at 256 tokens, 4 times the trained length' \
    --before="$work/pretrained/needle.json:needle.mean_at_length.-1" --gain=0.1 \
    --after="$work/extended/phase_2_256/needle.json:needle.mean_at_length.-1" --after_at_least=0.9

solve() { # problems solved by the single most likely answer, percent
    python -m experiments.evaluate --chat --task=problems="$work/sums/held_out.jsonl" \
        --max_tokens=4 --context_tokens=32 --format=json "${@:2}" >"$work/$1"
}
tune() { # FROM CONVERSATIONS STEPS WORKDIR: fine-tunes for a number of steps
    python -m experiments.sft "${common[@]}" "${yarn[@]}" --workdir="$work/$4" \
        --set checkpoint.initial_weights="$1" --set sft.conversations="$2" --set sft.epochs=1000 \
        --set run.num_steps="$(steps "$3")" --set optim.peak_lr=1e-3 --set data.sequence_length=64 \
        --set data.sequences_per_step=8 --set data.validation_documents=8
    solve "$4.json" --checkpoint="$work/$4"
}
base=$work/extended/phase_2_256
echo "== SFT on 75 sums: loss, and exact match on held-out ones"
solve extended.json --checkpoint="$base"
tune "$base" "$work/sums/conversations.jsonl" 30 sft
improves --name='held-out loss, SFT' --less_is_better \
    --before="$work/sft/metrics.jsonl:validation_loss" \
    --after="$work/sft/metrics.jsonl:validation_loss"
improves --name='exact match, SFT, percent' \
    --before="$work/extended.json:tasks.0.score" --after="$work/sft.json:tasks.0.score"

echo "== GRPO on the same sums: mean reward of sampled answers"
python -m experiments.grpo "${common[@]}" "${yarn[@]}" --workdir="$work/grpo" \
    --set checkpoint.initial_weights="$work/sft" --set grpo.problems="$work/sums/problems.jsonl" \
    --set run.num_steps="$(steps 220)" --set optim.peak_lr=6e-4 --set optim.final_lr=2e-4 \
    --set optim.warmup_steps=5 --set balance.sequence_weight=0 --set data.sequence_length=12 \
    --set grpo.max_answer_tokens=3 --set grpo.group_size=8 --set data.validation_documents=8
improves --name='mean reward, GRPO' --window=5 --before_below=0.35 --after_above=0.7 \
    --before="$work/grpo/metrics.jsonl:reward" --after="$work/grpo/metrics.jsonl:reward"

echo "== distillation: 20 sums with answers, and the teacher's verified ones too"
python -m experiments.distill --checkpoint="$work/grpo" --problems="$work/few/problems.jsonl" \
    --workdir="$work/distilled" --system= --reward=exact --max_tokens=4 --context_tokens=32
tune "$base" "$work/few/conversations.jsonl" 250 without
tune "$base" "$work/distilled/records.jsonl" 250 student
improves --name='exact match, without and with distillation, percent' --gain=10 \
    --before="$work/without.json:tasks.0.score" --after="$work/student.json:tasks.0.score"

echo "== serving: the same problems over HTTP"
python -m experiments.serve --checkpoint="$work/student" --port=0 --dtype=float32 \
    --cache_dtype=float32 --context_tokens=512 >"$work/serve.log" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until url=$(grep -o 'http.*/v1' "$work/serve.log"); do
    kill -0 $server || { echo "error: the server ended; see above" >&2; exit 1; }
    sleep 1
done
solve served.json --endpoint="$url"
improves --name='exact match, in process and served, percent' --gain=-2 \
    --before="$work/student.json:tasks.0.score" --after="$work/served.json:tasks.0.score"
kill -TERM $server && wait $server

echo "== all of it"
cat "$work/measures.txt"
